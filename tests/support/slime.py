"""A batch, arguments and sums of slime, for the tests of slime's and miles' adapters."""

import torch

V = 11
PROMPTS, RESPONSES, PADDING = [2, 1, 3], [4, 1, 3], 2
TOTALS = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]

ARGS = {
    "advantage_estimator": "grpo",
    "eps_clip": 0.2,
    "eps_clip_high": None,
    "eps_clip_c": None,
    "entropy_coef": 0.0,
    "use_opsm": False,
    "use_kl_loss": False,
    "kl_loss_type": "k1",
    "kl_loss_coef": 0.1,
    "use_unbiased_kl": False,
    "use_tis": False,
    "get_mismatch_metrics": False,
    "custom_tis_function_path": None,
    "use_rollout_logprobs": False,
    "calculate_per_token_loss": False,
    "recompute_loss_function": False,
    "rollout_temperature": 0.8,
}

# What miles has besides.
MILES = {
    "qkv_format": "thd",
    "true_on_policy_mode": False,
    "skip_actor_forward_only": False,
    "observe_training_entropy": False,
    "custom_pg_loss_reducer_function_path": None,
}

# Changes of these arguments, by name.
SLIME_CASES = {
    "grpo": {},
    "dual": {"eps_clip_high": 0.3, "eps_clip_c": 1.5},
    "gspo": {"advantage_estimator": "gspo"},
    "cispo": {"advantage_estimator": "cispo"},
    "opsm": {"use_opsm": True, "opsm_delta": 0.02},
    "entropy": {"entropy_coef": 0.05},
    "k1": {"use_kl_loss": True},
    "k3": {"use_kl_loss": True, "kl_loss_type": "k3"},
    "low_var_kl": {"use_kl_loss": True, "kl_loss_type": "low_var_kl"},
    "unbiased": {"use_kl_loss": True, "kl_loss_type": "k3", "use_unbiased_kl": True},
    "rollout": {"use_rollout_logprobs": True},
}
MILES_CASES = {
    "grpo": {},
    "dual": {"eps_clip_high": 0.3, "eps_clip_c": 1.5},
    "gspo": {"advantage_estimator": "gspo"},
    "entropy": {"entropy_coef": 0.05},
    "observed entropy": {"observe_training_entropy": True},
    "gspo dual": {"advantage_estimator": "gspo", "eps_clip_c": 1.5},
    "opsm": {"use_opsm": True, "opsm_delta": 0.02},
    "low_var_kl": {"use_kl_loss": True, "kl_loss_type": "low_var_kl"},
    "k1": {"use_kl_loss": True, "kl_loss_type": "k1"},
    "k2": {"use_kl_loss": True, "kl_loss_type": "k2", "entropy_coef": 0.05},
    "k3": {"use_kl_loss": True, "kl_loss_type": "k3"},
    "unbiased": {"use_kl_loss": True, "kl_loss_type": "k3", "use_unbiased_kl": True},
    "gspo k2": {"advantage_estimator": "gspo", "use_kl_loss": True, "kl_loss_type": "k2"},
    "rollout": {"use_rollout_logprobs": True},
    "own log-probs": {"true_on_policy_mode": True},
    "padded": {"qkv_format": "bshd"},
}

MASKS = [torch.tensor([1.0, 0, 1, 1]), torch.tensor([0.0]), torch.tensor([1.0, 1, 1])]
# Masks of fractions, which trainers multiply with.
FRACTIONS = [
    torch.tensor([1.0, 0, 0.5, 0.25]),
    torch.tensor([0.0]),
    torch.tensor([0.3, 1.0, 0.6]),
]


def scored(logits, b):
    """(log-probs, entropies) of the responses, cut as slime cuts them."""
    rows, start = [], 0
    for total, response in zip(TOTALS, RESPONSES, strict=True):
        rows += range(start + total - response - 1, start + total - 1)
        start += total
    logp = (logits[0, rows] / 0.8).log_softmax(-1)
    ids = torch.cat([t[-r:] for t, r in zip(b["unconcat_tokens"], RESPONSES, strict=True)])
    return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def reducer(masks, counted=MASKS):
    """slime's mean of each sample by `masks`, divided by the tokens of the masks `counted`, summed."""

    def sum_of_sample_mean(x):
        parts = zip(x.split(RESPONSES), masks, counted, strict=True)
        return sum((x_i * m.to(x_i)).sum() / n.sum().clamp(min=1) for x_i, m, n in parts)

    return sum_of_sample_mean


def make_batch(device, masks=MASKS):
    """Return slime's arguments of a loss: lists of tensors per sample; one response is masked out."""
    torch.manual_seed(5)
    logits = 2 * torch.randn(1, sum(TOTALS) + PADDING, V)
    b = {
        "unconcat_tokens": [torch.randint(V, (n,)) for n in TOTALS],
        "total_lengths": TOTALS,
        "response_lengths": RESPONSES,
        "loss_masks": masks,
        "rollout_mask_sums": [m.sum() for m in masks],
    }
    logp, _ = scored(logits, b)
    for name, spread in (("log_probs", 0.5), ("rollout_log_probs", 0.6), ("ref_log_probs", 1.0)):
        b[name] = list((logp + spread * torch.randn(len(logp))).split(RESPONSES))
    b["ref_log_probs"][0] -= 4  # beyond the clamp of low_var_kl
    b["ref_log_probs"][2] += 4
    b["log_probs"][2] += 0.5  # stale where the advantage is negative
    b["advantages"] = list(torch.randn(len(logp)).split(RESPONSES))
    b["advantages"][2][:2] = torch.tensor([-1.0, -0.5])

    def move(x):
        return [y.to(device) for y in x] if isinstance(x[0], torch.Tensor) else x

    return {k: move(x) for k, x in b.items()} | {"logits": logits.to(device)}
