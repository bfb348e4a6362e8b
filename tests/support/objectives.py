"""The objectives that the tests of every loss run."""

import pytest

from grpo_fast import Objective

OBJECTIVES = {
    "default": Objective(),
    "k1": Objective(beta=0.3, kl="k1"),
    "abs": Objective(beta=0.3, kl="abs"),
    "k2": Objective(beta=0.3, kl="k2"),
    "k3": Objective(beta=0.3, kl="k3"),
    "k3_unbiased": Objective(beta=0.3, kl="k3_unbiased"),
    "token_mean": Objective(reduction="token_mean", epsilon_high=0.28),
    "sequence_sum": Objective(reduction="sequence_sum"),
    "fixed_length": Objective(reduction="fixed_length", max_length=50),
    "delta": Objective(delta=1.5),
    "delta inside the clip range": Objective(delta=1.05, epsilon_high=0.3),
    "dual_clip": Objective(dual_clip=1.25, beta=0.1),
    "entropy": Objective(entropy_coef=0.05),
    "cispo": Objective(surrogate="cispo", epsilon_low=1.0, epsilon_high=0.3),
    "cispo with TRL's default bound": Objective(
        surrogate="cispo", epsilon_low=1.0, epsilon_high=-0.8
    ),
    "sapo": Objective(surrogate="sapo", tau_pos=1.0, tau_neg=1.5, beta=0.1),
    "reinforce": Objective(surrogate="reinforce", reduction="token_mean"),
    "dppo_tv": Objective(surrogate="dppo_tv", epsilon_low=0.02, epsilon_high=0.03, ratio_cap=1.5),
    "dppo_tv without a cap": Objective(surrogate="dppo_tv", ratio_cap=None),
    "dppo_kl": Objective(surrogate="dppo_kl", epsilon_low=0.01, epsilon_high=0.02, beta=0.1),
    "ipo": Objective(surrogate="ipo", epsilon_low=0.02, epsilon_high=0.05, quadratic_coef=0.3),
    "dro": Objective(surrogate="dro", quadratic_coef=0.5, entropy_coef=0.01),
    "rollout_is": Objective(surrogate="rollout_is", epsilon_low=0.3, epsilon_high=0.2),
    "dppo_tv, ratio": Objective(
        surrogate="dppo_tv",
        epsilon_low=0.02,
        epsilon_high=0.03,
        dppo_value="ratio",
        quadratic_coef=0.3,
        ratio_cap=1.4,
    ),
    "dppo_kl, ratio": Objective(
        surrogate="dppo_kl", epsilon_low=0.01, dppo_value="ratio", ratio_cap=None
    ),
    "k1+": Objective(beta=0.3, kl="k1", kl_gradient="k2"),
    "abs+": Objective(beta=0.3, kl="abs", kl_gradient="k2"),
    "k3+": Objective(beta=0.3, kl="k3", kl_gradient="k2", kl_gap_clip=0.3, kl_value_clip=0.05),
    "k3 where not clamped": Objective(
        beta=0.3, kl="k3", kl_gradient="k2_clipped", kl_gap_clip=0.5, kl_value_clip=0.05
    ),
    "topr": Objective(surrogate="topr", topr_weight_neg=0.5, beta=0.1),
    "log_ratio_max": Objective(log_ratio_max=0.1, beta=0.2, kl="k3_unbiased"),
    "top entropy": Objective(top_entropy_quantile=0.4, beta=0.1),
    "top entropy, gspo": Objective(top_entropy_quantile=0.6, ratio="sequence", entropy_coef=0.1),
    "entropy by tokens": Objective(entropy_coef=0.1, entropy_reduction="token_mean"),
    "vespo, top entropy": Objective(
        surrogate="vespo",
        top_entropy_quantile=0.5,
        entropy_coef=0.1,
        entropy_reduction="token_mean",
    ),
    "log_ratio_clip": Objective(log_ratio_clip=0.15, beta=0.2, kl="k3_unbiased"),
    "k3 clamped": Objective(beta=0.3, kl_gap_clip=0.5, kl_value_clip=0.05),
    "k3_unbiased clamped": Objective(
        beta=0.3, kl="k3_unbiased", kl_gap_clip=0.5, kl_value_clip=0.05
    ),
    "gspo": Objective(ratio="sequence", epsilon_low=0.05, epsilon_high=0.08, beta=0.1),
    "gspo, unbiased KL": Objective(ratio="sequence", epsilon_low=0.05, beta=0.2, kl="k3_unbiased"),
    "gspo-token": Objective(ratio="sequence_token", epsilon_low=0.05, reduction="token_mean"),
    "gspo, clamped": Objective(ratio="sequence", log_ratio_clip=0.05, reduction="sequence_sum"),
    "cispo of sequences": Objective(surrogate="cispo", ratio="sequence", epsilon_high=0.05),
    "sapo of sequences": Objective(surrogate="sapo", ratio="sequence", entropy_coef=0.02),
    "gmpo": Objective(surrogate="gmpo", epsilon_low=0.2, epsilon_high=0.15, beta=0.1),
    "vespo": Objective(surrogate="vespo", reduction="token_mean", beta=0.1),
    "off-policy mask": Objective(off_policy_threshold=0.02, beta=0.1, dual_clip=2.0),
    "off-policy mask, gspo": Objective(
        off_policy_threshold=0.0, ratio="sequence", epsilon_low=0.05
    ),
    "everything": Objective(beta=0.2, entropy_coef=-0.1, dual_clip=1.5, reduction="token_mean"),
}

by_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
