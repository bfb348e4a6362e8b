"""Reward functions: plain Python, with TRL's signature.

`def reward(prompts, completions, **kwargs) -> list[float]`: one number per completion. The other columns
of the dataset come as keyword arguments, one value per completion, beside `completion_ids`. A prompt and
its completion are strings, or lists of chat messages where the dataset's prompts are.
"""

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Reward = Callable[..., list[float]]
Text = str | list[dict[str, str]]


def text_of(completion: Text) -> str:
    """The text of a completion, chat or not."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def correct(
    prompts: list[Text], completions: list[Text], answer: list[Any], **kwargs: Any
) -> list[float]:
    """1 where the completion is the `answer` column, spaces and the brackets of `[...]` aside."""
    return [
        float(text_of(c).strip().removeprefix("[").removesuffix("]").strip() == str(a).strip())
        for c, a in zip(completions, answer, strict=True)
    ]


def bracketed_number(prompts: list[Text], completions: list[Text], **kwargs: Any) -> list[float]:
    """1 where the completion is a whole number in brackets, like `[42]`, and nothing else."""
    return [float(re.fullmatch(r"\[\d+\]", text_of(c)) is not None) for c in completions]


def load(specification: str) -> Reward:
    """The function that `module:function` names; modules of the working directory are found too.

    Raises:
        ValueError: it is not of that form, or does not lead to a function.
    """
    module, _, function = specification.partition(":")
    if not module or not function:
        raise ValueError(f"reward: want module:function, got {specification!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward={specification!r}: {error}") from error
    if not callable(reward):
        raise ValueError(f"reward={specification!r}: not a function")
    return reward


def score(
    rewards: Sequence[Reward],
    weights: Sequence[float],
    prompts: list[Text],
    completions: list[Text],
    columns: dict[str, list[Any]],
) -> tuple[Tensor, dict[str, float]]:
    """((B,) weighted sums of the rewards, mean of each reward by name).

    Raises:
        ValueError: a function returned something else than one finite number per completion.
    """
    total = torch.zeros(len(completions), dtype=torch.float64)
    means = {}
    for reward, weight in zip(rewards, weights, strict=True):
        name = getattr(reward, "__name__", type(reward).__name__)
        values = [float(v) for v in reward(prompts=prompts, completions=completions, **columns)]
        if len(values) != len(completions) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"reward {name}: want {len(completions)} finite numbers, got {len(values)}: "
                f"{values[:8]}"
            )
        total += weight * torch.tensor(values, dtype=torch.float64)
        means[name] = sum(values) / max(len(values), 1)
    return total.float(), means
