"""TRL 1.15 and 1.16: `from grpo_fast.integrations.trl import GRPOTrainer` is the whole migration.

`GRPOTrainer` is TRL's with head and loss fused. `objective` translates the loss options of a `GRPOConfig`; it
needs no TRL. `patch` replaces the head of TRL's other trainers (RLOO, asynchronous GRPO, ...).
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_fast import presets
from grpo_fast.integrations._host import TRANSFORMERS, read, require
from grpo_fast.integrations.transformers import Head
from grpo_fast.objective import Objective
from grpo_fast.ops import linear_logprob
from grpo_fast.ops._head_arguments import HEAD_DTYPES

if TYPE_CHECKING:  # at run time `__getattr__` imports it, so that the rest works without TRL
    from grpo_fast.integrations._trl_trainer import GRPOTrainer

__all__ = ["GRPOTrainer", "objective", "patch"]

# From, and below. The trainer overrides private methods: another minor version is another trainer.
SUPPORTED = ("1.15", "1.17")

LOSS_TYPES = tuple(name for name in presets.TRL if "/" not in name)
# Normalised by num_items_in_batch, the others over the micro-batch.
BY_ITEMS = ("dapo", "cispo", "vespo")

# TRL's defaults of the options that `objective` reads.
DEFAULTS: dict[str, Any] = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "max_completion_length": 512,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
}
SMALLEST_LAMBDA = 1e-4  # TRL's


def objective(args: Any) -> Objective:
    """What TRL optimises, given a `GRPOConfig` or any object with its attributes.

    An attribute that is not there has TRL's default. The normaliser is not part of the objective: where
    `args.loss_type` is in `BY_ITEMS`, TRL's loss is that of `num_items`; for the others it is divided by the
    gradient accumulation steps. An adaptive entropy coefficient changes during training; here it is the one
    that training starts with.

    Raises:
        ValueError: an unknown loss type or level, a negative `beta`, or an option that the loss type does not
            use.
    """
    given = {name: read(args, name, default) for name, default in DEFAULTS.items()}
    loss_type, level = given["loss_type"], given["importance_sampling_level"]
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is unknown; TRL has {', '.join(LOSS_TYPES)}")
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level={level!r}: want 'token' or 'sequence'")
    if given["beta"] < 0:
        raise ValueError(
            f"beta={given['beta']}: not supported: TRL's loss would pay for moving away from the reference, "
            "without a bound"
        )
    bias_corrected = bool(given["use_bias_correction_kl"])
    epsilon = given["epsilon"]
    epsilon_high = epsilon if given["epsilon_high"] is None else given["epsilon_high"]
    surrogate = presets.TRL[loss_type].get("surrogate", "clip")
    options: dict[str, Any] = {"kl": "k3_unbiased" if bias_corrected else "k3"}
    if surrogate == "clip":
        options |= {"epsilon_low": epsilon, "epsilon_high": epsilon_high, "delta": given["delta"]}
    elif surrogate == "cispo":
        options["epsilon_high"] = epsilon_high - 1  # TRL's is the bound itself
    elif surrogate == "sapo":
        options["tau_pos"] = given["sapo_temperature_pos"]
        options["tau_neg"] = given["sapo_temperature_neg"]
    else:
        for sign in ("pos", "neg"):
            options[f"vespo_k_{sign}"] = given[f"vespo_k_{sign}"]
            options[f"vespo_lambda_{sign}"] = max(given[f"vespo_lambda_{sign}"], SMALLEST_LAMBDA)
    if loss_type == "dr_grpo":
        options["max_length"] = given["max_completion_length"]
    if given["entropy_coef"]:
        options |= {"entropy_coef": given["entropy_coef"], "entropy_reduction": "token_mean"}
    # VESPO looks at the level through the ratio of the bias-corrected KL alone.
    by_sequence = level == "sequence" and (surrogate != "vespo" or bias_corrected)
    return Objective.preset(
        f"trl/{loss_type}" + ("/sequence" if by_sequence else ""),
        beta=given["beta"],
        top_entropy_quantile=given["top_entropy_quantile"],
        off_policy_threshold=given["off_policy_mask_threshold"],
        **options,
    )


def patch() -> None:
    """Give TRL's other trainers (RLOO, asynchronous GRPO, DPO, ...) the fused head, for the whole process.

    Where they ask it for more than log-probs and entropy (DPO, SFT, KTO: statistics for their metrics), TRL's
    own adds that without gradient, which costs one more product with the head: policy and reference are
    scored by the same operator. Under ZeRO-3, and with 8-bit weights, TRL's head runs, and a warning says so
    once.

    Raises:
        ImportError: no TRL, or another version than 1.15 and 1.16.
    """
    require("trl", *SUPPORTED)
    from trl.trainer import utils

    utils._ChunkedLogProbFunction = FusedLogProb


class FusedLogProb:
    """What `trl.trainer.utils._ChunkedLogProbFunction` is to TRL: something with an `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of hidden (N, D), weight (V, D).

        What is not in `outputs` is None. `chunk_size` is that of TRL's kernel; ours has its own.
        """

        def theirs(wanted: tuple[str, ...]) -> tuple[Tensor | None, ...]:
            from trl.kernels import ChunkedLogProbFunction  # TRL 1.15's needs Triton

            return ChunkedLogProbFunction.apply(
                *(hidden, weight, bias, targets, temperature, chunk_size),
                *(final_logit_softcapping, logit_scale, wanted),
            )

        reason = None
        if hasattr(weight, "ds_id"):
            reason = "the head is sharded by ZeRO-3 (up to stage 2 it is fused)"
        for x in (hidden, weight, bias):
            if x is not None and x.dtype not in HEAD_DTYPES:
                reason = (
                    f"the fused one does not take {x.dtype} (it is fused where the head is left out of the "
                    "quantisation: modules_to_not_convert=['lm_head'])"
                )
        if reason is not None:
            warn_once(f"grpo_fast: TRL's own log-prob head runs, since {reason}")
            return theirs(outputs)
        others: tuple[Tensor | None, ...] = (None, None, None)
        wanted = tuple(name for name in outputs if name not in ("log_probs", "entropy"))
        if wanted:  # they have no gradient in TRL either
            with torch.no_grad():
                others = theirs(wanted)[2:]
        head = Head(weight, bias, final_logit_softcapping, logit_scale)
        with without_autocast(hidden) as hidden_:
            scored = log_probs(
                hidden_, head, targets, temperature=temperature, with_entropy="entropy" in outputs
            )
        return *scored, *others


def log_probs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`linear_logprob` with a `Head`: (log-probs, entropy if wanted)."""
    options = {"temperature": temperature, "mask": mask, **head.options}
    if with_entropy:
        return linear_logprob(hidden, head.weight, ids, return_entropy=True, **options)
    return linear_logprob(hidden, head.weight, ids, **options), None


@contextlib.contextmanager
def without_autocast(hidden: Tensor) -> Iterator[Tensor]:
    """`with without_autocast(hidden) as hidden`: of the dtype autocast would give it, and autocast off.

    Float64 stays what it is, as under autocast.
    """
    kind = hidden.device.type
    cast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if cast else hidden.dtype
    with torch.autocast(kind, enabled=False):
        yield hidden.to(dtype)


_WARNED: set[str] = set()


def warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=3)


def __getattr__(name: str) -> Any:
    """`GRPOTrainer`, imported when it is first asked for: `objective` has to work without TRL."""
    if name == "GRPOTrainer":
        require("trl", *SUPPORTED)
        require("transformers", TRANSFORMERS)
        from grpo_fast.integrations._trl_trainer import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
