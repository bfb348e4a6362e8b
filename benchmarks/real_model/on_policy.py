"""Ratios of the first update on a batch, and log-probs of the sampler beside those of the update.

Two kinds of rows, for each precision of the activations and each way to forward prompts:

- "trainer": some steps of the whole trainer, in several micro-batches. `ratio_min` and `ratio_max` of its
  metrics are 1. This shows little: with one update for each batch the trainer takes the old log-probs from
  the forward that also has the gradient, as TRL does, so a ratio of 1 is built in.
- "sampler": the log-prob of each sampled token, in `generate` with its KV cache and in the forward of the
  update, with the same weights. This difference is what a ratio of 1 leaves out. `again` is the difference
  between two calls of the training forward: that of the loss, and one that computes log-probs alone.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.real_model import setup
from benchmarks.real_model.sheet import Sheet
from grpo_fast.trainer import rollout as rollouts
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.forward import Forward
from grpo_fast.trainer.rollout import Draw
from grpo_fast.trainer.train import train

KIND = "real_on_policy"
STEPS = 2
MICRO_BATCH = 8  # completions
RATIOS = ("ratio_min", "ratio_max")
CASES = [(dtype, share) for dtype in ("float32", "bfloat16") for share in ("auto", "off")]


class Recording(Draw):
    """The trainer's choice of tokens, which also keeps the log-prob of each token that it chooses."""

    made: "list[Recording]"  # one for each batch of the sampler, since `recorded` began

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.logps: list[Tensor] = []
        self.made.append(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = super().__call__(input_ids, scores)
        logps = (scores.float() / self.temperature).log_softmax(-1)
        self.logps.append(logps.gather(-1, chosen.argmax(-1, keepdim=True))[:, 0])
        return chosen


@contextlib.contextmanager
def recorded() -> Iterator[list[Recording]]:
    """Let the sampler keep the log-probs of its tokens."""
    Recording.made = []
    with mock.patch.object(rollouts, "Draw", Recording):
        yield Recording.made


def sampling_logps(made: Sequence[Recording], config: TrainConfig, given: setup.Sampled) -> Tensor:
    """Put the log-probs that the sampler had at the places of the tokens, (B, T)."""
    lengths = given.rollout.prompt_mask.sum(1).tolist()
    limits = config.micro_batch_size, config.sampling_tokens
    batches = rollouts.batches_by_length(lengths, config.max_new_tokens, *limits)
    found = torch.zeros(given.rollout.mask.shape)
    for rows, one in zip(batches, made, strict=True):
        logps = torch.stack(one.logps, 1)[:, : found.shape[1]]
        found[rows, : logps.shape[1]] = logps
    return found


def of_sampler(config: TrainConfig) -> dict[str, Any]:
    """Compare the sampler's log-probs with those of the training forward, and this with itself."""
    with recorded() as made:
        given = setup.sampled(config)
    sampled = sampling_logps(made, config, given)
    forward, batch = setup.planned(config, given)
    mask = given.rollout.mask
    again = forward.log_probs(given.policy.model, batch)
    # With the entropy, as in a first update: else tokens without an advantage have no log-probs.
    logps = forward.loss(batch, with_entropy=True, num_items=mask.sum()).logps
    gaps = (logps - sampled)[mask].double()
    return {
        "row": "sampler",
        "dtype": config.dtype,
        "share_prompts": config.share_prompts,
        "layout": batch.layout,
        "completions": len(mask),
        "tokens": int(mask.sum()),
        "mean_abs": gaps.abs().mean().item(),
        "max_abs": gaps.abs().max().item(),
        "mean": gaps.mean().item(),
        "rms": gaps.square().mean().sqrt().item(),
        "ratio_min": gaps.min().exp().item(),
        "ratio_max": gaps.max().exp().item(),
        "again_max_abs": (logps - again)[mask].abs().max().item(),
    }


def of_trainer(config: TrainConfig) -> dict[str, Any]:
    """Train for some steps, and return the extremes of the ratio that the metrics have."""
    count = 0
    real = Forward.loss

    def loss(self: Forward, *given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return real(self, *given, **named)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Forward, "loss", loss):
        ended = train(dataclasses.replace(config, output_dir=folder, name="run"))
        lines = (ended.run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "row": "trainer",
        "dtype": config.dtype,
        "share_prompts": config.share_prompts,
        "steps": len(rows),
        "micro_batches": count,
        "tokens": int(sum(row["tokens"] for row in rows)),
        "ratio_min": min(row["ratio_min"] for row in rows),
        "ratio_max": max(row["ratio_max"] for row in rows),
        "grad_norms": [row["grad_norm"] for row in rows],
    }


def measure(given: Sequence[str], sheet: Sheet) -> bool:
    """Measure all cases, and tell whether the ratios of the trainer are 1."""
    for dtype, share in CASES:
        options = {"dtype": dtype, "share_prompts": share}
        sheet.append(of_sampler(setup.config_of(given, **options)))
        few = {"steps": STEPS, "micro_batch_size": MICRO_BATCH, "samples": 0, "heldout": 8}
        sheet.append(of_trainer(setup.config_of(given, **options, **few, completions_steps=0)))
    ratios = [row[k] for row in sheet.rows if row["row"] == "trainer" for k in RATIOS]
    return all(x == 1 for x in ratios)
