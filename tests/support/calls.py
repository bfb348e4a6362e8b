"""A call of every public function, by name, on tensors for each of its arguments."""

import torch

from grpo_fast import Objective
from grpo_fast.diagnostics import kl_estimate, token_diagnostics
from grpo_fast.loss import (
    LossOutput,
    fold_statistics,
    grpo_loss,
    linear_grpo_loss,
    metrics_from,
    policy_loss,
)
from grpo_fast.ops import group_advantage, linear_logprob, logprob
from grpo_fast.weights import (
    binary_divergence,
    clip_cov,
    geometric_mean,
    icepop,
    importance_weights,
    kl_cov,
    kpop,
    m2po,
    top_entropy,
    truncated_importance,
    varied_groups,
)

B, T, V, D = 4, 3, 20, 8
DIFFERENTIABLE = ("logits", "logps", "entropy", "hidden", "weight", "bias", "lora_a", "lora_b")


DIFFERENTIABLE += ("flat_logits", "flat_logps", "flat_hidden")


def tensors(device):
    new = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=new)

    found = {
        "logits": randn(B, T, V),
        "ids": torch.randint(V, (B, T), generator=new),
        "hidden": randn(B, T, D),
        "weight": randn(V, D),
        "bias": randn(V),
        "lora_a": randn(2, D),
        "lora_b": randn(V, 2),
        "advantages": randn(B),
        "per_token": randn(B, T),
        "rewards": randn(B),
        "columns": randn(B, 3),
        "column_weights": randn(3),
        "labels": torch.tensor([3, 7, 3, 7]),
        "mask": torch.rand((B, T), generator=new) > 0.2,
        "logps": -randn(B, T).exp(),
        "old_logps": -randn(B, T).exp(),
        "ref_logps": -randn(B, T).exp(),
        "entropy": randn(B, T).exp(),
        "importance_weights": randn(B, T).exp(),
        "token_weights": randn(B, T).exp(),
        "scores": randn(B),
        "temperature": 1 + randn(B, T).exp(),
        "cu_seqlens": torch.tensor([0, 3, 6, 9, 12]),
        "statistics": randn(3, 16),
    }
    names = ("logits", "ids", "hidden", "logps", "mask", "old_logps", "importance_weights")
    for name in (*names, "token_weights"):
        found[f"flat_{name}"] = found[name].flatten(0, 1)
    return {name: x.to(device) for name, x in found.items()}


def losses(names, **options):
    """Keyword arguments of the tensors in `names`, with options."""

    def given(t):
        return {**{name: t[name] for name in names}, **options}

    return given


EVERYTHING = ("mask", "advantages", "old_logps", "ref_logps", "importance_weights", "token_weights")
token = losses((*EVERYTHING, "temperature"), objective=Objective(beta=0.1, entropy_coef=0.1))
gspo = losses(EVERYTHING, objective=Objective(ratio="sequence", beta=0.1))

topr = losses(
    ("mask", "rewards", "scores", "old_logps"), group_size=2, objective=Objective(surrogate="topr")
)

rewarded = losses(
    ("rewards", "mask", "old_logps"), group_size=2, objective=Objective(ratio="sequence")
)

top = losses(("mask", "advantages", "old_logps"), objective=Objective(top_entropy_quantile=0.5))

vespo = losses(
    ("mask", "advantages", "old_logps", "importance_weights"),
    objective=Objective(surrogate="vespo"),
)


def head(t):
    return {
        "bias": t["bias"],
        "lora": (t["lora_a"], t["lora_b"], 0.5),
        "softcap": 3.0,
        "chunk_size": 7,
    }


def without(arguments, *names):
    return {name: x for name, x in arguments.items() if name not in names}


def packed(t):
    names = ("mask", "old_logps", "importance_weights", "token_weights")
    given = {name: t[f"flat_{name}"] for name in names}
    given |= {"advantages": t["advantages"], "cu_seqlens": t["cu_seqlens"]}
    return {**given, "objective": Objective(ratio="sequence")}


CALLS = {
    "grpo_loss": lambda t: grpo_loss(t["logits"], t["ids"], **token(t)),
    "grpo_loss, in place": lambda t: grpo_loss(t["logits"] * 1, t["ids"], inplace=True, **token(t)),
    "grpo_loss, gspo": lambda t: grpo_loss(t["logits"], t["ids"], **gspo(t)),
    "grpo_loss, rewards": lambda t: grpo_loss(t["logits"], t["ids"], **rewarded(t)),
    "grpo_loss, topr": lambda t: grpo_loss(t["logits"], t["ids"], **topr(t)),
    "grpo_loss, top entropy": lambda t: grpo_loss(t["logits"], t["ids"], **top(t)),
    "grpo_loss, vespo": lambda t: grpo_loss(t["logits"], t["ids"], **vespo(t)),
    "grpo_loss, packed": lambda t: grpo_loss(t["flat_logits"], t["flat_ids"], **packed(t)),
    "policy_loss, packed": lambda t: policy_loss(t["flat_logps"], **packed(t)),
    "linear_grpo_loss, packed": lambda t: linear_grpo_loss(
        t["flat_hidden"], t["weight"], t["flat_ids"], **packed(t)
    ),
    "grpo_loss, advantages per token": lambda t: grpo_loss(
        t["logits"], t["ids"], advantages=t["per_token"]
    ),
    "linear_grpo_loss": lambda t: linear_grpo_loss(
        t["hidden"], t["weight"], t["ids"], **token(t), **head(t)
    ),
    "linear_grpo_loss, all rows": lambda t: linear_grpo_loss(
        t["hidden"], t["weight"], t["ids"], compact=False, **gspo(t), **head(t)
    ),
    "linear_grpo_loss, rewards": lambda t: linear_grpo_loss(
        t["hidden"], t["weight"], t["ids"], **rewarded(t), **head(t)
    ),
    "linear_grpo_loss, topr": lambda t: linear_grpo_loss(
        t["hidden"], t["weight"], t["ids"], **topr(t), **head(t)
    ),
    "policy_loss": lambda t: policy_loss(
        t["logps"], entropy=t["entropy"], **without(token(t), "temperature")
    ),
    "policy_loss, gspo": lambda t: policy_loss(t["logps"], **gspo(t)),
    "policy_loss, top entropy": lambda t: policy_loss(t["logps"], entropy=t["entropy"], **top(t)),
    "policy_loss, vespo": lambda t: policy_loss(t["logps"], **vespo(t)),
    "policy_loss, topr": lambda t: policy_loss(
        t["logps"], **without(topr(t), "rewards", "group_size"), advantages=t["advantages"]
    ),
    "logprob": lambda t: logprob(
        t["logits"], t["ids"], temperature=t["temperature"], mask=t["mask"], return_entropy=True
    ),
    "linear_logprob": lambda t: linear_logprob(
        *(t["hidden"], t["weight"], t["ids"]),
        **{"temperature": t["temperature"], "mask": t["mask"], "return_entropy": True, **head(t)},
    ),
    "linear_logprob, all rows": lambda t: linear_logprob(
        t["hidden"], t["weight"], t["ids"], mask=t["mask"], compact=False, **head(t)
    ),
    "group_advantage": lambda t: group_advantage(t["rewards"], group_size=2),
    "group_advantage, labels": lambda t: group_advantage(t["rewards"], group_ids=t["labels"]),
    "group_advantage, columns": lambda t: group_advantage(
        t["columns"], group_size=2, weights=t["column_weights"], aggregation="normalize_then_sum"
    ),
    "fold_statistics": lambda t: fold_statistics(t["statistics"]),
    "metrics_from": lambda t: metrics_from(t["statistics"][0]),
    "binary_divergence": lambda t: binary_divergence(t["logps"], t["old_logps"], mask=t["mask"]),
    "clip_cov": lambda t: clip_cov(
        *(t["logps"], t["old_logps"], t["per_token"]),
        **{"mask": t["mask"], "fraction": 0.3, "low": 0.0, "high": 9.0},
        generator=torch.Generator(t["logps"].device).manual_seed(0),
    ),
    "geometric_mean": lambda t: geometric_mean(t["importance_weights"], mask=t["mask"]),
    "icepop": lambda t: icepop(t["logps"], t["old_logps"], 0.5, 2.0, mask=t["mask"]),
    "importance_weights": lambda t: importance_weights(
        t["logps"], t["old_logps"], mask=t["mask"], level="geometric"
    ),
    "kl_cov": lambda t: kl_cov(t["logps"], t["per_token"], mask=t["mask"]),
    "kpop": lambda t: kpop(t["logps"], t["old_logps"], 0.1, mask=t["mask"]),
    "m2po": lambda t: m2po(t["logps"], t["old_logps"], 0.1, mask=t["mask"]),
    "top_entropy": lambda t: top_entropy(t["entropy"], 0.5, mask=t["mask"]),
    "truncated_importance": lambda t: truncated_importance(t["logps"], t["old_logps"], 2.0),
    "varied_groups": lambda t: varied_groups(t["rewards"], group_size=2),
    "token_diagnostics": lambda t: token_diagnostics(
        t["logps"],
        t["old_logps"],
        t["per_token"],
        mask=t["mask"],
        ref_logps=t["ref_logps"],
        objective=Objective(ratio="sequence", beta=0.1),
    ),
    "kl_estimate": lambda t: kl_estimate(t["logps"], t["ref_logps"]),
}


def outputs(call, t):
    """Return the results of a call as a flat list of tensors, and the gradients of its arguments."""
    found = call(t)
    loss = None
    if isinstance(found, LossOutput):
        loss, parts = found.loss, [*found[:3], *found.metrics.values(), found.statistics]
    elif isinstance(found, dict):
        parts = list(found.values())
    else:
        parts = list(found) if isinstance(found, tuple) else [found]
        if parts[0].requires_grad:
            upstream = torch.linspace(
                -1, 2, parts[0].numel(), dtype=torch.float32, device=parts[0].device
            )
            loss = sum((x.flatten() * upstream).sum() for x in parts)
    wanted = [t[name] for name in DIFFERENTIABLE if name in t and t[name].requires_grad]
    grads = []
    if loss is not None:
        grads = [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]
    return [x.detach() for x in parts if x is not None], grads
