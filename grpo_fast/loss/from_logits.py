"""`grpo_loss`: the loss on logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import checks, overwritten
from grpo_fast.loss.arguments import LossArguments, check_batch
from grpo_fast.loss.output import LossOutput, loss_output
from grpo_fast.notices import fell_back, logged
from grpo_fast.objective import OPTIONS, Objective
from grpo_fast.operands import Terms, replaced
from grpo_fast.ops.autograd import anchors_of
from grpo_fast.ops.coefficients import (
    Batch,
    WithGradientOf,
    coefficient_on_policy,
    values,
    with_coefficients,
)
from grpo_fast.ops.group_advantage import z_scores
from grpo_fast.ops.grpo import Arguments, grpo, grpo_inplace
from grpo_fast.ops.logprob import logprob_fwd
from grpo_fast.records import Outputs, Rewards, Targets
from grpo_fast.sequences import spread
from grpo_fast.spelling import keywords_explained


@logged("grpo_loss")
@keywords_explained(OPTIONS)
def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    scores: Tensor | None = None,
    num_items: float | Tensor | None = None,
    loss_scale: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    objective: Objective = Objective(),
    return_entropy: bool = False,
    inplace: bool = False,
) -> LossOutput:
    """Return the GRPO loss of completions, and compute its gradient in the same pass over the logits.

    The loss and the gradient are those of `grpo_fast.reference.grpo_loss`, computed in float32
    whatever the dtype of `logits`:

        >>> logits, ids = torch.randn(2, 3, 7, requires_grad=True), torch.randint(7, (2, 3))
        >>> given = dict(rewards=torch.tensor([0.0, 1.0]), group_size=2)
        >>> given["mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> loss, want = grpo_loss(logits, ids, **given).loss, reference.grpo_loss(logits, ids, **given)
        >>> torch.testing.assert_close(loss, want)
        >>> torch.testing.assert_close(*(torch.autograd.grad(x, logits) for x in (loss, want)))

    The function makes one tensor of the size of `logits`, their gradient. With `inplace` it makes
    none. Autograd adds its own: the backward of a slice makes a tensor of the size of what was
    sliced. To avoid that, let the head compute only the rows that are scored (`logits_to_keep=` in
    transformers).

    Args:
        logits: (B, T, V) padded or (N, V) packed, float32, bfloat16 or float16. Row t scores token
            t: logits and ids are aligned. The last dimension must be contiguous. This function does
            not copy a strided view such as `logits[:, prompt - 1 : -1]`. The gradient is stored in
            the dtype of `logits` before the upstream gradient is applied. An upstream gradient
            other than 1 costs a read and a write of the whole gradient, more than half of the time
            of the loss itself, and rounds it again: pass factors as `loss_scale`.
        completion_ids: (B, T) or (N,), int32 or int64; any value where the mask is 0.
        advantages: (B,) or (B, 1), one per sequence, or one per token. Give either these or
            `rewards`.
        rewards: (B,) or (B, 1), with a `group_size` of at least 2. They are z-scored within groups
            of consecutive sequences, on the device, in the same launch. Across ranks, call
            `grpo_fast.ops.group_advantage` on gathered rewards.
        group_size: how many consecutive sequences belong to one prompt; only with `rewards`.
        mask: one per token. 0 leaves a token out: nothing of it is read, it may hold NaN. Default:
            all tokens count. A floating mask weighs: m_t multiplies what token t adds to a sum, and
            every denominator is a sum of m_t. This holds for reductions, for means over a sequence
            (GSPO) and for the metrics. In a bool or integer mask any nonzero value is 1. An
            additive attention mask (0 and -inf) is an error: pass `mask == 0`.
        old_logps: one per token, log-probs of the policy that sampled. None: on policy, the ratio
            is 1. Both `old_logps` and `ref_logps` are constants: a graph that comes with them is
            detached here, and no gradient flows through them.
        ref_logps: one per token, log-probs of the reference policy; needed where `objective.beta`
            is not 0.
        importance_weights: (B,), (B, 1) or one per token. A constant factor on the surrogate, not
            on the KL term, that corrects a mismatch of training and inference. Where it is 0 the
            surrogate is left out, even if it is infinite or NaN.
        token_weights: one per token. A constant factor on everything that a token contributes.
            Where it is 0 the token is left out, even if its loss is infinite or NaN.
        scores: only for the surrogate "topr": (B,), (B, 1) or one per token, the rewards before any
            baseline; their sign decides. Default: `rewards` if given, else `advantages`.
        num_items: the denominator of the reduction "token_mean", a number or a 0-dim tensor. A
            value below 1 counts as 1. It is an error with another reduction.
        loss_scale: a factor on the loss and its gradient that costs no time: a share of the
            micro-batch, the number of ranks, the scale of a GradScaler. A finite number, or a 0-dim
            tensor on the CPU or on the device of `logits`, which is read without a host sync. It
            may be negative; 0 leaves out all tokens. It is applied before the gradient is rounded
            to the dtype of `logits`, which keeps float16 from underflow. It scales the whole loss,
            KL and entropy terms too: `LossOutput.loss` is the scaled loss, and so is "loss" in
            `statistics`. The metrics and all other statistics do not change.
        cu_seqlens: (B + 1,) int boundaries of packed sequences. Packed tokens without it are one
            sequence. If there are as many sequences as tokens, and not one token in each, an
            argument of shape (N,) may be one per token or one per sequence, and is refused: pass
            (B, 1) for one per sequence.
        temperature: positive; a number, or one per token.
        objective: what is optimised.
        return_entropy: also compute the entropy where the objective does not need it, for
            `LossOutput.entropy` and the metrics.
        inplace: allow this function to overwrite the logits with their gradient, which then needs
            no memory of its own. Afterwards the logits cannot be used, nor their base, views,
            `detach()` and `.data`: a gradient through them raises, and so do this library's
            functions. PyTorch's own functions cannot be kept from reading: `logits.argmax(-1)`, or
            an entropy under `torch.no_grad()`, is then that of the gradient, without an error.
            Compute such metrics before, or use `LossOutput`. Under `torch.compile` the option has
            no effect, because its memory planner decides, nor where no gradient is wanted.
            Objectives without `objective.by_token` then read the logits once more, unless they are
            on policy.

    Returns:
        `LossOutput`. The call makes no host sync. The backward works once: a second backward, or a
        second derivative, raises.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it. Advantages,
            rewards, weights, scores, `num_items`, `loss_scale` and temperatures must not require
            grad, because they would get none. On a GPU, values of tensors (ids, `cu_seqlens`,
            temperatures per token) are checked only with GRPO_FAST_VALIDATE=1. Without it, an id
            outside the vocabulary or a negative weight in a mask makes the loss NaN there.

    Sources: GRPO is DeepSeekMath, arXiv 2402.03300; `Objective` lists the papers of the other
    objectives. Online softmax: arXiv 1805.02867.
    """
    op = "grpo_loss"
    checks.check_objective(op, objective)
    logits3 = checks.check_logits(op, logits, completion_ids, "completion_ids")
    targets = checks.check_targets(op, "completion_ids", completion_ids, logits, mask, temperature)
    given = LossArguments(
        objective=objective,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
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
    batch = check_batch(op, completion_ids, targets.mask, given)
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    inplace = inplace and with_grad
    if inplace and torch.compiler.is_compiling():
        fell_back("inplace", "under torch.compile the memory planner decides", quiet=True)
        inplace = False
    if inplace:
        overwritten.check_overwritable(op, logits)
    anchors = anchors_of(logits) if inplace else None
    return_entropy = return_entropy or objective.needs_entropy
    call = _LogitsCall(logits3, targets, batch, objective.terms, return_entropy, inplace)
    out = _by_launch(call) if objective.by_token and with_grad else _by_phases(call)
    if anchors is None:  # after the launch, which need not wait for it
        anchors = anchors_of(logits)
    if inplace:
        overwritten.mark(logits)
    if not return_entropy:
        out = replaced(out, entropy=None)
    return loss_output(completion_ids, out, batch, op, anchors)


class _LogitsCall(NamedTuple):
    """Checked arguments of one call of `grpo_loss`."""

    logits: Tensor  # (B, T, V)
    targets: Targets
    batch: Batch
    terms: Terms
    with_entropy: bool
    inplace: bool


def _by_launch(call: _LogitsCall) -> Outputs:
    """Compute the loss of each token and the gradient in one launch."""
    batch = call.batch
    given = Arguments(call.targets, batch.tokens, batch.rewards, call.with_entropy, call.terms)
    return Outputs(*(grpo_inplace if call.inplace else grpo)(call.logits, *given)[:5])


def _by_launch_with(call: _LogitsCall, coefficient: Tensor) -> Outputs:
    """Compute loss and gradient in one launch, given the surrogate's part of dloss/dlogp, (N,)."""
    tokens, terms = with_coefficients(call.batch.tokens, coefficient, call.terms)
    batch = replaced(call.batch, tokens=tokens, rewards=Rewards())
    return _by_launch(replaced(call, batch=batch, terms=terms))


def _by_phases(call: _LogitsCall) -> Outputs:
    """Compute the loss where a token's coefficient depends on other tokens, or no gradient is wanted.

    On policy this is one launch. Off policy with `inplace`, one read for the log-probs comes before
    that launch. Off policy without `inplace`, one read gives the log-probs, and the backward reads
    and writes once for the gradient. Without a gradient there is one read.
    """
    logits, targets, batch, terms = call.logits, call.targets, call.batch, call.terms
    rewards = batch.rewards
    if rewards.values is not None:
        score = z_scores(rewards.values, rewards.group_size)
        advantages = spread(score, logits.shape[:2], rewards.sequence)
        batch = replaced(batch, tokens=replaced(batch.tokens, advantages=advantages))
        call = replaced(call, batch=batch)
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    coefficient = coefficient_on_policy(batch, terms) if with_grad else None
    if coefficient is not None:
        out = _by_launch_with(call, coefficient)
        with torch.no_grad():
            found = values(out.logp, out.entropy, batch, terms)
        loss = WithGradientOf.apply(out.loss, found.loss)
        return Outputs(loss, out.logp, out.entropy, found.kl, found.clip)
    with torch.set_grad_enabled(with_grad and not call.inplace):
        logp, entropy, _, _ = logprob_fwd(logits, targets, call.with_entropy)
        found = values(logp, entropy, batch, terms)
    loss = found.loss
    if with_grad and call.inplace:
        tokens = replaced(batch.tokens, ref_logp=None, entropy_weight=found.entropy_weight)
        left = replaced(
            call,
            batch=replaced(batch, tokens=tokens),
            terms=replaced(terms, modes=terms.modes.without_kl()),
            with_entropy=terms.modes.has_bonus,
        )
        loss = WithGradientOf.apply(_by_launch_with(left, found.dlogp).loss, loss)
    return Outputs(loss, logp.detach(), entropy, found.kl, found.clip)
