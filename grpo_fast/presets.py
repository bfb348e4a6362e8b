"""The losses of papers and trainers by their names, as options of `grpo_fast.Objective`.

A plain name means the paper's loss. "<trainer>/<name>" means the loss that this trainer computes
under this name with its own defaults, as read in the release that `TRAINERS` names. The same name
may mean different things: verl clamps every log-ratio to [-20, 20] and always has dual clip,
CISPO's bound is a distance from 1 in most trainers and the bound itself in TRL, and so on. Some
parts are no options of `Objective`, and the caller passes them: denominators (`num_items`),
importance weights, token weights. `CALLER` lists these.
"""

from typing import Any

Options = dict[str, Any]

PAPERS: dict[str, Options] = {
    "grpo": {"reduction": "sequence_mean", "beta": 0.04, "kl": "k3"},
    "dapo": {"reduction": "token_mean", "epsilon_high": 0.28},
    "dr_grpo": {"reduction": "fixed_length"},
    "bnpo": {"reduction": "token_mean"},
    "cispo": {
        "surrogate": "cispo",
        "reduction": "token_mean",
        "epsilon_low": 1.0,
        "epsilon_high": 4.0,
    },
    "sapo": {"surrogate": "sapo"},
    "gspo": {"ratio": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "gmpo": {"surrogate": "gmpo", "epsilon_low": 0.4, "epsilon_high": 0.4},
    "vespo": {"surrogate": "vespo", "reduction": "token_mean"},
    "gpg": {"surrogate": "reinforce", "reduction": "token_mean"},
    "dppo_tv": {"surrogate": "dppo_tv", "reduction": "token_mean"},
    "dppo_kl": {"surrogate": "dppo_kl", "reduction": "token_mean"},
    "dro": {"surrogate": "dro", "reduction": "token_mean", "quadratic_coef": 0.1},
    "topr": {"surrogate": "topr", "reduction": "token_mean"},
}

# The releases whose sources were read. A preset means what this release computes.
TRAINERS = {
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

# Trainers whose entropy bonus is a mean over tokens, whatever the reduction, if `entropy_coef` is
# given.
ENTROPY_BY_TOKENS = ("trl",)
# k3 with the clamps of verl, SkyRL, xtuner and NeMo-RL. It has no effect until `beta` is given.
GUARDED_K3: Options = {"kl": "k3", "kl_gap_clip": 20.0, "kl_value_clip": 10.0}
# -r A without clipping: a ratio is never below 0 and never reaches the upper bound.
UNCLIPPED: Options = {"epsilon_low": 1.0, "epsilon_high": 1e30}
TOKEN_MEAN: Options = {"reduction": "token_mean"}
CLAMPED: Options = {"log_ratio_clip": 20.0}
RATIO_DPPO: Options = {"dppo_value": "ratio", "ratio_cap": None}

# TRL multiplies its KL by the ratio unless told not to (`use_bias_correction_kl`).
_TRL: dict[str, Options] = {
    "grpo": {"reduction": "sequence_mean"},
    "bnpo": {"reduction": "token_mean"},
    "dapo": {"reduction": "token_mean"},
    "dr_grpo": {"reduction": "fixed_length"},
    "luspo": {"reduction": "sequence_sum"},
    # TRL's epsilon_high is the bound itself, ours is its distance from 1. TRL's default is 0.2.
    "cispo": {
        "surrogate": "cispo",
        "reduction": "token_mean",
        "epsilon_low": 1.0,
        "epsilon_high": -0.8,
    },
    "sapo": {"surrogate": "sapo", "reduction": "sequence_mean"},
    "vespo": {"surrogate": "vespo", "reduction": "token_mean"},
}
TRL = {
    f"{loss_type}{level}": {**options, "kl": "k3_unbiased", **ratio}
    for loss_type, options in _TRL.items()
    for level, ratio in (("", {}), ("/sequence", {"ratio": "sequence"}))
}

_VERL = {**TOKEN_MEAN, **GUARDED_K3}
# verl's `clip_ratio_c`, 3 by default, also caps the ratio of DPPO.
_VERL_DPPO: Options = {**_VERL, **CLAMPED, "ratio_cap": 3.0}
VERL: dict[str, Options] = {
    "vanilla": {**_VERL, **CLAMPED, "dual_clip": 3.0},
    "gspo": {**_VERL, "ratio": "sequence_token", "log_ratio_max": 10.0},
    "sapo": {"surrogate": "sapo", **CLAMPED, **GUARDED_K3},
    "gpg": {**_VERL, "surrogate": "reinforce"},
    "cispo": {**_VERL, **CLAMPED, "surrogate": "cispo"},
    "dro": {**_VERL, "surrogate": "dro"},
    "geo_mean": {"surrogate": "gmpo", **GUARDED_K3},
    "dppo_tv": {**_VERL_DPPO, "surrogate": "dppo_tv"},
    "dppo_kl": {**_VERL_DPPO, "surrogate": "dppo_kl"},
    "clip_cov": _VERL,
    "kl_cov": {**TOKEN_MEAN, **UNCLIPPED, "kl": "abs", "beta": 0.1},
}

_SKYRL = {**TOKEN_MEAN, **GUARDED_K3}
SKYRL: dict[str, Options] = {
    "regular": {**_SKYRL, **CLAMPED},
    "dual_clip": {**_SKYRL, **CLAMPED, "dual_clip": 3.0},
    "gspo": {**_SKYRL, "ratio": "sequence_token", "log_ratio_max": 10.0},
    "sapo": {**_SKYRL, **CLAMPED, "surrogate": "sapo"},
    "cispo": {
        **_SKYRL,
        **CLAMPED,
        "surrogate": "cispo",
        "epsilon_low": 1.0,
        "epsilon_high": 4.0,
    },
    "rollout_is": {**_SKYRL, **CLAMPED, "surrogate": "rollout_is"},
    "dppo_tv": {**_SKYRL, **CLAMPED, **RATIO_DPPO, "surrogate": "dppo_tv"},
    "dppo_kl": {**_SKYRL, **CLAMPED, **RATIO_DPPO, "surrogate": "dppo_kl"},
    "importance_sampling": {**_SKYRL, **UNCLIPPED},
    "clip_cov": _SKYRL,
    "kl_cov": {**TOKEN_MEAN, **UNCLIPPED, "kl": "abs", "beta": 1.0},
}

OPENRLHF: dict[str, Options] = {
    "ppo": {**TOKEN_MEAN, **CLAMPED},
    "gspo": {"ratio": "sequence"},
}

PRIME_RL: dict[str, Options] = {
    "default": {"surrogate": "dppo_tv", **RATIO_DPPO, **TOKEN_MEAN, "quadratic_coef": 1e-3},
    "ipo": {
        "surrogate": "ipo",
        **TOKEN_MEAN,
        "epsilon_low": 0.1,
        "epsilon_high": 0.1,
        "quadratic_coef": 1e-3,
    },
}

SLIME: dict[str, Options] = {
    "grpo": {"kl": "k1"},
    "gspo": {"kl": "k1", "ratio": "sequence"},
    "cispo": {"kl": "k1", "surrogate": "cispo"},
}

# The gradient of NeMo-RL's KL term also goes through the sampling probability: for k3 it is that of
# k2.
_NEMO_RL: Options = {**GUARDED_K3, "beta": 0.01, "kl_gradient": "k2_clipped"}
NEMO_RL: dict[str, Options] = {
    "grpo": {**TOKEN_MEAN, **_NEMO_RL},
    "gspo": {"ratio": "sequence", **_NEMO_RL},
    "cispo": {"surrogate": "cispo", **TOKEN_MEAN, **_NEMO_RL},
    "reinforce": {"surrogate": "reinforce", **TOKEN_MEAN, **_NEMO_RL},
}

AREAL: dict[str, Options] = {
    "grpo": TOKEN_MEAN,
    "gspo": {**TOKEN_MEAN, "ratio": "sequence"},
    "sapo": {**TOKEN_MEAN, "surrogate": "sapo"},
    "cispo": {**TOKEN_MEAN, "surrogate": "cispo", "epsilon_low": 1.0, "epsilon_high": 4.0},
}

XTUNER: dict[str, Options] = {
    "vanilla": {**TOKEN_MEAN, **CLAMPED, "dual_clip": 3.0, **GUARDED_K3},
}

PRESETS: dict[str, Options] = PAPERS | {
    f"{trainer}/{name}": options
    for trainer, table in {
        "trl": TRL,
        "verl": VERL,
        "skyrl": SKYRL,
        "openrlhf": OPENRLHF,
        "prime_rl": PRIME_RL,
        "slime": SLIME,
        "nemo_rl": NEMO_RL,
        "areal": AREAL,
        "xtuner": XTUNER,
    }.items()
    for name, options in table.items()
}

# Arguments that the caller passes besides the options, to compute what the trainer computes; the
# docs print them beside the preset.
_TRL_ITEMS = "`num_items` from the whole generation batch: [below](#in-trls-words)"
CALLER: dict[str, str] = {
    "dr_grpo": "`max_length`",
    "trl/dr_grpo": "`max_length=max_completion_length`",
    "trl/dr_grpo/sequence": "`max_length=max_completion_length`",
    **{
        f"trl/{name}{level}": _TRL_ITEMS
        for name in ("dapo", "cispo", "vespo")
        for level in ("", "/sequence")
    },
    "verl/dro": "`quadratic_coef=policy_loss.dro_beta`, which verl has no default for",
    "verl/clip_cov": "token weights that drop a random share of the tokens of high covariance",
    "verl/kl_cov": "`ref_logps`: the old log-probs where the covariance is highest, else `logps.detach()`",
    "skyrl/clip_cov": "as `verl/clip_cov`",
    "skyrl/kl_cov": "as `verl/kl_cov`",
    "skyrl/cispo": '`old_logps` of the sampler where `cispo_anchor` is "rollout"',
    "skyrl/rollout_is": "`old_logps` of the sampler",
    "skyrl/importance_sampling": "`num_items=1`: a sum",
    "skyrl/dppo_tv": "`old_logps` of the sampler",
    "skyrl/dppo_kl": "`old_logps` of the sampler",
    "prime_rl/default": "`old_logps` of the sampler; `num_items` of the global batch",
    "prime_rl/ipo": "`old_logps` of the sampler; `num_items` of the global batch",
    "areal/cispo": "AReaL has no default for the upper bound; these are the paper's",
    "areal/gspo": "each advantage replaced by the mean of its sequence",
    "xtuner/vanilla": "`token_weights`, which hold the denominator, with `num_items=1`",
}
