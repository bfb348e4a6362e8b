"""TRL 1.16: `from grpo_fast.integrations.trl import GRPOTrainer` is the whole migration.

`GRPOTrainer` is TRL's with head and loss fused. `objective` translates the loss options of a `GRPOConfig`; it needs no
TRL. `patch` replaces the head of TRL's other trainers (RLOO, asynchronous GRPO, ...).
"""

import warnings
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from grpo_fast.integrations import _seam
from grpo_fast.objective import Objective

__all__ = ["GRPOTrainer", "objective", "patch"]

SUPPORTED = "1.16"  # a subclass of its trainer and its private names: another minor version is another trainer

LOSS_TYPES: dict[str, dict[str, Any]] = {
    "grpo": {"reduction": "sequence_mean"},
    "bnpo": {"reduction": "token_mean"},
    "dapo": {"reduction": "token_mean"},
    "dr_grpo": {"reduction": "fixed_length"},
    "luspo": {"reduction": "sequence_sum"},
    "cispo": {"reduction": "token_mean", "surrogate": "cispo"},
    "sapo": {"reduction": "sequence_mean", "surrogate": "sapo"},
    "vespo": {"reduction": "token_mean", "surrogate": "vespo"},
}
BY_ITEMS = (
    "dapo",
    "cispo",
    "vespo",
)  # normalised by num_items_in_batch, the others over the micro-batch

# TRL 1.16's defaults of the options that `objective` reads.
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
    """What TRL 1.16 optimises, given a `GRPOConfig` or any object with its attributes; what it lacks is TRL's default.

    The normaliser is not part of it: where `args.loss_type` is in `BY_ITEMS`, TRL's loss is that of `num_items`;
    for the others it is divided by the gradient accumulation steps. An adaptive entropy coefficient changes
    during training; here it is the one that training starts with.

    Raises:
        ValueError: an unknown loss type or level, or an option that the loss type does not use.
    """
    given = {name: getattr(args, name, default) for name, default in DEFAULTS.items()}
    loss_type, level = given["loss_type"], given["importance_sampling_level"]
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is unknown; TRL has {', '.join(LOSS_TYPES)}")
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level={level!r}: want 'token' or 'sequence'")
    bias_corrected = bool(given["use_bias_correction_kl"])
    options = dict(LOSS_TYPES[loss_type])
    epsilon = given["epsilon"]
    epsilon_high = epsilon if given["epsilon_high"] is None else given["epsilon_high"]
    surrogate = options.get("surrogate", "clip")
    if surrogate == "clip":
        options |= {"epsilon_low": epsilon, "epsilon_high": epsilon_high, "delta": given["delta"]}
    elif surrogate == "cispo":
        # TRL's epsilon_high is the bound itself, and there is no lower one.
        options |= {"epsilon_low": 1.0, "epsilon_high": epsilon_high - 1}
    elif surrogate == "sapo":
        options |= {
            "tau_pos": given["sapo_temperature_pos"],
            "tau_neg": given["sapo_temperature_neg"],
        }
    else:
        for sign in ("pos", "neg"):
            options[f"vespo_k_{sign}"] = given[f"vespo_k_{sign}"]
            options[f"vespo_lambda_{sign}"] = max(given[f"vespo_lambda_{sign}"], SMALLEST_LAMBDA)
    if loss_type == "dr_grpo":
        options["max_length"] = given["max_completion_length"]
    # VESPO looks at the level through the ratio of the bias-corrected KL alone.
    if surrogate != "vespo" or (bias_corrected and given["beta"]):
        options["ratio"] = level
    if given["entropy_coef"]:
        options |= {"entropy_coef": given["entropy_coef"], "entropy_reduction": "token_mean"}
    return Objective(
        beta=given["beta"],
        kl="k3_unbiased" if bias_corrected else "k3",
        top_entropy_quantile=given["top_entropy_quantile"],
        off_policy_threshold=given["off_policy_mask_threshold"],
        **options,
    )


def patch() -> None:
    """Give TRL's other trainers (RLOO, asynchronous GRPO, DPO, ...) the fused head. For the whole process; call it once.

    Where they ask it for more than log-probs and entropy (SFT, KTO), or under ZeRO-3, TRL's own head runs, and a
    warning says so once.

    Raises:
        ImportError: no TRL, or another version than 1.16.
    """
    _require()
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
        """(log-probs, entropy or None, None, None, None) of (N, D) hidden states, (V, D) weights, (N,) targets.

        `chunk_size` is that of TRL's kernel; ours has its own.
        """
        from trl.kernels import ChunkedLogProbFunction

        reason = None
        others = sorted(set(outputs) - {"log_probs", "entropy"})
        if others:
            reason = f"it is asked for {', '.join(others)}"
        elif hasattr(weight, "ds_id"):
            reason = "the head is sharded by ZeRO-3"
        if reason is not None:
            warn_once(f"grpo_fast: TRL's own log-prob head runs, since {reason}")
            return ChunkedLogProbFunction.apply(
                *(hidden, weight, bias, targets, temperature, chunk_size),
                *(final_logit_softcapping, logit_scale, outputs),
            )
        with_entropy = "entropy" in outputs
        with no_autocast(hidden) as hidden:
            scored = _seam.linear_logprob(
                hidden,
                weight,
                targets,
                bias=bias,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                temperature=temperature,
                return_entropy=with_entropy,
            )
        logps, entropy = scored if with_entropy else (scored, None)
        return logps, entropy, None, None, None


class no_autocast:
    """`with no_autocast(hidden) as hidden`: the hidden states as autocast would have them, and autocast off."""

    def __init__(self, hidden: Tensor) -> None:
        kind = hidden.device.type
        enabled = torch.is_autocast_enabled(kind)
        self.hidden = hidden.to(torch.get_autocast_dtype(kind)) if enabled else hidden
        self.context = torch.autocast(kind, enabled=False)

    def __enter__(self) -> Tensor:
        self.context.__enter__()
        return self.hidden

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


_WARNED: set[str] = set()


def warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=3)


def _require() -> ModuleType:
    """TRL, of the version this was written for."""
    wanted = f"grpo_fast.integrations.trl needs trl {SUPPORTED} (pip install 'grpo-fast[trl]')"
    try:
        found = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ImportError(f"{wanted}; it is not installed") from None
    if found.split(".")[:2] != SUPPORTED.split("."):
        raise ImportError(f"{wanted}; found {found}")
    import trl

    return trl


def __getattr__(name: str) -> Any:
    """`GRPOTrainer`, made when it is first asked for: `objective` has to work without TRL."""
    if name == "GRPOTrainer":
        _require()
        from grpo_fast.integrations._trl_trainer import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
