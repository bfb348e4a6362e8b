"""The included trainer: its pieces, and short real runs through its command line."""

import dataclasses
import json
import math
import re
import signal
import sys

import pytest
import torch
import yaml

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.trainer import checkpoints, evaluate, parsing, rollout, tasks, warmup
from grpo_fast.trainer import model as models
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.forward import Forward
from grpo_fast.trainer.train import train
from grpo_fast.trainer.update import Learner
from tests.support.tiny_runs import arguments, metrics, setup, start, tiny, untimed, write_rows

KEYS = {
    "step", "reward", "loss", "kl", "entropy", "clip_fraction", "tokens_per_second", "grad_norm",
    "learning_rate", "ratio_mean", "ratio_max", "completion_length", "truncated", "seconds",
    "reward/correct", "reward/bracketed_number",
}  # fmt: skip


def batch(config: TrainConfig, task: tasks.Task, policy: models.Policy) -> rollout.Rollout:
    rows = [row for row in task.train[: config.prompts_per_step] for _ in range(config.group_size)]
    return rollout.sample(policy, [row["prompt"] for row in rows], 6, config.temperature)


def test_command_line_run_leaves_its_artefacts_and_eval_reads_them(tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("steps: 2\nlearning_rate: 1e-4\nname: from_yaml\n")
    options = [a for a in arguments(tmp_path) if not a.startswith("--steps")]
    assert main(["train", str(settings), *options, "--name", "run"]) == 0
    shown = capsys.readouterr()
    assert "before GRPO: accuracy" in shown.out
    assert "after GRPO: accuracy" in shown.out
    assert re.search(r"reward \d.*kl \d.*clip \d.*tokens/s", shown.err)  # the progress bar

    run_dir = tmp_path / "run"
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row.keys() >= KEYS
        assert all(math.isfinite(value) for value in row.values())
        assert row["reward"] == pytest.approx(
            0.9 * row["reward/correct"] + 0.1 * row["reward/bracketed_number"]
        )
    assert (run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert written["learning_rate"] == 1e-4
    assert parsing.parse([str(run_dir / "config.yaml")]) == TrainConfig(**written)

    checkpoint = run_dir / "checkpoints" / "step-000002"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    out = model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=3)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith("1+2=")

    assert main(["eval", str(run_dir), "--device", "cpu"]) == 0
    first = capsys.readouterr().out
    assert "accuracy" in first
    assert "10 held-out problems" in first
    assert main(["eval", str(checkpoint), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == first


def test_grpo_raises_the_reward(tmp_path):
    end = train(
        tiny(
            tmp_path,
            max_operand=4,
            heldout=1,
            hidden_size=32,
            warmup_steps=200,
            warmup_reward=0.45,
            warmup_batch_size=64,
            warmup_learning_rate=0.01,
            prompts_per_step=8,
            group_size=8,
            num_iterations=2,
            learning_rate=2e-3,
            steps=40,
        )
    )
    assert end.first_reward < 0.5
    assert end.last_reward > end.first_reward + 0.2


def test_same_seed_same_metrics(tmp_path):
    for name in ("a", "b"):
        train(tiny(tmp_path, name=name, num_iterations=2))
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")


def test_second_iteration_is_off_policy_and_clipped(tmp_path):
    config = tiny(tmp_path, learning_rate=0.05, lr_warmup_steps=0, epsilon_low=0.01)
    task, policy = setup(config)
    answers = batch(config, task, policy)
    scores = torch.rand(len(answers.prompts))
    once = Learner(policy, config).update(answers, scores)
    assert once["ratio_min"] == once["ratio_max"] == 1
    assert once["clip_fraction"] == 0

    task, policy = setup(config)
    config = dataclasses.replace(config, num_iterations=2)
    twice = Learner(policy, config).update(batch(config, task, policy), scores)
    assert twice["ratio_min"] < 1 < twice["ratio_max"]
    assert 0 < twice["clip_fraction"] < 1


def test_kl_is_measured_to_the_frozen_policy(tmp_path):
    config = tiny(tmp_path, learning_rate=0.01, lr_warmup_steps=0, beta=0.1)
    task, policy = setup(config)
    learner = Learner(policy, config)
    answers = batch(config, task, policy)
    scores = torch.rand(len(answers.prompts))
    assert learner.update(answers, scores)["kl"] == 0
    assert learner.update(answers, scores)["kl"] > 0

    train(tiny(tmp_path, name="without", beta=0.0, steps=1))
    assert metrics(tmp_path / "without")[0]["kl"] is None


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_micro_batches_add_up_to_the_batch(tmp_path, reduction):
    gradients, losses = [], []
    for size in (None, 3):
        config = tiny(
            tmp_path, reduction=reduction, micro_batch_size=size, beta=0.1, max_grad_norm=1e9
        )
        task, policy = setup(config)
        learner = Learner(policy, config)
        answers = batch(config, task, policy)
        assert answers.mask.sum(1).unique().numel() > 1  # lengths differ
        scores = torch.rand(16, generator=torch.Generator().manual_seed(0))
        micro_batches, counts = learner.prepare(answers, scores)
        assert len(micro_batches) == (1 if size is None else 6)
        loss, _, _ = learner.backward(micro_batches, counts)
        losses.append(loss)
        gradients.append([p.grad for p in policy.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_the_warm_up_add_up_too(tmp_path):
    gradients, losses = [], []
    for size in (None, 3):
        config = tiny(tmp_path, micro_batch_size=size)
        task, policy = setup(config)
        shown = [(row["prompt"], row["answer"]) for row in task.train[:8]]
        losses.append(warmup.imitate(policy, warmup.demonstrations(policy, shown), config))
        gradients.append([p.grad for p in policy.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", ["auto", "off", "packed", "mask", "fork", "bounded"])
def test_gradients_are_those_of_the_reference(tmp_path, share):
    from grpo_fast import reference

    config = tiny(tmp_path, max_grad_norm=1e9, beta=0.0, temperature=0.7, share_prompts=share)
    task, policy = setup(config)
    answers = batch(config, task, policy)
    learner = Learner(policy, config)
    scores = torch.rand(16)
    loss, _, _ = learner.backward(*learner.prepare(answers, scores))
    gradients = [p.grad.clone() for p in policy.model.parameters()]

    policy.model.zero_grad()
    expected = reference.grpo_loss(
        rollout.completion_logits(policy.model, answers),
        answers.completion_ids,
        rewards=scores,
        group_size=4,
        mask=answers.mask,
        temperature=0.7,
        objective=config.to_objective(),
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(
        gradients, [p.grad for p in policy.model.parameters()], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("share", ["packed", "mask", "fork"])
def test_training_with_shared_prompts_is_the_same(tmp_path, share):
    """Weights and metrics of two steps with a reference and two updates each; groups of one prompt."""
    found = []
    for option in ("off", share):
        config = tiny(
            tmp_path / option, beta=0.1, num_iterations=2, micro_batch_size=6, share_prompts=option
        )
        task, policy = setup(config)
        learner = Learner(policy, config)
        torch.manual_seed(1)
        rows = [row for row in task.train[:4] for _ in range(4)]
        answers = rollout.sample(policy, [row["prompt"] for row in rows], 6, 1.0)
        scores = torch.rand(16, generator=torch.Generator().manual_seed(0))
        steps = [learner.update(answers, scores) for _ in range(2)]
        found.append((list(policy.model.parameters()), steps))
    (ours, our_steps), (theirs, their_steps) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for one, other in zip(our_steps, their_steps, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_losses_from_logits_where_the_head_cannot_be_used(tmp_path, monkeypatch, capsys):
    """A line says so, and the gradients are the same; a route that was asked for is an error."""
    from grpo_fast.trainer import forward

    def refuse(model):
        raise ValueError("layers between hidden states and logits")

    losses, gradients = [], []
    for check in (forward.check_head, refuse):
        monkeypatch.setattr(forward, "check_head", check)
        config = tiny(tmp_path, beta=0.1, max_grad_norm=1e9, gradient_checkpointing=True)
        task, policy = setup(config)
        answers = batch(config, task, policy)
        learner = Learner(policy, config)
        loss, _, _ = learner.backward(*learner.prepare(answers, torch.arange(16.0)))
        losses.append(loss)
        gradients.append([p.grad for p in policy.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert "losses from logits, and no shared prompts: layers between" in capsys.readouterr().out
    with pytest.raises(ValueError, match="share_prompts='fork': layers between"):
        Learner(policy, tiny(tmp_path, share_prompts="fork"))


def test_completions_are_scored_as_they_were_sampled(tmp_path):
    """The logits of a left-padded batch are those of each sequence alone, and end at the first EOS."""
    config = tiny(tmp_path, max_operand=30)
    _, policy = setup(config)
    answers = rollout.sample(policy, ["1+2=", "11+22=", "3+30="], 6, 1.0)
    logits = rollout.completion_logits(policy.model, answers)
    for b in range(3):
        length = int(answers.mask[b].sum())
        prompt = answers.prompt_ids[b][answers.prompt_mask[b].bool()]
        alone = torch.cat([prompt, answers.completion_ids[b, :length]])[None]
        expected = policy.model(input_ids=alone).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[b, :length], expected, rtol=1e-4, atol=1e-5)
        ends = answers.completion_ids[b, :length] == policy.eos_ids[0]
        assert not ends[:-1].any()
        assert bool(ends[-1]) == bool(answers.ended[b])


def test_given_model_dataset_and_reward(tmp_path, monkeypatch, capsys):
    """--model, --dataset and --reward: nothing of the built-in task is left."""
    _, policy = setup(tiny(tmp_path))
    policy.model.generation_config.repetition_penalty = 5.0  # must not touch the sampling
    policy.model.generation_config.do_sample, policy.model.generation_config.top_k = True, 1
    policy.model.save_pretrained(tmp_path / "given")
    policy.tokenizer.save_pretrained(tmp_path / "given")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "digits": 1} for i in range(8)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sys.modules.pop("my_rewards", None)  # of another test
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions, answer, digits, completion_ids, **kwargs):\n"
        "    assert len(prompts) == len(answer) == len(digits) == len(completion_ids)\n"
        "    return [float(len(c) <= d) for c, d in zip(completions, digits, strict=True)]\n"
        "def zero(prompts, completions, **kwargs):\n"
        "    return [0.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = arguments(
        tmp_path,
        dataset="sums.jsonl",
        model=str(tmp_path / "given"),
        heldout=2,
        micro_batch_size=5,
        gradient_checkpointing=True,
        dtype="bfloat16",
        objective="dr_grpo",
    )
    chosen = ["--reward", "my_rewards:short", "my_rewards:zero", "--reward_weights", "2", "1"]
    assert main(["train", *options, *chosen]) == 0
    assert "warm-up" not in capsys.readouterr().out
    row = metrics(tmp_path / "sums")[-1]
    assert row["reward"] == pytest.approx(2 * row["reward/short"])
    assert main(["eval", "sums", "--device", "cpu"]) == 0
    assert "2 held-out problems" in capsys.readouterr().out

    loaded = models.build(tiny(tmp_path, model=str(tmp_path / "given")), "")
    assert loaded.model.generation_config.repetition_penalty is None
    saved = checkpoints.latest(tmp_path / "sums") / "generation_config.json"
    assert json.loads(saved.read_text())["repetition_penalty"] == 5.0


def test_chat_prompts_use_the_chat_template(tmp_path):
    _, policy = setup(tiny(tmp_path))
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    chat = [[{"role": "user", "content": "1+2"}], [{"role": "user", "content": "3+4"}]]
    answers = rollout.sample(policy, chat, 4, 0.0)
    plain = rollout.sample(policy, ["1+2=", "3+4="], 4, 0.0)
    torch.testing.assert_close(answers.prompt_ids, plain.prompt_ids)
    expected = [[{"role": "assistant", "content": text}] for text in plain.completions]
    assert answers.completions == expected


def test_only_the_newest_checkpoints_stay(tmp_path):
    end = train(tiny(tmp_path, steps=5, save_steps=1, keep_checkpoints=2))
    names = [path.name for path in checkpoints.checkpoints(end.run_dir)]
    assert names == ["step-000004", "step-000005"]
    assert end.checkpoint == checkpoints.latest(end.run_dir)


def test_non_finite_loss_stops_the_run_and_keeps_the_weights(tmp_path, monkeypatch, capsys):
    healthy = Forward.loss
    calls = 0

    def broken(self, *given, **options):
        nonlocal calls
        calls += 1
        out = healthy(self, *given, **options)
        return out._replace(loss=out.loss * math.nan) if calls > 2 else out

    monkeypatch.setattr(Forward, "loss", broken)
    assert main(["train", *arguments(tmp_path)]) == 1
    assert re.search(r"step 2: loss .*nan", capsys.readouterr().err)
    run_dir = tmp_path / "arithmetic"
    assert len(metrics(run_dir)) == 2
    model = AutoModelForCausalLM.from_pretrained(checkpoints.latest(run_dir))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_interruption_leaves_a_usable_checkpoint(tmp_path):
    process = start(tmp_path, steps=100_000, name="run")
    try:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    checkpoint = checkpoints.latest(tmp_path / "run")
    assert f"interrupted after step {len(metrics(tmp_path / 'run'))}" in out
    assert str(checkpoint) in out
    assert (tmp_path / "run" / "curve.png").exists()
    assert "accuracy" in evaluate.evaluate_run(tmp_path / "run", "cpu")


def test_a_warm_up_that_diverges_is_named(tmp_path, capsys):
    given = arguments(tmp_path, name="run", warmup_learning_rate=1e38, warmup_steps=40)
    assert main(["train", *given]) == 1
    shown = capsys.readouterr().err
    assert "warm-up, step" in shown or "have diverged" in shown


def test_answers_that_do_not_fit_are_refused(tmp_path, capsys):
    rows = [{"prompt": str(i), "answer": "a long answer"} for i in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["train", *arguments(tmp_path / "runs", dataset=path, heldout=1)]) == 2
    assert "set --max_new_tokens 14 or more" in capsys.readouterr().err


def test_updates_of_a_step_that_fails_are_saved(tmp_path, monkeypatch, capsys):
    """The second of two updates is not finite: the weights are those after the first."""
    seen = []
    backward = Learner.backward

    def fails(self, *given):
        loss, *rest = backward(self, *given)
        seen.append({k: v.clone() for k, v in self.policy.model.state_dict().items()})
        return (math.nan if len(seen) == 4 else loss), *rest

    monkeypatch.setattr(Learner, "backward", fails)
    given = arguments(tmp_path, name="run", num_iterations=2, save_steps=1)
    assert main(["train", *given]) == 1
    assert "step 1: loss nan" in capsys.readouterr().err
    saved = AutoModelForCausalLM.from_pretrained(checkpoints.latest(tmp_path / "run")).state_dict()
    for name, value in seen[3].items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)
