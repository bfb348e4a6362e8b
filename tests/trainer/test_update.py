"""The update: what passes through the model, in what parts, with which weights and optimizers."""

import dataclasses
import random

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast import Objective, reference, shared_prompt
from grpo_fast.shared_prompt.routes import least_work
from grpo_fast.trainer import rollout
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.train import train
from grpo_fast.trainer.update import Learner, Masters, micro_batches_of, optimizer_of
from tests.support.openai_server import OpenAIServer
from tests.support.tiny_runs import EVEN, arguments, given_model, metrics, setup, tiny

SEEDS = list(range(16))
REWARDS = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0, 2, 2, 2, 2, 0, 1, 2, 3])  # two silent groups


def answered(config, task, policy) -> rollout.Rollout:
    rows = [row for row in task.train[:4] for _ in range(4)]
    return rollout.sample(policy, [r["prompt"] for r in rows], 6, 1.0, seeds=SEEDS)


def forwarded(learner, answers, scores) -> list[int]:
    """The completions of which a forward has the tokens, as the micro-batches have them."""
    batches, _ = learner.prepare(answers, scores)
    texts = [answers.completion_ids[b].tolist() for b in range(16)]
    seen = [ids for batch in batches for ids in batch.rollout.completion_ids.tolist()]
    assert all(ids in texts for ids in seen)
    return sorted(len(batch.advantages) for batch in batches)


@pytest.mark.parametrize("objective", ["dapo", "dapo_zv", "grpo", "dr_grpo"])
@pytest.mark.parametrize("share", ["off", "fork"])
def test_groups_without_signal_are_left_out_and_change_nothing(tmp_path, objective, share):
    """The gradient is that of all completions; dapo_zv divides by the tokens of the others alone."""
    config = tiny(tmp_path, objective=objective, beta=0.0, share_prompts=share, max_grad_norm=1e9)
    task, policy = setup(config)
    answers = answered(config, task, policy)
    learner = Learner(policy, config)
    batches, counts = learner.prepare(answers, REWARDS)
    assert sum(len(batch.advantages) for batch in batches) == 8
    loss, _, _ = learner.backward(batches, counts)
    gradients = [p.grad.clone() for p in policy.model.parameters()]

    policy.model.zero_grad()
    mask = answers.mask
    if objective == "dapo_zv":
        mask = mask & torch.tensor([True, False, False, True]).repeat_interleave(4)[:, None]
    expected = reference.grpo_loss(
        rollout.completion_logits(policy.model, answers),
        answers.completion_ids,
        rewards=REWARDS,
        group_size=4,
        mask=mask,
        objective=config.to_objective(),
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    found = [p.grad for p in policy.model.parameters()]
    torch.testing.assert_close(gradients, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"beta": 0.1}, {"beta": 0.0, "entropy_coef": 0.1}])
def test_what_acts_without_an_advantage_keeps_all_completions(tmp_path, options):
    config = tiny(tmp_path, **options)
    task, policy = setup(config)
    learner = Learner(policy, config)
    assert forwarded(learner, answered(config, task, policy), REWARDS) == [16]


def test_a_step_without_any_signal_is_one_with_gradients_of_zero(tmp_path):
    """As in a trainer that forwards them all: momentum goes on."""
    config = tiny(tmp_path, beta=0.0, lr_warmup_steps=0, learning_rate=0.01)
    task, policy = setup(config)
    learner = Learner(policy, config)
    answers = answered(config, task, policy)
    learner.update(answers, REWARDS)
    before = [p.clone() for p in policy.trained]
    row = learner.update(answers, torch.ones(16))
    assert (row["loss"], row["grad_norm"], row["forwarded"]) == (0, 0, 0)
    assert any((p != q).any() for p, q in zip(policy.trained, before, strict=True))


@pytest.mark.parametrize("tokens", [None, 1, 30, 60])
@pytest.mark.parametrize("layout", ["packed", "shared", "apart"])
def test_micro_batches_have_a_budget_of_tokens(tmp_path, tokens, layout):
    config = tiny(tmp_path, micro_batch_tokens=tokens)
    task, policy = setup(config)
    answers = answered(config, task, policy)
    alive = torch.ones(16, dtype=torch.bool)
    alive[3] = False
    parts = micro_batches_of(answers, alive, config, layout)
    assert sorted(torch.cat(parts).tolist()) == [b for b in range(16) if b != 3]
    lengths, widths = answers.mask.sum(1), answers.prompt_mask.sum(1)
    for part in parts:
        prompts = {tuple(answers.prompt_ids[b].tolist()): int(widths[b]) for b in part}
        rows = len(part) if layout == "apart" else len(prompts)
        most = rows * int(widths[part].max()) + len(part) * int(lengths[part].max())
        if layout == "packed":
            most = sum(prompts.values()) + int(lengths[part].sum())
        assert tokens is None or most <= tokens or len(part) == 1
    if tokens is None:
        assert len(parts) == 1
    if tokens == 1:
        assert len(parts) == 15


def test_the_budget_holds_where_prompts_are_not_shared_after_all(tmp_path, monkeypatch):
    """`auto` decides for each micro-batch; without sharing each completion brings its prompt along."""
    config = tiny(tmp_path, micro_batch_tokens=40)
    task, policy = setup(config)
    learner = Learner(policy, config)
    answers = answered(config, task, policy)

    def largest(batches) -> int:
        shapes = [(len(b.advantages), b.rollout) for b in batches]
        return max(n * int((r.prompt_mask.sum(1) + r.mask.sum(1)).max()) for n, r in shapes)

    monkeypatch.setattr(
        shared_prompt, "choose", lambda *_: shared_prompt.Choice("unshared", "a test")
    )
    batches, _ = learner.prepare(answers, REWARDS)
    assert sum(len(b.advantages) for b in batches) == 16
    assert largest(batches) <= 40
    monkeypatch.setattr(shared_prompt, "choose", lambda *_: shared_prompt.Choice("fork", "a test"))
    together, _ = learner.prepare(answers, REWARDS)
    assert largest(together) > 40
    assert len(together) < len(batches)


def test_the_budget_holds_in_the_first_step_of_a_model_that_cannot_pack(tmp_path):
    """The routes are compared before the micro-batches are planned, not when the first one runs."""
    config = tiny(tmp_path, micro_batch_tokens=60)
    task, policy = setup(config)

    def copied(_, args, kwargs):
        return args, {k: x.clone() if torch.is_tensor(x) else x for k, x in kwargs.items()}

    answers = answered(config, task, policy)
    for layer in policy.model.model.layers:
        layer.register_forward_pre_hook(copied, with_kwargs=True)
    learner = Learner(policy, config)
    batches, counts = learner.prepare(answers, REWARDS)
    ran = {batch.layout for batch in batches}
    assert ran <= {"shared", "apart"}
    for batch in batches:
        K, (P, T) = len(batch.plan.prompt_lengths), batch.plan.longest
        rows = K if batch.layout == "shared" else len(batch.advantages)
        assert rows * P + len(batch.advantages) * T <= 60
    learner.backward(batches, counts)
    assert {batch.layout for batch in learner.prepare(answers, REWARDS)[0]} == ran


@pytest.mark.parametrize("layout, most", [("packed", 0), ("shared", 0.05), ("apart", 0.15)])
def test_nothing_is_padded_in_one_row_and_little_elsewhere(layout, most):
    """Of 32 prompts with 100 to 600 tokens and eight completions each, with 30 to 1,024 tokens."""
    rng = random.Random(0)
    widths = [min(600, int(rng.lognormvariate(5.1, 0.45))) for _ in range(32)]
    lengths = [min(1024, int(rng.lognormvariate(6.2, 0.5))) for _ in range(256)]
    prompts, completions = torch.zeros(2, 256, max(*widths, *lengths), dtype=torch.long)
    for b in range(256):
        prompts[b, -widths[b // 8] :] = b // 8 + 1
        completions[b, : lengths[b]] = 1
    answers = rollout.Rollout(
        prompts,
        (prompts > 0).long(),
        completions,
        completions > 0,
        torch.ones(256),
        [""] * 256,
        [""] * 256,
    )
    config = TrainConfig(model="m", micro_batch_tokens=16384)
    fed = real = 0
    for rows in micro_batches_of(answers, torch.ones(256, dtype=torch.bool), config, layout):
        part = answers[rows]
        plan = shared_prompt.plan(
            part.prompt_ids,
            part.completion_ids,
            prompt_mask=part.prompt_mask,
            completion_mask=part.mask,
        )
        K, (P, T) = len(plan.prompt_lengths), plan.longest
        if layout == "packed":
            sizes = plan.one_row.sizes
            fed += sum(sizes) + len(rows)  # and the last tokens, from which nothing is predicted
            real += int(plan.prompt_lengths.sum() + plan.completion_lengths.sum())
            assert sum(sizes) <= 16384
        elif layout == "shared":
            count, length = plan.split_size(least_work(plan, 3584))
            fed += K * P + count * length
            real += int(plan.prompt_lengths.sum() + plan.completion_lengths.sum())
        else:
            fed += len(rows) * (P + T)
            real += int(part.prompt_mask.sum() + part.mask.sum())
    assert real <= fed <= real / (1 - most)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_dapo_zv_counts_only_groups_with_a_signal_in_any_reduction(tmp_path, reduction):
    config = tiny(tmp_path, objective="dapo_zv", reduction=reduction, beta=0.0)
    task, policy = setup(config)
    answers = answered(config, task, policy)
    _, counts = Learner(policy, config).prepare(answers, REWARDS)
    assert counts["sequences"] == 8
    assert counts["tokens"] == answers.mask[alive()[:, 0]].sum()


@pytest.mark.parametrize("size", [None, 3])
def test_micro_batch_size_is_a_limit_too(tmp_path, size):
    config = tiny(tmp_path, micro_batch_size=size)
    task, policy = setup(config)
    every = torch.ones(16, dtype=torch.bool)
    parts = micro_batches_of(answered(config, task, policy), every, config, "packed")
    assert [len(part) for part in parts] == ([16] if size is None else [3, 3, 3, 3, 3, 1])


def test_masters_update_bf16_weights_as_float32_ones():
    """With a learning rate whose steps bf16 alone would lose: weights are rounded float32 copies."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(64, 8, dtype=torch.bfloat16))
    masters = Masters([weight])
    expected = torch.nn.Parameter(torch.ones(64, 8))
    optimizers = [torch.optim.AdamW([p], lr=1e-3) for p in (*masters.copies, expected)]
    for _ in range(20):
        for _ in range(3):  # micro-batches
            x = torch.randn(4, 64, dtype=torch.bfloat16)
            (x @ weight).float().square().sum().backward()
            assert weight.grad is None
        expected.grad = masters.copies[0].grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        masters.publish()
    torch.testing.assert_close(masters.copies[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(weight, expected.bfloat16(), rtol=0, atol=0)
    assert (weight != 1).any()


def test_gradients_of_micro_batches_are_summed_in_float32():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = Masters([weight])
    for _ in range(300):
        (weight * 1.0).sum().backward()  # bf16 would stop at 256
    assert masters.copies[0].grad.item() == 300


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_optimizers_of_torch_and_transformers(tmp_path, name):
    config = tiny(tmp_path, optim=name, weight_decay=0.1)
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = optimizer_of([weight], config)
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert (weight < 1).all()
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[0]["lr"] == config.learning_rate


def test_optimizers_that_are_unknown_or_lose_updates_are_named(tmp_path):
    weight = [torch.nn.Parameter(torch.ones(4))]
    with pytest.raises(ValueError, match="optim='adam' is unknown; choose from adamw_torch, "):
        optimizer_of(weight, tiny(tmp_path, optim="adam"))
    with pytest.raises(ValueError, match=r"optim='lion_8bit': .*bitsandbytes"):
        optimizer_of(weight, tiny(tmp_path, optim="lion_8bit"))
    with pytest.raises(ValueError, match="small updates would be rounded away; adamw_torch_8bit"):
        optimizer_of(weight, tiny(tmp_path, weights="bfloat16_only"))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"quantize": "bnb-4bit", "model": "m"},
            "quantised weights cannot be trained; add --use_peft",
        ),
        ({"use_peft": True}, "use_peft: a new model has no weights"),
        ({"use_peft": True, "model": "m", "weights": "bfloat16_only"}, "an adapter is float32"),
        ({"fsdp": True, "weights": "bfloat16_only"}, "fsdp: it keeps float32 weights"),
        (
            {"fsdp": True, "quantize": "bnb-8bit", "use_peft": True, "model": "m"},
            "cannot be shared",
        ),
        ({"mismatch_cap": 0.5}, "mismatch_cap: want a number >= 1"),
        ({"quantize": "int4"}, "quantize='int4' is unknown; choose from bnb-4bit"),
    ],
)
def test_combinations_without_a_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_resampling_fills_the_batch_with_groups_that_have_a_signal(tmp_path):
    """Groups of two earn the same often; with resampling fewer of them are left, and the order is kept."""
    given = {**EVEN, "model": str(given_model(tmp_path)), "group_size": 2, "beta": 0.0, "steps": 2}
    plain = train(tiny(tmp_path, name="plain", **given))
    more = train(tiny(tmp_path, name="more", resample=3, **given))
    one, other = metrics(plain.run_dir)[0], metrics(more.run_dir)[0]
    assert one["groups_without_signal"] > 0
    assert other["groups_without_signal"] == 0
    assert one["batches_sampled"] == 1 < other["batches_sampled"] <= 4
    assert other["forwarded"] == 1.0
    from grpo_fast.trainer import checkpoints

    state = (checkpoints.latest(more.run_dir) / "training_state.json").read_text()
    batches = sum(row["batches_sampled"] for row in metrics(more.run_dir))
    assert f'"position": {4 * batches}' in state


def test_rollouts_are_joined_as_if_sampled_together(tmp_path):
    config = tiny(tmp_path)
    _, policy = setup(config)
    prompts = ["1+2=", "11+22=", "3+3=", "123+45="]
    whole = rollout.sample(policy, prompts, 6, 1.0, seeds=[1, 2, 3, 4])
    halves = [
        rollout.sample(policy, prompts[i : i + 2], 6, 1.0, seeds=[i + 1, i + 2]) for i in (0, 2)
    ]
    found = rollout.joined(halves, policy.tokenizer.pad_token_id)
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(found, name), value)
        else:
            assert getattr(found, name) == value
    picked = whole[torch.tensor([2, 0])]
    assert picked.prompts == ["3+3=", "1+2="]
    torch.testing.assert_close(picked.mask, whole.mask[[2, 0]])


@pytest.mark.parametrize("mode", ["truncate", "mask", "none"])
def test_samples_of_another_engine_are_weighed_by_the_ratio(tmp_path, mode):
    """Its log-probs are off by up to 1: the gradient is that of the weights of docs/weights.md."""
    config = tiny(tmp_path, beta=0.0, max_grad_norm=1e9, mismatch=mode, mismatch_cap=1.5)
    task, policy = setup(config)
    answers = answered(config, task, policy)
    logits = rollout.completion_logits(policy.model, answers)
    logps = logits.log_softmax(-1).gather(-1, answers.completion_ids[..., None])[..., 0]
    off = torch.linspace(-1, 1, logps.numel()).view_as(logps)
    answers = dataclasses.replace(answers, sampling_logps=(logps.detach() - off) * answers.mask)
    learner = Learner(policy, config)
    batches, counts = learner.prepare(answers, REWARDS)
    learner.backward(batches, counts)
    gradients = [p.grad.clone() for p in policy.model.parameters()]

    policy.model.zero_grad()
    ratio = off.exp()
    weight = {
        "truncate": ratio.clamp(max=1.5),
        "mask": torch.where(ratio <= 1.5, ratio, 0),
        "none": torch.ones_like(ratio),
    }[mode]
    reference.grpo_loss(
        logits,
        answers.completion_ids,
        rewards=REWARDS,
        group_size=4,
        mask=answers.mask,
        importance_weights=weight,
        objective=Objective.preset("grpo", beta=0.0),
    ).backward()
    found = [p.grad for p in policy.model.parameters()]
    torch.testing.assert_close(gradients, found, rtol=1e-3, atol=1e-6)
    row = learner.update(answers, REWARDS)
    assert row["mismatch_ratio_max"] == pytest.approx(
        off[answers.mask & alive()].exp().max().item(), rel=1e-3
    )
    assert row["mismatch_kl"] > 0.01


def alive() -> torch.Tensor:
    return torch.tensor([True, False, False, True]).repeat_interleave(4)[:, None]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_a_server_samples_from_the_weights_of_each_step(tmp_path, adapter):
    """The log-probs of the server are those of the policy in every step: it has its weights."""
    given = given_model(tmp_path)
    options = {**EVEN, "model": given, "learning_rate": 0.05, "use_peft": adapter, "beta": 0.0}
    with OpenAIServer(given, processed=True, dev=True, lora=True) as server:
        options |= {"server": server.url, "name": "run", "steps": 3, "temperature": 0.7}
        assert main(["train", *arguments(tmp_path, **options)]) == 0
        paths = [path for path, _, _ in server.requests]
        assert sum("completions" in path for path in paths) >= 3 * 16
    rows = metrics(tmp_path / "run")
    for row in rows:
        assert row["mismatch_kl"] < 1e-6
        assert row["mismatch_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert len({row["entropy"] for row in rows}) == 3  # the weights change


def test_a_server_that_cannot_be_reached_is_named(tmp_path, capsys, monkeypatch):
    from grpo_fast.trainer import server as servers

    monkeypatch.setattr(servers, "FIRST_DELAY", 0.001)
    options = {**EVEN, "model": given_model(tmp_path), "server": "http://127.0.0.1:9"}
    assert main(["train", *arguments(tmp_path, name="run", **options)]) == 1
    shown = capsys.readouterr().err
    assert "http://127.0.0.1:9" in shown
    assert "Traceback" not in shown
