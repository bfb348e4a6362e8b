"""The variants of the study: what differs between them, and what all of them have."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_fast.trainer.config import TrainConfig

COMPLETIONS = 64  # sampled in each step, whatever the group size
STEPS = 100
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100  # of the runs that chose the learning rates; it is not among the reported ones
# What all variants have. Of the four updates on each batch the first has ratios of 1; the others may clip.
COMMON: dict[str, Any] = {
    "task": "arithmetic",
    "objective": "grpo",
    "max_new_tokens": 8,
    "num_iterations": 4,
    "learning_rate": 5e-4,
    "lr_warmup_steps": 10,
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
}


@dataclass(frozen=True)
class Critic:
    """The settings that PPO has in addition.

    Attributes:
        learning_rate: of the value model.
        discount: gamma of GAE. trace: lambda of GAE.
        value_clip: how far a value may move from its old one before the clipped loss stops it.
    """

    learning_rate: float = 3e-3
    discount: float = 1.0
    trace: float = 0.95
    value_clip: float = 0.2


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        text: what differs from the base, for tables.
        samples: completions of each prompt.
        group: how many completions are compared with each other; None: those of a prompt.
        options: of `TrainConfig`, beside `COMMON`.
        critic: of PPO; None: GRPO.
    """

    name: str
    text: str
    samples: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    critic: Critic | None = None
    group: int | None = None

    def config(self, seed: int, steps: int) -> TrainConfig:
        """Return the options of a run."""
        groups: dict[str, Any] = {"prompts_per_step": COMPLETIONS // self.samples}
        if self.critic is None:
            groups["group_size"] = self.group or self.samples
        return TrainConfig(**(COMMON | groups | self.options), seed=seed, steps=steps)

    def described(self) -> dict[str, Any]:
        """Return all that makes the variant, as JSON."""
        critic = dataclasses.asdict(self.critic) if self.critic else None
        return {
            "samples": self.samples,
            "group": self.group,
            "options": COMMON | self.options,
            "critic": critic,
        }


# GSPO with everything but the ratio as in the base.
_SEQUENCE = {"objective": "gspo", "beta": 0.04, "kl": "k3"}
BASE = Variant("grpo", "base: G = 8, z-score, KL 0.04, clip 0.2, token ratio")
# PPO's loss is a mean over tokens, as its advantages belong to tokens.
_TOKENS = {"reduction": "token_mean"}
# The best rates of those tried are 5e-4 with 8 prompts in a step, and twice as much with 64.
_FAST = {"learning_rate": 1e-3}
PPO = Variant("ppo", "PPO: 64 prompts, 1 completion each", 1, _TOKENS | _FAST, Critic())
PPO_8X8 = Variant("ppo-8x8", "PPO: 8 prompts, 8 completions each", 8, _TOKENS, Critic())
# As PPO with a value that is the same everywhere: as many prompts, and no value model.
BATCH_MEAN = Variant(
    "batch-mean", "batch mean: 64 prompts, 1 completion each", 1, _FAST, group=COMPLETIONS
)
VARIANTS = {
    v.name: v
    for v in (
        BASE,
        Variant("g2", "G = 2", 2),
        Variant("g4", "G = 4", 4),
        Variant("g16", "G = 16", 16),
        Variant("mean-only", "mean only: no division by std", 8, {"scale_rewards": "none"}),
        Variant("no-kl", "no KL: beta 0", 8, {"beta": 0.0}),
        Variant("clip-higher", "clip-higher: 0.2 and 0.28", 8, {"epsilon_high": 0.28}),
        Variant("sequence", "sequence ratio (GSPO), clip 3e-4 and 4e-4", 8, _SEQUENCE),
        Variant(
            "sequence-wide",
            "sequence ratio, clip 0.2 as the token ratio",
            8,
            _SEQUENCE | {"epsilon_low": 0.2, "epsilon_high": 0.2},
        ),
        PPO,
        PPO_8X8,
        BATCH_MEAN,
    )
}
# Each has the base, beside which the others stand.
PARTS: dict[str, tuple[str, ...]] = {
    "groups": ("g2", "g4", "grpo", "g16"),
    "normalisation": ("grpo", "mean-only"),
    "kl": ("grpo", "no-kl"),
    "clip": ("grpo", "clip-higher"),
    "ratio": ("grpo", "sequence", "sequence-wide"),
    "ppo": ("grpo", "ppo", "ppo-8x8", "batch-mean"),
}


def of_parts(parts: Sequence[str]) -> list[Variant]:
    """Return the variants of some parts, each once."""
    return [VARIANTS[n] for n in dict.fromkeys(n for part in parts for n in PARTS.get(part, ()))]


def candidates() -> list[Variant]:
    """Return what was tried on the tuning seed: learning rates of all methods, and PPO's own settings."""
    found = [_changed(v, learning_rate=rate) for v in (BASE, PPO) for rate in RATES]
    found += [_changed(v, learning_rate=rate) for v in (PPO_8X8, BATCH_MEAN) for rate in RATES[1:3]]
    return [*found, *(_judged(**changes) for changes in CRITICS)]


RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
CRITICS = (
    {"learning_rate": 1e-3},
    {"learning_rate": 1e-2},
    {"trace": 1.0},
    {"learning_rate": 1e-2, "trace": 1.0},
)


def _changed(variant: Variant, learning_rate: float) -> Variant:
    options = variant.options | {"learning_rate": learning_rate}
    return dataclasses.replace(
        variant, name=f"{variant.name} learning_rate={learning_rate:g}", options=options
    )


def _judged(**changes: float) -> Variant:
    words = [f"critic.{name}={value:g}" for name, value in changes.items()]
    return dataclasses.replace(
        PPO, name=" ".join([PPO.name, *words]), critic=dataclasses.replace(Critic(), **changes)
    )
