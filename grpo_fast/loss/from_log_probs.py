"""`policy_loss`: the loss on log-probs that a model has computed already."""

from torch import Tensor

from grpo_fast import checks
from grpo_fast.loss.arguments import LossArguments, check_batch, check_unweighed
from grpo_fast.loss.output import LossOutput, loss_output, metrics_of
from grpo_fast.notices import logged
from grpo_fast.objective import OPTIONS, Objective
from grpo_fast.ops.autograd import anchors_of
from grpo_fast.ops.coefficients import in_one_call, padded_loss, values
from grpo_fast.records import Outputs
from grpo_fast.spelling import keywords_explained


@logged("policy_loss")
@keywords_explained(OPTIONS)
def policy_loss(
    logps: Tensor,
    *,
    advantages: Tensor,
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    scores: Tensor | None = None,
    entropy: Tensor | None = None,
    num_items: float | Tensor | None = None,
    loss_scale: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective = Objective(),
) -> LossOutput:
    """Return the loss of `grpo_loss` from log-probs instead of logits, by the same device code.

    It is differentiable in `logps`, and in `entropy` where `objective.entropy_coef` is not 0. It
    equals `grpo_fast.reference.policy_loss` in float32. On policy the gradient of the default
    objective is that of REINFORCE:

        >>> logps, A = torch.randn(2, 3).log_softmax(-1).requires_grad_(), torch.tensor([1.0, -1.0])
        >>> mask, old = torch.tensor([[1, 1, 1], [1, 1, 0]]), logps.detach() + 0.1 * torch.randn(2, 3)
        >>> loss = policy_loss(logps, advantages=A, mask=mask, old_logps=old).loss
        >>> want = reference.policy_loss(logps, advantages=A, mask=mask, old_logps=old)
        >>> torch.testing.assert_close(loss, want)
        >>> (grad,) = torch.autograd.grad(policy_loss(logps, advantages=A, mask=mask).loss, logps)
        >>> torch.testing.assert_close(grad, -A[:, None] * mask / mask.sum(1, keepdim=True) / 2)

    Args:
        logps: (B, T) padded or (N,) packed log-probs of the completion tokens, any floating dtype.
        entropy: one per token, in nats; needed where `objective.needs_entropy`.

    The other arguments are those of `grpo_loss`: advantages, mask, old_logps, ref_logps,
    importance_weights, token_weights, scores, num_items, loss_scale, cu_seqlens, objective. They
    are constants; `old_logps=logps` is allowed and is detached here.

    Returns:
        `LossOutput`; its `logps` and `entropy` are the given ones, detached, in float32. Where
        masked they hold what was given.

    Raises:
        ValueError, TypeError: as in `grpo_loss`.
    """
    op = "policy_loss"
    checks.check_objective(op, objective)
    checks.check_tensor(op, "logps", logps)
    checks.check_no_tangent(op, "logps", logps)
    if not logps.is_floating_point():
        raise TypeError(f"{op}: logps: want a floating dtype, got {logps.dtype}")
    if logps.ndim not in (1, 2):
        raise ValueError(f"{op}: logps: want (B, T) or (N,), got {checks.shape_of(logps)}")
    _check_entropy(op, entropy, logps, objective)
    given = LossArguments(
        objective=objective,
        advantages=advantages,
        mask=mask,
        old_logps=old_logps,
        ref_logps=ref_logps,
        importance_weights=importance_weights,
        token_weights=token_weights,
        scores=scores,
        num_items=num_items,
        loss_scale=loss_scale,
        cu_seqlens=cu_seqlens,
    )
    live = checks.check_mask(op, mask, logps)
    if in_one_call(logps, objective, importance_weights, entropy, *given):
        at_once = _of_padded(op, logps, live, entropy, given)
        if at_once is not None:
            return at_once
    logp = logps.float()
    batch = check_batch(op, logp, live, given)
    flat = logp.reshape(-1).contiguous()
    flat_entropy = None if entropy is None else entropy.reshape(-1).float().contiguous()
    found = values(flat, flat_entropy, batch, objective.terms)
    out = Outputs(found.loss, flat.detach(), flat_entropy, found.kl, found.clip)
    return loss_output(logps, out, batch, op, anchors_of(logps, entropy))


def _of_padded(
    op: str, logps: Tensor, mask: Tensor | None, entropy: Tensor | None, given: LossArguments
) -> LossOutput | None:
    """Return the loss of padded tokens, computed in one call; None if nothing can compile it."""
    logp = logps.detach().float().contiguous()
    if entropy is not None:
        entropy = entropy.detach().float().contiguous()
    weighing, each = check_unweighed(op, logp, mask, given)
    found = padded_loss(op, logps, logp, entropy, weighing, each, given.objective)
    if found is None:
        return None
    metrics = metrics_of(found.metrics, each.ref_logp is not None, entropy is not None)
    return LossOutput(found.loss, logp, entropy, metrics, found.statistics)


def _check_entropy(op: str, entropy: Tensor | None, logps: Tensor, objective: Objective) -> None:
    """Check the given entropy, or that none is needed."""
    if objective.needs_entropy and entropy is None:
        name = "entropy_coef" if objective.terms.modes.has_bonus else "top_entropy_quantile"
        raise ValueError(
            f"{op}: entropy: needed, since objective.{name}={getattr(objective, name)}"
        )
    if entropy is not None:
        checks.check_tensor(op, "entropy", entropy)
        checks.check_no_tangent(op, "entropy", entropy)
        if entropy.shape != logps.shape:
            raise ValueError(
                f"{op}: entropy: want {tuple(logps.shape)}, got {checks.shape_of(entropy)}"
            )
        checks.check_device(op, "entropy", entropy, logps)
