"""What an objective does to each token, for a trainer's own metrics: ratios, bounds, losses, divergences.

The losses report means (`LossOutput.metrics`); a trainer that reduces in a way of its own, or wants to know
which tokens were clipped, finds the same per token here. Computed by the code that the losses are computed by
where there is no GPU (`grpo_fast.ops`); nothing is differentiated, nothing waits for the GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import checks
from grpo_fast.objective import Objective
from grpo_fast.records import Sequences, Tokens
from grpo_fast.sequences import per_token_advantages
from grpo_fast.torch_kernels.sequence_loss import poisoned, ratio_terms
from grpo_fast.torch_kernels.terms import (
    CLIP_DUAL,
    CLIP_HIGH,
    CLIP_LOW,
    Ratio,
    beyond_bounds,
    kl_terms,
    policy_terms,
    ratio_cap,
)

__all__ = ["TokenDiagnostics", "kl_estimate", "token_diagnostics"]


class TokenDiagnostics(NamedTuple):
    """Per token, of the shape of `logps`, detached, float32 or bool; 0, False or a ratio of 1 where masked.

    Attributes:
        log_ratio: d, of its sequence where `objective.ratio` is not "token", before any clamp.
        ratio: exp of d within the objective's bounds of the log-ratio.
        bounded_ratio: `ratio` within [1 - epsilon_low, 1 + epsilon_high].
        outside: beyond what the surrogate bounds, whatever the advantage: the ratio ("clip", "cispo",
            "rollout_is"), the token's own d ("gmpo"), the change of its probability ("ipo"), the divergence
            ("dppo_tv", "dppo_kl": what their mask drops). Nowhere for the others.
        clipped_low: below where A < 0 (DPPO: outside there); the mean is the metric "clip_fraction_low".
        clipped_high: above where A > 0 (DPPO: outside there); the mean is "clip_fraction_high".
        clipped_dual: above `delta` or `dual_clip`, and A < 0; the mean is "clip_fraction_dual".
        capped: not outside, and the ratio above `ratio_cap` (DPPO).
        dropped: left out by `off_policy_threshold`.
        loss: surrogate + beta * KL, before any weight.
        kl: to the reference, by the objective's estimator; 0 without `ref_logps`.
    """

    log_ratio: Tensor
    ratio: Tensor
    bounded_ratio: Tensor
    outside: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    capped: Tensor
    dropped: Tensor
    loss: Tensor
    kl: Tensor

    @property
    def clipped(self) -> Tensor:
        """Below where A < 0 or above where A > 0: where "clip" has no gradient."""
        return self.clipped_low | self.clipped_high


@torch.no_grad()
def token_diagnostics(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    ref_logps: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective = Objective(),
) -> TokenDiagnostics:
    """What `policy_loss` with the same arguments makes of each token; see `TokenDiagnostics`.

    Args:
        logps: (B, T) padded or (N,) packed.
        old_logps: the same shape; None: on policy, the ratio is 1.
        advantages: (B,), (B, 1) or the same shape; packed (num_seqs,), (num_seqs, 1) or the same shape.
        mask: the same shape; where it is 0 nothing is read. A floating one weighs means over a sequence.
        ref_logps: the same shape.
        cu_seqlens: (num_seqs + 1,) boundaries of packed tokens; without it they are one sequence.

    Raises:
        ValueError: another shape, by name; an objective with a KL term and no `ref_logps`.
    """
    op = "token_diagnostics"
    shape = checks.check_tensor(op, "logps", logps).shape
    for name, x in {"old_logps": old_logps, "ref_logps": ref_logps}.items():
        if x is not None and checks.check_tensor(op, name, x).shape != shape:
            raise ValueError(f"{op}: {name}: want {tuple(shape)}, got {checks.shape_of(x)}")
    if objective.beta and ref_logps is None:
        raise ValueError(f"{op}: ref_logps: needed, since objective.beta={objective.beta}")
    if cu_seqlens is not None:
        cu_seqlens = checks.check_cu_seqlens(op, cu_seqlens, logps).long()
    advantages = per_token_advantages(op, advantages, logps, cu_seqlens)
    live = checks.check_mask(op, mask, logps)
    if live is None:
        live = torch.ones(logps.numel(), dtype=torch.bool, device=logps.device)
    share = checks.mask_share(mask, logps)

    def kept(x: Tensor) -> Tensor:
        return torch.where(live, x.reshape(-1), 0).float()

    logp, A = kept(logps), kept(advantages)
    old = logp if old_logps is None else kept(old_logps)
    ref = None if ref_logps is None else kept(ref_logps)
    sequences = Sequences(cu_seqlens, shape[-1], share, None)
    found = ratio_terms(logp - old, A, live, sequences, objective)
    ratio = found.bounded.exp()
    own = torch.ones_like(ratio)  # of derivatives, which nobody wants here
    tokens = Tokens(torch.ones_like(logp), A, old, ref, poisoned(None, found), None, None, None)
    terms = policy_terms(
        logp, tokens, Ratio(found.bounded, own, found.log_w, found.dropped), objective
    )
    nothing = torch.zeros_like(live)
    below, above = beyond_bounds(logp, old, ratio, A, objective)
    outside = nothing if below is None or above is None else below | above
    dropped = nothing if found.dropped is None else found.dropped

    def shaped(x: Tensor, elsewhere: float = 0) -> Tensor:
        return torch.where(live, x, elsewhere).view(shape)

    def at(condition: Tensor) -> Tensor:
        return (condition & live).view(shape)

    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    return TokenDiagnostics(
        log_ratio=shaped(found.log_ratio),
        ratio=shaped(ratio, 1),
        bounded_ratio=shaped(ratio.clamp(low, high), 1),
        outside=at(outside),
        clipped_low=at(terms.clip & CLIP_LOW != 0),
        clipped_high=at(terms.clip & CLIP_HIGH != 0),
        clipped_dual=at(terms.clip & CLIP_DUAL != 0),
        capped=at(~outside & (ratio > ratio_cap(objective))),
        dropped=at(dropped),
        loss=shaped(terms.loss),
        kl=shaped(torch.zeros_like(logp) if terms.kl is None else terms.kl),
    )


@torch.no_grad()
def kl_estimate(
    logps: Tensor, ref_logps: Tensor, objective: Objective = Objective(kl="k3")
) -> Tensor:
    """The estimate of KL(policy || reference) from each token alone, by `objective.kl` and its clamps.

    Equivalent, for k3, to `(ref_logps - logps).exp() - (ref_logps - logps) - 1`. Elementwise, float32,
    detached: NaN where an argument is.

    Raises:
        ValueError: "k3_unbiased", which needs the ratio to the policy that sampled.
    """
    if objective.kl == "k3_unbiased":
        raise ValueError(
            "kl_estimate: objective.kl='k3_unbiased' needs a ratio: use token_diagnostics"
        )
    for name, x in (("logps", logps), ("ref_logps", ref_logps)):
        checks.check_tensor("kl_estimate", name, x)
    logp = logps.float()
    one = torch.ones_like(logp)
    return kl_terms(logp, ref_logps.float(), torch.zeros_like(logp), one, one, objective)[0]
