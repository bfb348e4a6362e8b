"""Each preset's options as literals, from the papers and from the trainers' sources with their defaults.

Not taken from `grpo_fast.presets`: another number there, or in the defaults of `Objective`, fails here.
"""

import pytest

from grpo_fast import Objective
from grpo_fast.objective import OPTIONS
from grpo_fast.presets import CALLER, ENTROPY_BY_TOKENS, PAPERS, PRESETS, TRAINERS

# What an option is where neither paper nor trainer sets it.
NEUTRAL = {
    "surrogate": "clip",
    "ratio": "token",
    "reduction": "sequence_mean",
    "max_length": None,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "delta": None,
    "dual_clip": None,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "ratio_cap": 20.0,
    "dppo_value": "logp",
    "quadratic_coef": 0.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "topr_weight_pos": 1.0,
    "topr_weight_neg": 1.0,
    "top_entropy_quantile": 1.0,
    "off_policy_threshold": None,
    "log_ratio_clip": None,
    "log_ratio_max": None,
    "beta": 0.0,
    "kl": "k3",
    "kl_gap_clip": None,
    "kl_value_clip": None,
    "kl_gradient": "own",
    "entropy_coef": 0.0,
    "entropy_reduction": "same",
}
TOKENS = {"reduction": "token_mean"}

PAPER = {
    # 2402.03300: beta 0.04, Schulman's k3, each sequence a mean.
    "grpo": {"beta": 0.04},
    # 2503.14476: clip-higher 0.28.
    "dapo": TOKENS | {"epsilon_high": 0.28},
    # 2503.20783: a constant in place of the length.
    "dr_grpo": {"reduction": "fixed_length", "max_length": 9},
    "bnpo": TOKENS,
    # 2506.13585: no lower bound, the upper at 5.
    "cispo": TOKENS | {"surrogate": "cispo", "epsilon_low": 1.0, "epsilon_high": 4.0},
    # 2511.20347: temperatures 1 and 1.05.
    "sapo": {"surrogate": "sapo"},
    # 2507.18071: 3e-4 and 4e-4.
    "gspo": {"ratio": "sequence", "epsilon_low": 0.0003, "epsilon_high": 0.0004},
    # 2507.20673: e^-0.4 to e^0.4.
    "gmpo": {"surrogate": "gmpo", "epsilon_low": 0.4, "epsilon_high": 0.4},
    # 2602.10693: (k, lambda) of (2, 3) and (3, 2).
    "vespo": TOKENS | {"surrogate": "vespo"},
    "gpg": TOKENS | {"surrogate": "reinforce"},
    # 2602.04879: divergences within 0.2, ratios up to 20.
    "dppo_tv": TOKENS | {"surrogate": "dppo_tv"},
    "dppo_kl": TOKENS | {"surrogate": "dppo_kl"},
    "dro": TOKENS | {"surrogate": "dro", "quadratic_coef": 0.1},
    "topr": TOKENS | {"surrogate": "topr"},
}

# TRL: GRPOConfig's defaults; the KL times the ratio (use_bias_correction_kl), cispo capped at 0.2 itself.
UNBIASED = {"kl": "k3_unbiased"}
TRL = {
    "trl/grpo": UNBIASED,
    "trl/bnpo": UNBIASED | TOKENS,
    "trl/dapo": UNBIASED | TOKENS,
    "trl/dr_grpo": UNBIASED | {"reduction": "fixed_length", "max_length": 9},
    "trl/luspo": UNBIASED | {"reduction": "sequence_sum"},
    "trl/cispo": UNBIASED
    | TOKENS
    | {"surrogate": "cispo", "epsilon_low": 1.0, "epsilon_high": -0.8},
    "trl/sapo": UNBIASED | {"surrogate": "sapo"},
    "trl/vespo": UNBIASED | TOKENS | {"surrogate": "vespo"},
}
TRL |= {f"{name}/sequence": options | {"ratio": "sequence"} for name, options in TRL.items()}

# kl_penalty "low_var_kl" of verl, SkyRL, xtuner; NeMo-RL's default.
CLAMPED_KL = {"kl_gap_clip": 20.0, "kl_value_clip": 10.0}
BY_20 = {"log_ratio_clip": 20.0}
UNBOUNDED = {"epsilon_low": 1.0, "epsilon_high": 1e30}

# ActorConfig: clip_ratio 0.2, clip_ratio_c 3, tau 1 and 1.05, loss_agg_mode token-mean, ppo_kl_coef 0.1.
VERL = {
    "verl/vanilla": TOKENS | CLAMPED_KL | BY_20 | {"dual_clip": 3.0},
    "verl/gspo": TOKENS | CLAMPED_KL | {"ratio": "sequence_token", "log_ratio_max": 10.0},
    "verl/sapo": CLAMPED_KL | BY_20 | {"surrogate": "sapo"},
    "verl/gpg": TOKENS | CLAMPED_KL | {"surrogate": "reinforce"},
    "verl/cispo": TOKENS | CLAMPED_KL | BY_20 | {"surrogate": "cispo"},
    "verl/dro": TOKENS | CLAMPED_KL | {"surrogate": "dro"},
    "verl/geo_mean": CLAMPED_KL | {"surrogate": "gmpo"},
    "verl/dppo_tv": TOKENS | CLAMPED_KL | BY_20 | {"surrogate": "dppo_tv", "ratio_cap": 3.0},
    "verl/dppo_kl": TOKENS | CLAMPED_KL | BY_20 | {"surrogate": "dppo_kl", "ratio_cap": 3.0},
    "verl/clip_cov": TOKENS | CLAMPED_KL,
    "verl/kl_cov": TOKENS | UNBOUNDED | {"kl": "abs", "beta": 0.1},
}

# AlgorithmConfig: eps_clip 0.2, clip_ratio_c 3, cispo_eps_clip 1 and 4, delta 0.2, ppo_kl_coef 1.
PLAIN_RATIO = {"dppo_value": "ratio", "ratio_cap": None}
SKYRL = {
    "skyrl/regular": TOKENS | CLAMPED_KL | BY_20,
    "skyrl/dual_clip": TOKENS | CLAMPED_KL | BY_20 | {"dual_clip": 3.0},
    "skyrl/gspo": TOKENS | CLAMPED_KL | {"ratio": "sequence_token", "log_ratio_max": 10.0},
    "skyrl/sapo": TOKENS | CLAMPED_KL | BY_20 | {"surrogate": "sapo"},
    "skyrl/cispo": TOKENS
    | CLAMPED_KL
    | BY_20
    | {"surrogate": "cispo", "epsilon_low": 1.0, "epsilon_high": 4.0},
    "skyrl/rollout_is": TOKENS | CLAMPED_KL | BY_20 | {"surrogate": "rollout_is"},
    "skyrl/dppo_tv": TOKENS | CLAMPED_KL | BY_20 | PLAIN_RATIO | {"surrogate": "dppo_tv"},
    "skyrl/dppo_kl": TOKENS | CLAMPED_KL | BY_20 | PLAIN_RATIO | {"surrogate": "dppo_kl"},
    "skyrl/importance_sampling": TOKENS | CLAMPED_KL | UNBOUNDED,
    "skyrl/clip_cov": TOKENS | CLAMPED_KL,
    "skyrl/kl_cov": TOKENS | UNBOUNDED | {"kl": "abs", "beta": 1.0},
}

# ClippedPGLossConfig of 0.7.0: penalty 0.01 by k3 with both clamps, its gradient also through the sampling
# probability (that of k2 within the clamps); ratio_clip_min and _max 0.2, no dual clip.
NEMO_KL = CLAMPED_KL | {"beta": 0.01, "kl_gradient": "k2_clipped"}
OTHERS = {
    # PolicyLoss of 0.11.2: eps_clip 0.2; log-ratios within 20 for ppo alone; gspo a mean of sequences.
    "openrlhf/ppo": TOKENS | BY_20,
    "openrlhf/gspo": {"ratio": "sequence"},
    # 0.8.0: dppo_mask 0.2, ipo_threshold 0.1, kl_tau 1e-3.
    "prime_rl/default": TOKENS | PLAIN_RATIO | {"surrogate": "dppo_tv", "quadratic_coef": 0.001},
    "prime_rl/ipo": TOKENS
    | {"surrogate": "ipo", "epsilon_low": 0.1, "epsilon_high": 0.1, "quadratic_coef": 0.001},
    # --eps-clip 0.2, --kl-loss-type k1, a mean per sample.
    "slime/grpo": {"kl": "k1"},
    "slime/gspo": {"kl": "k1", "ratio": "sequence"},
    "slime/cispo": {"kl": "k1", "surrogate": "cispo"},
    "nemo_rl/grpo": TOKENS | NEMO_KL,
    "nemo_rl/gspo": NEMO_KL | {"ratio": "sequence"},
    "nemo_rl/cispo": TOKENS | NEMO_KL | {"surrogate": "cispo"},
    "nemo_rl/reinforce": TOKENS | NEMO_KL | {"surrogate": "reinforce"},
    # eps_clip 0.2, sapo_tau 1 and 1.05; for CISPO eps_clip 1 and eps_clip_higher 4 are recommended.
    "areal/grpo": TOKENS,
    "areal/gspo": TOKENS | {"ratio": "sequence"},
    "areal/sapo": TOKENS | {"surrogate": "sapo"},
    "areal/cispo": TOKENS | {"surrogate": "cispo", "epsilon_low": 1.0, "epsilon_high": 4.0},
    # clip_ratio_c 3, log_prob_diff within 20.
    "xtuner/vanilla": TOKENS | CLAMPED_KL | BY_20 | {"dual_clip": 3.0},
}
VALUES = PAPER | TRL | VERL | SKYRL | OTHERS


def test_every_preset_has_its_values_here():
    assert set(VALUES) == set(PRESETS)
    assert set(PAPER) == set(PAPERS)
    assert set(NEUTRAL) == set(OPTIONS)


@pytest.mark.parametrize("name", VALUES)
def test_the_values_of_a_preset(name):
    extra = {"max_length": 9} if "dr_grpo" in name else {}
    objective = Objective.preset(name, **extra)
    found = {option: getattr(objective, option) for option in NEUTRAL}
    assert found == NEUTRAL | VALUES[name]


@pytest.mark.parametrize("name", VALUES)
def test_the_entropy_of_a_preset(name):
    """TRL's bonus is a mean over tokens, whatever the loss is; the others reduce it as the rest."""
    extra = {"max_length": 9} if "dr_grpo" in name else {}
    objective = Objective.preset(name, entropy_coef=0.01, **extra)
    want = "token_mean" if name.startswith("trl/") else "same"
    assert objective.entropy_reduction == want
    given = Objective.preset(name, entropy_coef=0.01, entropy_reduction="same", **extra)
    assert given.entropy_reduction == "same"


def test_the_releases_that_were_read():
    assert TRAINERS == {
        "trl": "TRL 1.15 and 1.16",
        "verl": "verl 0.9.1",
        "skyrl": "SkyRL, August 2026",
        "openrlhf": "OpenRLHF 0.11.2",
        "prime_rl": "prime-rl 0.8.0",
        "slime": "slime, August 2026",
        "nemo_rl": "NeMo-RL 0.7.0",
        "areal": "AReaL 1.0.4, CISPO of 2.0",
        "xtuner": "xtuner, August 2026",
    }
    assert ENTROPY_BY_TOKENS == ("trl",)


def test_what_else_a_preset_asks_for():
    """Some presets also need something of the caller that is no option; these, and no others."""
    items = {f"trl/{x}{y}" for x in ("dapo", "cispo", "vespo") for y in ("", "/sequence")}
    assert {
        name for name, remark in CALLER.items() if "`num_items` from the whole" in remark
    } == items
    assert {name for name, remark in CALLER.items() if remark.startswith("`max_length")} == {
        "dr_grpo",
        "trl/dr_grpo",
        "trl/dr_grpo/sequence",
    }
    of_the_sampler = {name for name, remark in CALLER.items() if "of the sampler" in remark}
    assert of_the_sampler == {
        *("skyrl/cispo", "skyrl/rollout_is", "skyrl/dppo_tv", "skyrl/dppo_kl"),
        *("prime_rl/default", "prime_rl/ipo"),
    }
    assert set(CALLER) - items - of_the_sampler - {
        "dr_grpo",
        "trl/dr_grpo",
        "trl/dr_grpo/sequence",
    } == {
        *("verl/dro", "verl/clip_cov", "verl/kl_cov", "skyrl/clip_cov", "skyrl/kl_cov"),
        *("skyrl/importance_sampling", "areal/cispo", "areal/gspo", "xtuner/vanilla"),
    }
