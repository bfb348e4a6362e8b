"""The values of an objective at each token: ratios, bounds, losses, divergences.

The losses report means (`LossOutput.metrics`). A trainer that reduces in its own way, or wants to
know which tokens were clipped, finds the values per token here. They are computed by the code that
computes the losses where there is no GPU (`grpo_fast.torch_kernels`). Nothing is differentiated,
and nothing waits for the GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import checks
from grpo_fast.objective import Objective
from grpo_fast.records import Sequences, Tokens
from grpo_fast.sequences import per_token_advantages
from grpo_fast.torch_kernels.sequence_loss import nan_where_undecided, ratio_terms
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
    """Values per token, of the shape of `logps`, detached; 0, False or a ratio of 1 where masked.

        >>> A, old = torch.tensor([1.0, -1.0]), torch.zeros(2, 1)
        >>> found = token_diagnostics(torch.tensor([[0.5], [0.5]]), old, A)
        >>> found.outside.tolist(), found.clipped.tolist()
        ([[True], [True]], [[True], [False]])

    d = logp - old_logp, A is the advantage. Ratios, losses and KL are float32, the others bool.

    Attributes:
        log_ratio: d before any clamp; its mean over the sequence where `objective.ratio` is not
            "token" (for "gmpo" the mean of the bounded d).
        ratio: exp of `log_ratio` after the clamps of the objective (`log_ratio_clip`,
            `log_ratio_max`).
        bounded_ratio: `ratio` clamped to [1 - epsilon_low, 1 + epsilon_high].
        outside: the token is outside the bounds of the surrogate, whatever the sign of A. Bounded
            are the ratio ("clip", "cispo", "rollout_is"), the token's own d ("gmpo"), the change of
            its probability ("ipo"), the divergence ("dppo_tv", "dppo_kl": what their mask drops).
            False for the others.
        clipped_low: below the bounds, and A < 0 (DPPO: outside, and A < 0). Its mean is the metric
            "clip_fraction_low".
        clipped_high: above the bounds, and A > 0 (DPPO: outside, and A > 0). Its mean is
            "clip_fraction_high".
        clipped_dual: above `delta` or `dual_clip`, and A < 0. Its mean is "clip_fraction_dual".
        capped: not outside, and the ratio is above `ratio_cap` (DPPO).
        dropped: `off_policy_threshold` leaves out its surrogate.
        loss: surrogate + beta * KL, before any weight.
        kl: the divergence from the reference, by the objective's estimator; 0 without `ref_logps`.
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
        """The tokens outside the bounds on the side where the surrogate "clip" has no gradient."""
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
    """Return the values that `policy_loss` computes for each token from the same arguments.

        >>> logps, old, A = -torch.rand(2, 3), -torch.rand(2, 3), torch.tensor([1.0, -1.0])
        >>> found = token_diagnostics(logps, old, A)
        >>> torch.testing.assert_close(found.ratio, (logps - old).exp())
        >>> out = policy_loss(logps, advantages=A, old_logps=old)
        >>> torch.testing.assert_close(found.loss.mean(), out.loss)
        >>> share = found.clipped_low.float().mean()
        >>> torch.testing.assert_close(share, out.metrics["clip_fraction_low"])

    Args:
        logps: (B, T) padded or (N,) packed.
        old_logps: the same shape; None: on policy, the ratio is 1.
        advantages: (B,), (B, 1) or the same shape; packed (num_seqs,), (num_seqs, 1) or the same
            shape.
        mask: the same shape. Where it is 0 nothing is read. A floating mask weighs means over a
            sequence.
        ref_logps: the same shape; needed where `objective.beta` is not 0.
        cu_seqlens: (num_seqs + 1,) boundaries of packed tokens. Without it they are one sequence.
        objective: as in `policy_loss`; `Objective` has the formulas and their papers.

    Returns:
        `TokenDiagnostics`.

    Raises:
        ValueError, TypeError: an argument that does not fit, with its name; an objective with a KL
            term and no `ref_logps`.

    Sources: the clipped ratio is PPO's, arXiv 1707.06347; for the other objectives see `Objective`.
    """
    op = "token_diagnostics"
    checks.check_objective(op, objective)
    shape = checks.check_tensor(op, "logps", logps).shape
    if objective.beta and ref_logps is None:
        raise ValueError(f"{op}: ref_logps: needed, since objective.beta={objective.beta}")
    if cu_seqlens is not None:
        cu_seqlens = checks.check_cu_seqlens(op, cu_seqlens, logps).long()
    advantages = per_token_advantages(op, advantages, logps, cu_seqlens)
    live = checks.check_mask(op, mask, logps)
    if live is None:
        live = torch.ones(logps.numel(), dtype=torch.bool, device=logps.device)
    share = checks.mask_share(mask, logps)

    def kept(name: str, x: Tensor | None) -> Tensor | None:
        values = checks.per_token(op, name, x, logps)
        return None if values is None else torch.where(live, values, 0)

    logp, A = kept("logps", logps), kept("advantages", advantages)
    assert logp is not None
    assert A is not None
    old, ref = kept("old_logps", old_logps), kept("ref_logps", ref_logps)
    old = logp if old is None else old
    sequences = Sequences(cu_seqlens, shape[-1], share, None)
    found = ratio_terms(logp - old, A, live, sequences, objective)
    ratio = found.bounded.exp()
    own = torch.ones_like(ratio)  # it enters derivatives alone, which are not wanted here
    tokens = Tokens(
        torch.ones_like(logp), A, old, ref, nan_where_undecided(None, found), None, None, None
    )
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
    """Return the estimate of KL(policy || reference) from each token alone.

        >>> logps, ref = -torch.rand(2, 3), -torch.rand(2, 3)
        >>> q = ref - logps
        >>> torch.testing.assert_close(diagnostics.kl_estimate(logps, ref), q.exp() - q - 1)

    Args:
        logps, ref_logps: of equal shapes, any shape. Where one is NaN the result is NaN.
        objective: gives the estimator `kl` and its clamps `kl_gap_clip` and `kl_value_clip`.

    Returns:
        Float32, of the same shape, detached.

    Raises:
        ValueError, TypeError: an argument that does not fit, with its name; "k3_unbiased", which
            needs the ratio to the policy that sampled.

    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    op = "kl_estimate"
    checks.check_objective(op, objective)
    if objective.kl == "k3_unbiased":
        raise ValueError(
            "kl_estimate: objective.kl='k3_unbiased' needs a ratio: use token_diagnostics"
        )
    checks.check_tensor(op, "logps", logps)
    logp = checks.per_token(op, "logps", logps, logps)
    ref = checks.per_token(op, "ref_logps", checks.check_tensor(op, "ref_logps", ref_logps), logps)
    assert logp is not None
    assert ref is not None
    one = torch.ones_like(logp)
    kl = kl_terms(logp, ref, torch.zeros_like(logp), one, one, objective)[0]
    return kl.view(logps.shape)
