"""The adapter of TRL 1.15 and 1.16: `from grpo_fast.integrations.trl import GRPOTrainer`.

`GRPOTrainer` is TRL's trainer with the head and the loss fused. `objective` translates the loss options of
a `GRPOConfig` and works without TRL. `patch` replaces the head in TRL's other trainers (RLOO, DPO, ...).
"""

from typing import TYPE_CHECKING, Any

from grpo_fast.integrations.shared.packages import TRANSFORMERS, VERSIONS, require
from grpo_fast.integrations.trl.head import FusedLogProb
from grpo_fast.integrations.trl.options import objective

if TYPE_CHECKING:  # `__getattr__` imports it at run time: the rest works without TRL
    from grpo_fast.integrations.trl.trainer import GRPOTrainer

__all__ = ["GRPOTrainer", "objective", "patch"]

SUPPORTED = VERSIONS["trl"]


def patch() -> None:
    """Give TRL's other trainers (RLOO, asynchronous GRPO, DPO, ...) the fused head, for the whole process.

    The metrics of DPO, SFT and KTO need more than log-probs and entropy. TRL's own head computes the rest
    without a gradient, which costs one more product with the head. One operator scores policy and
    reference. Under ZeRO-3, and with 8-bit weights, TRL's head runs, and a warning says so once.

    Raises:
        ImportError: TRL is not installed, or has another version than 1.15 and 1.16.
    """
    require("trl", *SUPPORTED)
    from trl.trainer import utils

    utils._ChunkedLogProbFunction = FusedLogProb


def __getattr__(name: str) -> Any:
    """Import `GRPOTrainer` when it is first used: `objective` has to work without TRL."""
    if name == "GRPOTrainer":
        require("trl", *SUPPORTED)
        require("transformers", TRANSFORMERS)
        from grpo_fast.integrations.trl.trainer import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
