"""The translation of TRL's loss options into an `Objective`; it works without TRL."""

from typing import Any

from grpo_fast import presets
from grpo_fast.integrations.shared.options import read
from grpo_fast.objective import Objective

LOSS_TYPES = tuple(name for name in presets.TRL if "/" not in name)
# The loss types that TRL divides by num_items_in_batch; the others are means over the micro-batch.
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
    """Return what TRL optimises, given a `GRPOConfig` or any object with its attributes.

    A missing attribute has TRL's default. The denominator is not part of the objective. Where
    `args.loss_type` is in `BY_ITEMS`, pass it to the loss as `num_items`. TRL divides the other losses by the
    gradient accumulation steps. An adaptive entropy coefficient changes during training; the objective has
    the one at the start.

    Raises:
        ValueError: the loss type or the level is unknown, `beta` is negative, or the loss type does not use
            an option.
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
