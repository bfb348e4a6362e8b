"""The smallest runs of the included trainer, for its tests."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from grpo_fast.trainer import model as models
from grpo_fast.trainer import tasks
from grpo_fast.trainer.config import TrainConfig

TINY = {
    "max_operand": 9,
    "heldout": 10,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "warmup_steps": 20,
    "warmup_batch_size": 16,
    "prompts_per_step": 4,
    "group_size": 4,
    "num_iterations": 1,
    "steps": 3,
    "samples": 2,
    "completions_steps": 0,
    "device": "cpu",  # also where there is a GPU: in float32, and the same bits from run to run
}


def tiny(tmp_path: Path, **overrides) -> TrainConfig:
    options = {**TINY, "output_dir": str(tmp_path), **overrides}
    if isinstance(options.get("reward"), str):
        options["reward"] = [options["reward"]]
    return TrainConfig(**options)


def arguments(tmp_path: Path, **overrides) -> list[str]:
    options = {**TINY, "output_dir": tmp_path, **overrides}
    return [f"--{name}={value}" for name, value in options.items()]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


TIMING = {
    "seconds", "step_seconds", "sampling_seconds", "update_seconds", "tokens_per_second", "memory_gib",
}  # fmt: skip


def untimed(run_dir: Path) -> list[dict]:
    """The metrics of a run without those that differ from one repetition to the next."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in metrics(run_dir)]


def setup(config: TrainConfig) -> tuple[tasks.Task, models.Policy]:
    torch.manual_seed(config.seed)
    task = tasks.build(config)
    return task, models.build(config, task.alphabet)


def even_digits(completions: list, **_) -> list[float]:
    """A reward that differs between the samples of any model: the share of even digits."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in texts]


# For runs with `given_model`.
EVEN = {"reward": "tests.support.tiny_runs:even_digits", "max_new_tokens": 6, "warmup_steps": 0}


def given_model(folder: Path, **options) -> Path:
    """The folder of a small model with random weights, whose samples differ from prompt to prompt."""
    _, policy = setup(tiny(folder, **options))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(3)
    policy.model.save_pretrained(folder / "given")
    policy.tokenizer.save_pretrained(folder / "given")
    return folder / "given"


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def start(folder: Path, **options) -> subprocess.Popen:
    """The run `run` in a process of its own, after two steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_fast.trainer", "train", *arguments(folder, **options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    log = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process
