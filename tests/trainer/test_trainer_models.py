"""Models given to the included trainer: which are refused and why, and how the others are trained."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_fast.trainer import checkpoints, loading, rollout, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.update import Learner
from tests.support.tiny_runs import arguments, setup, tiny, write_rows

TINY_MODELS = {
    "gpt2": GPT2Config(vocab_size=20, n_positions=64, n_embd=16, n_layer=2, n_head=2),
    "llama": LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.3,
    ),
    "opt": OPTConfig(
        vocab_size=20, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.3, layerdrop=0.5,
    ),
}  # fmt: skip


@pytest.fixture
def given(tmp_path) -> Path:
    """The folder of a small model with its tokenizer."""
    _, policy = setup(tiny(tmp_path))
    policy.model.save_pretrained(tmp_path / "given")
    policy.tokenizer.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def change(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(name, capsys, tmp_path) -> str:
    capsys.readouterr()  # progress bars of what the test itself saved
    assert main(["train", *arguments(tmp_path / "runs", model=name)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1, shown
    assert not (tmp_path / "runs").exists()
    return shown


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda w: w.pop(NORM), f"missing tensors: {NORM}"),
        (lambda w: w.update({UP: torch.ones(3, 16)}), f"{UP} (3, 16), want (64, 16)"),
        (lambda w: w[NORM].fill_(math.nan), f"NaN or infinite weights: {NORM}"),
        (lambda w: w[UP][0].fill_(math.inf), f"NaN or infinite weights: {UP}"),
    ],
    ids=["missing", "shape", "nan", "inf"],
)
def test_weights_that_are_not_those_of_the_model_are_named(given, tmp_path, capsys, edit, message):
    change(given, edit)
    assert message in refused(given, capsys, tmp_path)


def test_tensors_that_the_model_does_not_use_are_named(given, tmp_path, capsys):
    change(given, lambda weights: weights.update({"v_head.weight": torch.ones(1)}))
    models.build(tiny(tmp_path, model=str(given)), "")
    assert "does not use: v_head.weight\n" in capsys.readouterr().err


def test_tied_heads_and_buffers_are_not_missing(given, tmp_path, capsys):
    config = LlamaConfig.from_pretrained(given, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(given)
    assert "lm_head.weight" not in load_file(given / "model.safetensors")
    old = {
        f"model.layers.0.self_attn.{name}": torch.ones(4)
        for name in ("rotary_emb.inv_freq", "masked_bias")
    }
    change(given, lambda weights: weights.update(old))
    models.build(tiny(tmp_path, model=str(given)), "")
    assert "does not use" not in capsys.readouterr().err


def test_a_checkpoint_of_a_run_that_was_damaged_is_not_evaluated(tmp_path, capsys):
    assert main(["train", *arguments(tmp_path, name="run", steps=1)]) == 0
    change(checkpoints.latest(tmp_path / "run"), lambda weights: weights.pop(NORM))
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert f"missing tensors: {NORM}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["./none", "../none", "/no/where", "~/none/x", "runs/x/y", "a\\b"])
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(name, tmp_path, capsys):
    assert f"model={name!r}: no such folder" in refused(name, capsys, tmp_path)


def test_folders_that_are_no_model(given, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "without config.json" in refused(tmp_path / "empty", capsys, tmp_path)
    assert "a file; want the folder" in refused(given / "config.json", capsys, tmp_path)
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "an adapter; merge it" in refused(tmp_path / "empty", capsys, tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "a run; give one of its checkpoints" in refused(tmp_path / "run", capsys, tmp_path)
    (given / "model.safetensors").write_bytes(b"\x10")
    assert "weights: " in refused(given, capsys, tmp_path)
    (given / "model.safetensors").unlink()
    assert "weights: " in refused(given, capsys, tmp_path)
    (given / "config.json").write_text("{")
    assert f"model={str(given)!r}" in refused(given, capsys, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached; give a folder" in refused("nobody/none", capsys, tmp_path)
    assert "not a hub id" in refused("bad--name..", capsys, tmp_path)


def test_models_that_are_not_causal(given, tmp_path, capsys):
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertConfig(vocab_size=20, hidden_size=16, **small)
    AutoModelForCausalLM.from_config(bert).save_pretrained(given)
    assert "depend on later tokens" in refused(given, capsys, tmp_path)
    for path in given.glob("*model*"):
        path.unlink()
    T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    ).save_pretrained(given)
    assert "not a causal language model" in refused(given, capsys, tmp_path)


def test_tokenizers_without_padding_or_end(given, tmp_path, capsys):
    settings = given / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    for name in ("pad_token", "eos_token"):
        content.pop(name)
    settings.write_text(json.dumps(content))
    policy = models.build(tiny(tmp_path, model=str(given)), "")  # the model has an end of sequence
    assert policy.tokenizer.pad_token_id == policy.eos_ids[0]
    (given / "generation_config.json").unlink()
    config = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert "no end-of-sequence token among its 17 tokens" in refused(given, capsys, tmp_path)
    (given / "config.json").write_text(json.dumps({**config, "eos_token_id": 99}))
    assert "has eos_token_id 99, its tokenizer None" in refused(given, capsys, tmp_path)
    for name in given.glob("tokenizer*"):
        name.unlink()
    assert f"model={str(given)!r}: tokenizer: " in refused(given, capsys, tmp_path)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([{"role": "user", "content": "1+2="}], "the tokenizer has no chat template"),
        ("1" * 3000, "3000 tokens and max_new_tokens=256 are more than the model's 2048 positions"),
    ],
)
def test_prompts_that_the_model_cannot_read(given, tmp_path, capsys, prompt, message):
    rows = [{"prompt": "1+2=", "answer": "3"}, {"prompt": prompt, "answer": "3"}]
    if isinstance(prompt, list):
        rows[0]["prompt"] = prompt
        rows[1]["prompt"] = [{"role": "user", "content": "3"}]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    options = arguments(tmp_path / "runs", model=given, dataset=dataset, heldout=1)
    assert main(["train", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_settings_of_generation_that_transformers_refuses_to_save(given, tmp_path):
    policy = models.build(tiny(tmp_path, model=str(given)), "")
    policy.generation_config.do_sample, policy.generation_config.temperature = False, 0.6
    saved = checkpoints.save(policy, tmp_path, 1, 1)
    assert json.loads((saved / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize("share", ["off", "fork"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_checkpointing_recomputes_and_leaves_dropout_off(tmp_path, name, share):
    options = {"beta": 0.1, "max_grad_norm": 1e9, "lr_warmup_steps": 0, "micro_batch_size": 8}
    config = tiny(tmp_path, share_prompts=share, **options)
    task, new = setup(config)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(TINY_MODELS[name])
        loading.check_layers(model)
        config.gradient_checkpointing = recompute
        policy = models.prepare(model, new.tokenizer, torch.device("cpu"), torch.float32)
        learner = Learner(policy, config)
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        calls = 0

        def count(*args):
            nonlocal calls
            calls += 1

        layers[0].get_submodule(
            next(n for n, _ in layers[0].named_children())
        ).register_forward_hook(count)
        rows = [row for row in task.train[:4] for _ in range(4)]
        answers = rollout.sample(policy, [r["prompt"] for r in rows], 6, 1.0)
        batches, counts = learner.prepare(
            answers, torch.rand(16, generator=torch.Generator().manual_seed(0))
        )
        learner.backward(batches, counts)
        learner.policy.model.zero_grad()
        calls = 0
        learner.backward(batches, counts)
        passes = 2 if share == "fork" else 1
        assert calls == len(batches) * passes * (2 if recompute else 1)
        gradients.append([p.grad for p in model.parameters()])
        first = learner.update(answers, torch.arange(16.0) % 5)
        assert first["kl"] == 0
        assert first["ratio_min"] == first["ratio_max"] == 1
        assert not any(m.training for m in model.modules())
        again = learner.update(answers, torch.arange(16.0) % 5)
        assert again["kl"] > 0  # the reference has layers of its own
    torch.testing.assert_close(*gradients)


def test_models_without_such_layers_are_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing: Linear has no layers"):
        loading.check_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("size", [None, 3])
def test_sampling_and_evaluation_obey_the_micro_batch_size(tmp_path, monkeypatch, size):
    config = tiny(tmp_path, name="run", steps=1, micro_batch_size=size)
    from grpo_fast.trainer.train import train

    seen = []
    real = rollout.sample
    from transformers import GenerationMixin

    generate = GenerationMixin.generate

    def watched(self, *args, **kwargs):
        seen.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    train(config)
    assert max(seen) <= 3 if size else max(seen) >= 16
    _, policy = setup(config)
    prompts = [row["prompt"] for row in tasks.build(config).train[:7]]
    whole, parts = (real(policy, prompts, 6, 0.0, size) for size in (None, 3))
    torch.testing.assert_close(whole.completion_ids, parts.completion_ids)
    torch.testing.assert_close(whole.mask, parts.mask)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_do_not_know_each_other_are_refused(tmp_path, monkeypatch, capsys, name):
    """As MPI starts them, or with a variable that is left from something else."""
    monkeypatch.setenv(name, "2")
    assert main(["train", *arguments(tmp_path / "runs")]) == 2
    shown = capsys.readouterr().err
    assert f"{name}=2" in shown
    assert "torchrun or accelerate launch" in shown
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv(name, "1")
    assert main(["train", *arguments(tmp_path / "runs", steps=1, warmup_steps=0)]) == 0


def test_eval_works_from_any_directory_and_after_a_move(given, tmp_path, monkeypatch, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]
    write_rows(here / "rows.jsonl", rows)
    (here / "rewards_here.py").write_text(
        "def f(completions, **kwargs):\n    return [0.5] * len(completions)\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(here)
    options = arguments("runs", dataset="rows.jsonl", model="../given", reward="rewards_here:f")
    assert main(["train", *options, "--heldout=2", "--name=run", "--steps=1"]) == 0
    capsys.readouterr()
    monkeypatch.chdir(there)
    sys.modules.pop("rewards_here")
    shutil.move(here / "runs" / "run", there / "moved")
    assert main(["eval", "moved", "--device", "cpu"]) == 0
    assert " 0.500 " in capsys.readouterr().out
    monkeypatch.chdir(checkpoints.latest(there / "moved"))
    assert main(["eval", ".", "--device", "cpu"]) == 0
    (here / "rewards_here.py").unlink()
    sys.modules.pop("rewards_here")
    assert main(["eval", str(there / "moved"), "--device", "cpu"]) == 2
    assert f"no module 'rewards_here' in {here}" in capsys.readouterr().err
