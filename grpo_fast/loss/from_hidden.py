"""`linear_grpo_loss`: the loss on hidden states, without the logits of all tokens in memory."""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast import checks
from grpo_fast.loss.arguments import LossArguments, check_batch, to_device
from grpo_fast.loss.compaction import keep_of
from grpo_fast.loss.output import LossOutput, loss_output
from grpo_fast.notices import logged
from grpo_fast.objective import OPTIONS, Objective
from grpo_fast.operands import Terms, replaced
from grpo_fast.ops.autograd import anchors_of, once_differentiable
from grpo_fast.ops.coefficients import Batch, coefficients_known, values
from grpo_fast.ops.group_advantage import z_scores
from grpo_fast.ops.head import float64
from grpo_fast.ops.head.arguments import HeadArguments, Needs, Options, Parameters, check_head
from grpo_fast.ops.linear_grpo import LinearArguments, linear_grpo
from grpo_fast.ops.linear_logprob import linear_logprob_fwd
from grpo_fast.records import Outputs, Rewards, Targets, Tokens
from grpo_fast.sequences import spread
from grpo_fast.spelling import keywords_explained


@logged("linear_grpo_loss")
@keywords_explained(OPTIONS)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: Literal["fp32", "bf16"] = "fp32",
    vocab_size: int | None = None,
    compact: bool = True,
    chunk_size: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    dw_out: Tensor | None = None,
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
) -> LossOutput:
    """Return the GRPO loss from the last hidden states and the head, without all logits in memory.

    With `cap(x) = softcap * tanh(x / softcap)` its loss and gradients are those of

        grpo_loss(cap(logit_scale * (hidden @ weight.T + bias)), completion_ids, ...)

    For example:

        >>> hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4, requires_grad=True)
        >>> ids, A = torch.randint(7, (2, 3)), torch.tensor([1.0, -1.0])
        >>> loss = linear_grpo_loss(hidden, weight, ids, softcap=5.0, advantages=A).loss
        >>> want = grpo_loss(5 * (hidden @ weight.T / 5).tanh(), ids, advantages=A).loss
        >>> torch.testing.assert_close(loss, want)
        >>> torch.testing.assert_close(*(torch.autograd.grad(x, weight) for x in (loss, want)))

    Only the logits of one chunk of tokens exist at a time. The forward computes the gradients:
    three matrix products, two where the head is frozen. It needs the memory of the gradients and of
    a float32 gradient of the weight; no other memory grows with the number of tokens. With float16
    operands the gradient of `hidden` is float32 until the backward, so that a loss scale keeps it
    from underflow.

    Args:
        hidden: (B, T, D) or (N, D), float32, bfloat16, float16 or float64: the last hidden states.
            Row t scores token t. The matrix products are in this dtype.
        weight: (rows, D) of the head, of any of these dtypes. It is converted to the dtype of
            `hidden` for the products. Its gradient is accumulated in float32 and returned in the
            dtype of `weight`. Under FSDP call this function inside the forward of the module that
            owns the weight, where it has been gathered. If `hidden`, `weight`, `bias` or `lora` is
            float64, everything is computed in float64, loss, log-probs and entropy too, by
            PyTorch's operators in chunks of tokens. This is for models that need all digits and not
            speed. Then no token is left out, and `dw_out` and `tp_group` are not available.
        completion_ids: (B, T) or (N,), int32 or int64; any value where the mask is 0.
        bias: (rows,).
        softcap: bound of the logits, as in the formula above (Gemma 2); None for none.
        logit_scale: positive factor on the logits (Cohere).
        logits_dtype: "fp32": the logits of half-precision operands are not rounded. "bf16": they
            are rounded to the dtype of the operands, as in the model's own head; this takes less
            workspace.
        vocab_size: how many rows of `weight` are vocabulary. The rows after them are padding, and
            their gradient is 0. Default: all.
        compact: leave tokens that cannot have a gradient out of all matrix products. These are
            masked tokens, tokens of weight 0, and, with beta = 0 and without an entropy bonus,
            tokens whose advantage or importance weight is 0 (for an objective that looks at
            sequences: sequences of such tokens). The number of remaining tokens must reach the
            host: one sync on a GPU. For an objective of single tokens there is no sync if `mask`,
            `token_weights`, `cu_seqlens` and `advantages` or `rewards`, as far as given, are on the
            CPU; that is allowed. Loss and gradients are the same up to the order of summation. With
            `compact=False` the boundaries of packed sequences stay on the device, and objectives on
            sequences take two phases (four products), unless they are on policy or the head is
            frozen.
        chunk_size: tokens per chunk; every matrix product has exactly this number of rows. Default:
            chosen from the number of tokens and the device.
        lora: (A (r, D), B (rows, r), scaling): adds `scaling * (hidden @ A.T) @ B.T` to the logits.
        tp_group: processes that share the vocabulary. Each process passes its own rows of `weight`,
            `bias` and `lora`'s B, consecutive in the order of the ranks, and the same values of
            everything else. Ids and `vocab_size` are those of the whole vocabulary. Each process
            gets the same loss and log-probs and the whole gradient of `hidden`. The cost is one
            all-gather of four numbers per token for each chunk, one reduction of the gradient, and
            one exchange of the numbers of rows, which is a sync. Under `torch.compile` these
            numbers must be equal.
        dw_out: (rows, D) float32. The backward adds the unrounded gradient of the weight to it, and
            autograd gets no gradient of the weight. This saves a gradient in the dtype of the
            weight. The forward keeps a float32 buffer, and the backward multiplies it with the
            upstream gradient before it adds it, so any upstream gradient is right. An upstream
            gradient of 0 does not remove an inf or NaN of the forward: 0 times inf is NaN, as in
            PyTorch.
        return_entropy: compute the entropy also where the objective does not need it, and compute
            entropy and log-probs of every token that is not masked. The tokens that `compact` left
            out get a pass for their logits, one of the three products, and on a GPU this costs
            another sync.

    The other arguments are those of `grpo_loss`: advantages, rewards, group_size, mask, old_logps,
    ref_logps, importance_weights, token_weights, scores, num_items, loss_scale, cu_seqlens,
    temperature, objective. They are constants; `old_logps` and `ref_logps` may come with a graph,
    which is detached. A factor on the returned loss costs a pass over the gradients of `hidden` and
    the parameters; `loss_scale` costs nothing. Where the mask is 0, `hidden` may hold NaN.

    Returns:
        `LossOutput`. For tokens that were left out, log-probs and entropy are unspecified (0), and
        the metrics do not count them (`metrics["tokens"]` is how many they count). With
        `return_entropy` the metrics count all tokens that are not masked.
        `metrics["skipped_fraction"]` is the share of rows without a gradient pass. The backward
        works once: a second backward, or a second derivative, raises.

    Raises:
        ValueError, TypeError: as in `grpo_loss`.
        NotImplementedError: forward-mode derivatives.
    """
    op = "linear_grpo_loss"
    checks.check_objective(op, objective)
    head = HeadArguments(
        weight=weight,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        lora=lora,
        tp_group=tp_group,
    )
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
    return _loss(hidden, completion_ids, head, given, temperature, compact, dw_out, return_entropy)


class _HiddenCall(NamedTuple):
    """Checked arguments of one call of `linear_grpo_loss`."""

    hidden: Tensor  # (N, D)
    parameters: Parameters
    options: Options
    targets: Targets
    batch: Batch
    terms: Terms
    keep: Tensor | None  # (N,) bool: tokens that may have a gradient; None for all
    with_entropy: bool

    def log_probs(self, mask: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the log-probs and entropies of the tokens in `keep`; the others get 0."""
        targets = replaced(self.targets, mask=mask)
        rest = (self.parameters, targets, keep, self.with_entropy, False, self.options)
        logp, entropy, *_ = linear_logprob_fwd(self.hidden, *rest)
        return logp, entropy


def _loss(
    hidden: Tensor,
    ids: Tensor,
    head: HeadArguments,
    given: LossArguments,
    temperature: float | Tensor,
    compact: bool,
    dw_out: Tensor | None,
    return_entropy: bool,
) -> LossOutput:
    """Check the arguments of `linear_grpo_loss`, choose the tokens that take part, and compute."""
    op, objective = "linear_grpo_loss", given.objective
    flat_hidden, parameters, options, V = check_head(op, hidden, ids, "completion_ids", head)
    device = ids.device
    _check_dw_out(op, dw_out, head.weight, flat_hidden)
    mask = checks.check_mask(op, given.mask, ids, anywhere=True)
    live = to_device(mask, device)
    flat_ids = checks.check_ids(op, "completion_ids", ids, live, V)
    scale = checks.check_temperature(op, temperature, ids, live)
    targets = Targets(flat_ids, live, *scale)
    in_float64 = flat_hidden.dtype == torch.float64
    here = given.here(device)
    batch = check_batch(op, ids, live, here, torch.float64 if in_float64 else torch.float32)
    with_entropy = return_entropy or objective.needs_entropy
    if in_float64:
        exact = float64.log_probs(flat_hidden, parameters, options, targets, temperature)
        result = _in_float64(ids, exact, _with_advantages(batch, ids), objective, with_entropy)
        # The derivative of the objective by a log-prob is a constant to autograd.
        anchors = anchors_of(hidden, *parameters)
        return replaced(result, loss=once_differentiable(op, result.loss, anchors))
    batch = _with_advantages(batch, ids)
    keep = keep_of(ids, (mask, given), (live, here)) if compact else None
    call = _HiddenCall(
        flat_hidden, parameters, options, targets, batch, objective.terms, keep, with_entropy
    )
    kept = to_device(keep, device)
    covered = live if keep is None else kept
    needs = Needs(
        *(
            torch.is_grad_enabled() and x is not None and x.requires_grad
            for x in (flat_hidden, *parameters)
        )
    )
    if any(needs):
        packed = compact and given.cu_seqlens is not None
        loss, out = _with_gradients(call, needs, dw_out, packed)
    else:
        logp, entropy = call.log_probs(live, keep)
        found = values(logp, entropy, replaced(batch, mask=covered), call.terms)
        loss = found.loss.sum()
        out = Outputs(found.loss, logp, entropy, found.kl, found.clip)
    if return_entropy and keep is not None:
        out, covered = _with_others(call, mask, out), live
    if not with_entropy:
        out = replaced(out, entropy=None)
    result = loss_output(ids, out, replaced(batch, mask=covered))
    skipped = torch.zeros((), dtype=torch.float32, device=device)
    if keep is not None and keep.numel():
        skipped = 1 - kept.float().mean()
    loss = once_differentiable(op, loss, anchors_of(hidden, *parameters))
    return replaced(result, loss=loss, metrics={**result.metrics, "skipped_fraction": skipped})


def _with_advantages(batch: Batch, ids: Tensor) -> Batch:
    """Replace the rewards of a batch by advantages, which compaction needs before the launch."""
    rewards = batch.rewards
    if rewards.values is None:
        return batch
    double = batch.tokens.weight.dtype == torch.float64
    score = (float64.z_scores if double else z_scores)(rewards.values, rewards.group_size)
    rows = ids[None] if ids.ndim == 1 else ids
    tokens = replaced(batch.tokens, advantages=spread(score, rows.shape, rewards.sequence))
    return replaced(batch, tokens=tokens, rewards=Rewards())


def _with_gradients(
    call: _HiddenCall, needs: Needs, dw_out: Tensor | None, packed: bool
) -> tuple[Tensor, Outputs]:
    """Compute the loss, the values of each token, and the gradients, in one operator."""
    modes, everyone = call.terms.modes, call.keep
    off_policy = not coefficients_known(call.batch.tokens.old_logp, modes)
    by_sequence = modes.needs_sequences and not modes.by_entropy
    # With a frozen head and no bonus the coefficients may come late: then there is no second phase anyway.
    trained = needs.parameters or modes.has_bonus or bool(call.options.tp_group)
    if packed and call.keep is None and by_sequence and off_policy and trained:
        # With a mask the operator may wait for the boundaries of sequences, which saves the second
        # phase.
        everyone = torch.ones(call.targets.ids.numel(), dtype=torch.bool)
    arguments = LinearArguments(
        parameters=call.parameters,
        targets=call.targets,
        tokens=call.batch.tokens,
        with_entropy=call.with_entropy,
        terms=call.terms,
        keep=everyone,
        sequences=call.batch.sequences,
        options=call.options,
        needs=needs,
        dw_out=dw_out,
    )
    loss, *found = linear_grpo(call.hidden, *arguments)
    return loss, Outputs(*found[:5])


def _with_others(call: _HiddenCall, mask: Tensor | None, out: Outputs) -> Outputs:
    """Add the log-probs and entropies of the tokens without a gradient, and compute the losses again."""
    keep = call.keep
    assert keep is not None
    alive = mask if mask is None or mask.device == keep.device else call.targets.mask
    others = ~keep if alive is None else alive & ~keep
    with torch.no_grad():
        logp, entropy = call.log_probs(None, others)
        logp, entropy = out.logp + logp, out.entropy + entropy  # one of the two is 0
        found = values(logp, entropy, call.batch, call.terms)
    return Outputs(found.loss, logp, entropy, found.kl, found.clip)


def _in_float64(
    like: Tensor,
    scored: tuple[Tensor, Tensor],
    batch: Batch,
    objective: Objective,
    with_entropy: bool,
) -> LossOutput:
    """Make the output from float64 log-probs and entropies.

    The metrics are float32 and count every token that is not masked.
    """
    logp, entropy = scored
    found = values(logp, entropy, batch, objective.terms)
    share = batch.sequences.share
    rounded = replaced(
        batch,
        tokens=Tokens(*(None if x is None else x.float() for x in batch.tokens)),  # type: ignore[arg-type]
        sequences=replaced(batch.sequences, share=None if share is None else share.float()),
    )
    logp, entropy = logp.detach(), entropy.detach()
    out = Outputs(
        found.loss.detach().float(), logp.float(), entropy.float(), found.kl.float(), found.clip
    )
    if not with_entropy:
        out = replaced(out, entropy=None)
    result = loss_output(like, out, rounded)
    skipped = torch.zeros((), dtype=torch.float32, device=like.device)
    return replaced(
        result,
        loss=found.loss.sum(),
        logps=logp.view(like.shape),
        entropy=entropy.view(like.shape) if with_entropy else None,
        metrics={**result.metrics, "skipped_fraction": skipped},
    )


def _check_dw_out(op: str, dw_out: Tensor | None, weight: Tensor, hidden: Tensor) -> None:
    if dw_out is None:
        return
    checks.check_tensor(op, "dw_out", dw_out)
    if hidden.dtype == torch.float64:
        raise ValueError(f"{op}: dw_out is float32, and not available with float64 operands")
    if dw_out.dtype != torch.float32 or dw_out.shape != weight.shape:
        raise ValueError(
            f"{op}: dw_out: want float32 {tuple(weight.shape)}, "
            f"got {dw_out.dtype} {checks.shape_of(dw_out)}"
        )
    checks.check_device(op, "dw_out", dw_out, weight)
    if torch._debug_has_internal_overlap(dw_out) == 1:
        raise ValueError(
            f"{op}: dw_out: its rows overlap, strides {dw_out.stride()}: the gradient is added to each"
        )
    if not weight.requires_grad:
        raise ValueError(f"{op}: dw_out has no effect: weight does not require grad")
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: dw_out is not available under torch.compile")
