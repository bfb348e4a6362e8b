"""Configurations and a batch of NeMo-RL, for the tests of its adapter."""

from types import SimpleNamespace

import torch

OPTIONS = {
    "loss_type": SimpleNamespace(name="TOKEN_LEVEL"),
    "disable_ppo_ratio": False,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.28,
    "ratio_clip_c": None,
    "reference_policy_kl_penalty": 0.0,
    "reference_policy_kl_type": "k3",
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False,
    "force_on_policy_ratio": False,
    "sequence_level_importance_ratios": False,
    "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}
BY_TOKEN = OPTIONS["loss_type"]
BY_SEQUENCE = {"loss_type": SimpleNamespace(name="SEQUENCE_LEVEL")}
GSPO = BY_SEQUENCE | {"sequence_level_importance_ratios": True}


RATIO = "truncated_importance_sampling_ratio"


def corrected(kind, low, high, **more):
    return {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": kind,
        "truncated_importance_sampling_ratio_min": low,
        "truncated_importance_sampling_ratio": high,
        **more,
    }


CASES = {
    "grpo": {},
    "kl": {"reference_policy_kl_penalty": 0.3},
    "kl-open": {
        "reference_policy_kl_penalty": 0.3,
        "kl_input_clamp_value": None,
        "kl_output_clamp_value": None,
    },
    "dual": {"ratio_clip_c": 3.0},
    "sequences": BY_SEQUENCE | {"reference_policy_kl_penalty": 0.3},
    "gspo": GSPO | {"reference_policy_kl_penalty": 0.3},
    "cispo": {"use_cispo": True},
    "reinforce": {"disable_ppo_ratio": True, "reference_policy_kl_penalty": 0.3},
    "on-policy": {"force_on_policy_ratio": True},
    "raw": {"use_importance_sampling_correction": True},
    "tis": corrected("tis", None, 1.2),
    "icepop": corrected("icepop", 0.7, 1.3),
    "seq-mask-tis": corrected("seq-mask-tis", 0.85, 1.15),
    "gspo-tis": corrected("tis", 0.1, 1.5, **GSPO),
    "gspo-icepop": corrected("icepop", 0.99, 2.0, **GSPO),
    "in the rewards": {"reference_policy_kl_penalty": 0.3, "use_kl_in_reward": True},
    "positives": {"positive_example_nll_weight": 0.2},
}
SEQS, TOKS = torch.tensor(7.0), torch.tensor(40.0)


def with_reference(b):
    """A batch with the log-probs of the reference, some of them far away."""
    b.ref = b.logp + torch.randn_like(b.logp)
    b.ref[0, :3] = b.logp[0, :3] + torch.tensor([3.0, 21.0, -21.0], device=b.logp.device)
    return b


def shifted(x):
    """NeMo-RL's tensors have a column more in front."""
    return torch.cat([torch.full_like(x[:, :1], 0), x], 1)


WHOLE, PARTS = [1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 0.3, 0.5, 0.25, 0.0]


def data_of(b, sample_mask=WHOLE):
    sample_mask = torch.tensor(sample_mask, device=b.A.device)
    return {
        "token_mask": shifted(b.mask.float()),
        "sample_mask": sample_mask,
        "advantages": shifted(b.A),
        "prev_logprobs": shifted(b.old),
        "generation_logprobs": shifted(b.rollout),
        "reference_policy_logprobs": shifted(b.ref),
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], device=b.A.device),
    }
