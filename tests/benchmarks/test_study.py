"""The study of group size and PPO: the parts of PPO against oracles, the runs, and what is made of them."""

import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs it")

from benchmarks.report import document, study
from benchmarks.report import ppo as ppo_report
from benchmarks.study import command, cost, loop, ppo, runs, summary, variants
from grpo_fast import ops, policy_loss
from grpo_fast.trainer import rollout as rollouts
from grpo_fast.trainer.loop import Run
from grpo_fast.trainer.parallel import Team
from grpo_fast.trainer.rollout import completion_logits
from grpo_fast.trainer.update import Learner
from tests.support.results import write

PARTS = variants.PARTS
FEW = {"warmup_steps": 20, "heldout": 10, "max_operand": 5}


def ragged(seed=0, lengths=(3, 5, 1, 4)):
    """Rewards (B,), values (B, T) with garbage in the padding, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    values = torch.randn(mask.shape, generator=generator)
    values[~mask] = 1e6
    return torch.randn(len(lengths), generator=generator), values, mask


def explicit_gae(rewards, values, lengths, discount, trace):
    """The definition: a sum over all later tokens for each token, in Python's floats."""
    found = []
    for reward, row, length in zip(rewards.tolist(), values.tolist(), lengths, strict=True):
        steps = []
        for t in range(length):
            last = t == length - 1
            following = 0.0 if last else row[t + 1]
            steps.append((reward if last else 0.0) + discount * following - row[t])
        found.append(
            [
                sum((discount * trace) ** (k - t) * steps[k] for k in range(t, length))
                for t in range(length)
            ]
        )
    return found


@pytest.mark.parametrize("discount, trace", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_is_the_explicit_sum(discount, trace):
    rewards, values, mask = ragged()
    lengths = mask.sum(1).tolist()
    found = ppo.gae(rewards, values, mask, discount, trace)
    want = explicit_gae(rewards, values, lengths, discount, trace)
    for row, wanted, length in zip(found.tolist(), want, lengths, strict=True):
        assert row[:length] == pytest.approx(wanted, abs=1e-5)
        assert row[length:] == [0.0] * (len(row) - length)
    if (discount, trace) == (1.0, 1.0):  # the returns are the rewards
        returns = (found + values)[mask]
        torch.testing.assert_close(
            returns, rewards[:, None].expand_as(mask)[mask], atol=1e-5, rtol=0
        )


def test_gae_refuses_what_it_cannot_value():
    rewards, values, mask = ragged()
    with pytest.raises(ValueError, match=r"rewards: want one for each completion, got \[nan, "):
        ppo.gae(torch.tensor([math.nan, 0, 0, 0]), values, mask)
    for where in ((1, 2), (2, 0)):  # a hole; no tokens
        bad = mask.clone()
        bad[where] = False
        with pytest.raises(ValueError, match="mask: want the tokens of each completion first"):
            ppo.gae(rewards, values, bad)


def test_whitened_advantages():
    advantages, mask = ragged()[1:]
    found = ppo.whitened(advantages, mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[mask].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (found[~mask] == 0).all()


def test_the_clipped_value_loss_and_its_gradient():
    """Token by token: where the clipped error is the larger one, the loss does not depend on the value."""
    many = (3, 5, 1, 4) * 10
    old, returns, mask = ragged(1, many)[1], ragged(2, many)[1], ragged(0, many)[2]
    values = (
        old + 0.5 * torch.randn(old.shape, generator=torch.Generator().manual_seed(3))
    ).detach()
    values.requires_grad_(True)
    clip, count = 0.2, int(mask.sum())
    loss = ppo.value_loss(values, old, returns, mask, clip)
    (grad,) = torch.autograd.grad(loss, values)
    total, stopped = 0.0, 0
    for b, t in mask.nonzero().tolist():
        v, o, r = (x[b, t].item() for x in (values, old, returns))
        near = min(max(v, o - clip), o + clip)
        by_clipped = (near - r) ** 2 > (v - r) ** 2
        total += (near - r) ** 2 if by_clipped else (v - r) ** 2
        assert grad[b, t].item() == pytest.approx(0 if by_clipped else (v - r) / count, abs=1e-6)
        stopped += by_clipped
    assert loss.item() == pytest.approx(total / 2 / count, rel=1e-5)
    assert 0 < stopped < count
    assert (grad[~mask] == 0).all()


@pytest.fixture(scope="module")
def few():
    """Warm-ups and tasks that take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "COMMON", variants.COMMON | FEW)
        patch.setattr(variants, "PARTS", {"ppo": ("grpo", "ppo")})
        patch.setenv("GRPO_FAST_COMMIT", "19274bf")
        patch.setenv("GRPO_FAST_CALIBRATION", json.dumps({"bandwidth": {}, "gemm": {}}))
        yield


@pytest.fixture(scope="module")
def folder(few, tmp_path_factory):
    """The runs of the base and of PPO, two steps each, and their file of results."""
    there = tmp_path_factory.mktemp("study")
    assert command.main(arguments(there)) == 0
    return there


def arguments(there, steps=2):
    parts = ["--parts", "ppo", "--seeds", "0", "--steps", str(steps)]
    return [*parts, "--output_dir", str(there), "--out", str(there / "study.json")]


@pytest.fixture
def learner(folder):
    """A PPO learner at the start of seed 0, and completions with rewards."""
    config = variants.PPO.config(0, 2)
    task, policy = loop.loaded(config, folder / "start-seed-0")
    found = loop.Loop(variants.PPO, config, task, policy)
    rollout = found.sampler.sample([row["prompt"] for row in task.train[:12]], list(range(12)))
    return found.learner, rollout, torch.linspace(0, 1, 12)


def test_the_value_model_is_a_copy_that_padding_does_not_change(learner):
    learner, rollout, _ = learner
    assert (learner.values(rollout) == 0).all()
    learner.critic.get_output_embeddings().weight.data.normal_(
        generator=torch.Generator().manual_seed(0)
    )
    values = learner.values(rollout)
    assert values[rollout.mask].std() > 0.1
    short = next(b for b in range(12) if rollout.mask[b].sum() < rollout.mask.shape[1])
    length = int(rollout.mask[short].sum())
    alone = rollouts.Rollout(
        **{name: x if x is None else x[short : short + 1] for name, x in vars(rollout).items()}
    )
    cut = rollouts.Rollout(
        **vars(alone)
        | {"completion_ids": alone.completion_ids[:, :length], "mask": alone.mask[:, :length]}
    )
    torch.testing.assert_close(learner.values(cut)[0], values[short, :length], atol=1e-5, rtol=1e-5)
    theirs = {id(p) for p in learner.policy.model.parameters()}
    assert not any(id(p) in theirs for p in learner.critic_weights)


def test_the_gradient_of_ppo_is_that_of_policy_loss_with_an_advantage_for_each_token(learner):
    learner, rollout, rewards = learner
    learner.critic.get_output_embeddings().weight.data.normal_(
        std=0.1, generator=torch.Generator().manual_seed(0)
    )
    mask, model = rollout.mask, learner.policy.model
    micro_batches, counts = learner.prepare(rollout, rewards)
    values = learner.values(rollout).detach()
    lengths = mask.sum(1).tolist()
    raw = torch.zeros_like(values)
    for b, row in enumerate(explicit_gae(rewards, values, lengths, 1.0, 0.95)):
        raw[b, : len(row)] = torch.tensor(row)
    assert raw[mask].std() > 0.05
    returns = (raw + values)[mask]
    torch.testing.assert_close(learner.returns[mask], returns, atol=1e-5, rtol=1e-5)
    advantages = torch.zeros_like(raw)
    advantages[mask] = (raw[mask] - raw[mask].mean()) / raw[mask].std(correction=0)
    learner.backward(micro_batches, counts)
    found = [p.grad.clone() for p in learner.policy.trained]
    logps = ops.logprob(completion_logits(model, rollout), rollout.completion_ids, mask=mask)
    wanted = policy_loss(
        logps,
        advantages=advantages,
        mask=mask,
        old_logps=logps.detach(),
        ref_logps=logps.detach(),
        objective=learner.objective,
    ).loss
    grads = torch.autograd.grad(wanted, learner.policy.trained)
    norm = math.sqrt(sum(g.square().sum().item() for g in grads))
    for mine, theirs in zip(found, grads, strict=True):
        torch.testing.assert_close(mine, theirs / max(1.0, norm), atol=2e-5, rtol=1e-3)


def test_values_learn_the_rewards(learner):
    """With the same completions again and again the value loss falls."""
    learner, rollout, rewards = learner
    learner.prepare(rollout, rewards)
    for _ in range(15):
        learner.improve()
    assert learner.value_losses[-1] < 0.8 * learner.value_losses[0]


def test_a_run_of_grpo_is_that_of_the_trainer(folder, tmp_path):
    """The loop of the study makes the steps of `grpo-fast train`."""
    config = variants.BASE.config(0, 2)
    config.completions_steps = 0
    task, policy = loop.loaded(config, folder / "start-seed-0")
    run = Run(config, task, policy, tmp_path, Team(policy.device), time.perf_counter())
    run.learner = Learner(policy, config)
    theirs = [run.grpo_step() for _ in range(2)]
    mine = json.loads(runs.place(folder, "grpo", 0).read_text())["steps"]
    assert mine["grad_norm"][1] > 0
    for name in ("reward", "tokens", "grad_norm", "clip_fraction"):
        assert mine[name] == pytest.approx([row[name] for row in theirs], rel=1e-3, abs=1e-6), name


def test_runs_are_made_once_and_not_taken_for_others(folder, monkeypatch, capsys):
    monkeypatch.setattr(loop, "trained", None)  # a call would raise
    monkeypatch.setattr(loop, "warmed", None)
    assert command.main(arguments(folder)) == 0
    assert "0 runs to make, 3 are there" in capsys.readouterr().out
    assert command.main(arguments(folder, steps=3)) == 1
    assert "want another --output_dir" in capsys.readouterr().err
    monkeypatch.setenv("GRPO_FAST_COMMIT", "19274be")
    assert command.main(arguments(folder)) == 1
    assert "made with commit 19274bf, not 19274be" in capsys.readouterr().err


def test_the_file_of_results(folder):
    document = json.loads((folder / "study.json").read_text())
    rows = document[command.KIND]
    assert [r["variant"] for r in rows if r["row"] == "run"] == ["grpo", "ppo"]
    run = rows[2]
    assert run["variant"] == "ppo"
    assert len(run["steps"]["reward"]) == 1  # the mean of the two steps
    held = run["bytes"]
    assert held["critic_optimizer"] > held["critic"] > 0.9 * held["policy"] > 0
    assert held["reference"] == held["policy"] == rows[1]["bytes"]["policy"]
    assert "critic" not in rows[1]["bytes"]
    (mean,) = (r for r in rows if r["row"] == "mean" and r["variant"] == "ppo")
    assert mean["accuracy"]["mean"] == run["heldout"]["accuracy"]
    assert mean["minus_base"]["reward"]["mean"] == pytest.approx(
        run["steps"]["reward"][0] - rows[1]["steps"]["reward"][0], abs=1e-5
    )
    assert mean["minus_base"]["reward"]["missing"] == 0


def test_the_costs_are_measured_in_turns_and_once(tmp_path, monkeypatch):
    made = []

    def process(words, **options):
        provider, _, out = words[-3:]
        made.append(provider)
        numbers = {name: [9.0, 1.0, 3.0] for name in (*cost.TIMES, "tokens")}
        size = 100 + len(made)
        Path(out).write_text(json.dumps(numbers | {"peak_extra_bytes": size, "held": {}}))
        return SimpleNamespace(returncode=int(fails), stderr="no such model")

    monkeypatch.setenv("GRPO_FAST_COMMIT", "19274bf")
    monkeypatch.setattr(cost.subprocess, "run", process)
    monkeypatch.setattr(cost, "predicted", lambda: {"row": "predicted"})
    monkeypatch.setattr(cost, "PROVIDERS", {n: cost.PROVIDERS[n] for n in ("grpo", "ppo")})
    fails = False
    for _ in range(2):
        grpo, ppo_row, predicted = cost.all_of(tmp_path)
    assert made == ["grpo", "ppo", "ppo", "grpo"]
    assert grpo["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0}  # without the first of each
    assert (grpo["steps"], grpo["rounds"], grpo["peak_extra_bytes"]) == (4, 2, 102.5)
    assert grpo["peak_spread"] == 3
    assert ppo_row["peak_extra_bytes"] == 102.5
    assert predicted["row"] == "predicted"
    with pytest.raises(ValueError, match="made with counted 3, not 6"):
        cost.all_of(tmp_path, steps=5)
    fails = True
    with pytest.raises(RuntimeError, match="grpo: no such model"):
        cost.all_of(tmp_path / "other")


def invented(variant, seed, level):
    """A run of 50 steps, all of whose numbers are `level`."""
    names = ("reward", "accuracy", "clip_fraction", "without_signal", "grad_norm")
    steps = {**dict.fromkeys(names, [level] * 50), **dict.fromkeys(("entropy", "kl"), [level] * 10)}
    steps |= {"cpu_seconds": [0.5] * 50, "seconds": [1.0] * 50}
    if variant.startswith("ppo"):
        steps["explained_variance"] = [level] * 50
    heldout = {"accuracy": level, "greedy_accuracy": level}
    return {"row": "run", "variant": variant, "seed": seed, "steps": steps, "heldout": heldout}


def test_means_over_seeds_and_differences_between_runs_of_one_seed():
    levels = {"grpo": (0.3, 0.5, 0.7), "g2": (0.4, 0.55, 0.9)}
    rows = summary.means([invented(v, s, x) for v, xs in levels.items() for s, x in enumerate(xs)])
    base, other = rows
    assert "minus_base" not in base
    assert other["accuracy"]["mean"] == pytest.approx(statistics.fmean(levels["g2"]))
    differences = [b - a for a, b in zip(levels["grpo"], levels["g2"], strict=True)]
    half = 4.302653 * statistics.stdev(differences) / 3**0.5  # t for two degrees of freedom
    found = other["minus_base"]["accuracy"]
    assert (found["low"], found["high"]) == pytest.approx(
        (statistics.fmean(differences) - half, statistics.fmean(differences) + half), abs=1e-6
    )
    assert "g2: reward 0.617" in summary.line_of(other)
    assert summary.roughness([0.0, 9.0, 1.0, 0.0, 1.0, 0.0]) == pytest.approx(0.5**0.5)


def test_each_variant_samples_the_same_number_of_completions():
    for variant in (*variants.VARIANTS.values(), *variants.candidates()):
        config = variant.config(0, 2)
        assert config.prompts_per_step * variant.samples == variants.COMPLETIONS, variant.name
    assert {n for part in PARTS.values() for n in part} == set(variants.VARIANTS)
    bad = ["--seeds", str(variants.TUNING_SEED)]
    with pytest.raises(SystemExit):
        command.main(bad)


@pytest.fixture
def results(tmp_path):
    """A file of results with invented numbers: PPO is better than GRPO, G = 2 is not told apart."""
    levels = {"grpo": (0.5, 0.6, 0.7), "ppo": (0.7, 0.8, 0.9), "g2": (0.45, 0.7, 0.7)}
    made = [invented(v, s, x) for v, xs in levels.items() for s, x in enumerate(xs)]
    rows = [{"row": "start", "seed": seed, "accuracy": 0.25} for seed in range(3)]
    rows += [*map(command.condensed, made), *summary.means(made)]
    rows.append({"row": "tuning", "variant": "ppo critic.trace=1", **summary.values_of(made[3])})
    seconds = {name: {"median": 2.0, "min": 1.0, "max": 3.0} for name in cost.TIMES}
    held = {"policy": 1 << 30, "policy_gradients": 1 << 30, "policy_optimizer": 2 << 30}
    for name, more in (("grpo-kl", {}), ("ppo-kl", {"critic": 1 << 30, "reference": 1 << 30})):
        row = {"row": "cost", "provider": name, "text": name, "steps": 6, "rounds": 2, **seconds}
        rows.append(row | {"peak_extra_bytes": 5 << 30, "held": held | more})
    rows.append({"row": "predicted", "model": "a/7B", "trained": 100 << 30, "reference": 10 << 30})
    write(tmp_path, "study", None, window=command.WINDOW, steps=50, study=rows)
    return tmp_path


def test_the_pages_say_what_the_numbers_show(results):
    text = study.text(results)
    assert "| G = 2 | 0.617 ± 0.359 | +0.017 ± 0.190 | within the spread | 0.617 ± 0.359 |" in text
    assert "| grpo" not in text
    text = ppo_report.text(results)
    assert "| +0.200 ± 0.000 | better | 500 ms |" in text
    assert "| weights, gradients, AdamW states; SmolLM2, float32 | 4.00 GiB | 6.00 GiB |" in text
    assert "7B, bfloat16 with float32 copies, predicted | 110 GiB | 210 GiB |" in text
    assert "| worst seed, best seed | 0.500, 0.700 | 0.700, 0.900 |" in text
    assert "| 5, 2.5 s (2 of 3 seeds) | 5, 2.5 s |" in text
    assert "| PPO, 64 x 1 | `critic.trace=1` | 0.700 |" in text
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("|"))


def test_a_part_that_was_measured_anew_replaces_its_rows_alone(results):
    row = {"row": "predicted", "model": "a/8B", "trained": 120 << 30, "reference": 10 << 30}
    write(results, "new", None, commit="29274be", date="2026-01-02", study=[row])
    text = ppo_report.text(results)
    assert "8B, bfloat16 with float32 copies, predicted | 130 GiB | 250 GiB |" in text
    assert "7B" not in text
    assert "commit 19274bf" in " ".join(text.split())
    assert "| +0.200 ± 0.000 | better | 0.800" in text


def test_the_pictures_are_the_same_each_time(results):
    picture = ppo_report.picture(results)
    assert picture == ppo_report.picture(results)
    assert b"PPO, 64 x 1" in picture
    assert b"minus base" in study.picture(results)


def test_without_results_there_is_nothing(tmp_path):
    for make in (study.text, ppo_report.text):
        assert make(tmp_path) == ""
    for draw in (study.picture, ppo_report.picture):
        assert draw(tmp_path) == b""


@pytest.mark.parametrize("name", ["study", "ppo"])
def test_the_committed_page_is_the_generated_one(name):
    path = document.ROOT / "docs" / f"{name}.md"
    text_of, _ = document.PAGES[path]
    text = text_of(document.FOLDER / "results")
    assert text
    page = path.read_text()
    assert page == document.with_headline(page, text), "run python -m benchmarks.report"
