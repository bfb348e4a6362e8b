"""`linear_grpo_loss`: the loss on hidden states, the logits never in memory."""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast import checks
from grpo_fast.loss.arguments import LossArguments, check_batch, check_objective, to_device
from grpo_fast.loss.compaction import keep_of
from grpo_fast.loss.output import LossOutput, loss_output
from grpo_fast.objective import OPTIONS, Objective
from grpo_fast.operands import Terms
from grpo_fast.ops.autograd import anchors_of, once_differentiable
from grpo_fast.ops.coefficients import Batch, known_on_policy, values
from grpo_fast.ops.group_advantage import z_scores
from grpo_fast.ops.head import float64
from grpo_fast.ops.head.arguments import HeadArguments, Needs, Options, Parameters, check_head
from grpo_fast.ops.linear_grpo import linear_grpo
from grpo_fast.ops.linear_logprob import linear_logprob_fwd
from grpo_fast.records import Outputs, Rewards, Targets, Tokens, flat
from grpo_fast.sequences import spread
from grpo_fast.spelling import keywords_explained


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
    """The GRPO loss from the last hidden states and the head, with its gradients, the logits never in memory.

    Equivalent to `grpo_loss(cap(logit_scale * (hidden @ weight.T + bias)), completion_ids, ...)` with
    `cap(x) = softcap * tanh(x / softcap)`, the logits living in one chunk of tokens at a time. The gradients
    are computed in the forward: three matrix products, two where the head is frozen. Beyond the gradients
    and a float32 gradient of the weight, memory does not grow with the number of tokens; in float16 that of
    `hidden` is float32 until the backward, so that a loss scale keeps it from underflow.

    Args:
        hidden: (B, T, D) or (N, D), float32, bfloat16, float16 or float64: the last hidden states, row t
            for token t. The products are of its dtype.
        weight: (rows, D) of the head, of any of these dtypes: converted to that of `hidden` for the
            products, its gradient accumulated in float32 and of its own dtype. Under FSDP call this inside
            the forward of the module that owns it, where it has been gathered. Where `hidden`, weight, bias
            or `lora` is float64, all of it is, loss, log-probs and entropy too: `grpo_fast.reference` in
            chunks of tokens, for models whose digits matter more than their speed. No token is left out
            then, and there is no `dw_out` and no `tp_group`.
        completion_ids: (B, T) or (N,), int32 or int64; anything where the mask is 0.
        bias: (rows,).
        softcap: of the logits (Gemma 2); None for none.
        logit_scale: positive factor on the logits (Cohere).
        logits_dtype: "fp32": logits of half-precision operands are not rounded. "bf16": they are rounded to
            the operands' dtype, as a model's own head does; less workspace.
        vocab_size: rows of `weight` that are vocabulary; those after it are padding, their gradient is 0.
        compact: leave tokens that cannot have a gradient out of all products: masked ones, those whose
            weight is 0, and, with beta = 0 and no entropy bonus, those whose advantage or importance weight
            is 0 (for an objective that looks at sequences: sequences of such tokens). Their number must
            reach the host: on a GPU one sync. For an objective of the token there is none if `mask`,
            `token_weights`, `cu_seqlens` and `advantages` or `rewards`, as far as given, are on the CPU,
            which is allowed. Loss and gradients are the same up to the order of summation. Without it the
            ends of packed sequences stay on the device, and objectives on sequences take two phases (four
            products), unless on policy or the head is frozen.
        chunk_size: tokens per chunk. Every product has exactly so many rows. Default: chosen from the
            number of tokens and the device.
        lora: (A (r, D), B (rows, r), scaling): adds `scaling * (hidden @ A.T) @ B.T` to the logits.
        tp_group: processes that share the vocabulary. Each gives its rows of weight, bias and `lora`'s B,
            consecutive in the order of the ranks, and everything else alike; ids and `vocab_size` are of the
            whole vocabulary. Each gets the same loss and log-probs and the whole gradient of `hidden`. One
            all-gather of four numbers per token and chunk, one reduction of the gradient, and one look at
            each other's numbers of rows, a sync (compiled: they must be equal).
        dw_out: (rows, D) float32: the backward adds the gradient of the weight to it, unrounded, instead of
            handing it to autograd, which sees none. The float32 buffer of the forward is added, so that any
            upstream gradient is right; it saves the gradient in the dtype of the weight. An upstream gradient
            of 0 does not undo an inf or NaN of the forward, here as in PyTorch: 0 times inf is NaN.
        return_entropy: compute the entropy also where the objective does not need it, and it and the
            log-probs of every token that is not masked: those that `compact` left out of the gradient get a
            pass for their logits, one of the three products, and on a GPU another sync.
        advantages, rewards, group_size, mask, old_logps, ref_logps, importance_weights, token_weights,
            scores, num_items, loss_scale, cu_seqlens, temperature, objective: as in `grpo_loss`: constants,
            `old_logps` and `ref_logps` with a graph too. A factor on the loss costs a pass over the gradients
            of `hidden` and the parameters, where `loss_scale` costs nothing. Where the mask is 0, `hidden`
            may hold NaN.

    Returns:
        `LossOutput`. Log-probs and entropy of tokens left out are unspecified (0), and the metrics are of
        the tokens that were computed (`metrics["tokens"]` of them); with `return_entropy` that is all that
        are not masked. `metrics["skipped_fraction"]` is the share of rows without a gradient pass. backward
        works once: a second one, or a second derivative, raises.

    Raises:
        ValueError, TypeError: as `grpo_loss`.
        NotImplementedError: forward-mode derivatives.
    """
    op = "linear_grpo_loss"
    check_objective(op, objective)
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


class _Call(NamedTuple):
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
        """Log-probs and entropies of the tokens in `keep`, 0 elsewhere."""
        targets = self.targets._replace(mask=mask)
        rest = flat(self.parameters, targets, keep, self.with_entropy, False, self.options)
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
    """Check the arguments of `linear_grpo_loss`, choose tokens, and compute."""
    op, objective, device = "linear_grpo_loss", given.objective, ids.device
    flat_hidden, parameters, options, V = check_head(op, hidden, ids, "completion_ids", head)
    _check_dw_out(op, dw_out, head.weight, flat_hidden)
    mask = checks.check_mask(op, given.mask, ids, anywhere=True)
    live = to_device(mask, device)
    flat_ids = checks.check_ids(op, "completion_ids", ids, live, V)
    scale = checks.check_temperature(op, temperature, ids, live)
    targets = Targets(flat_ids, live, *scale)
    in_float64 = flat_hidden.dtype == torch.float64
    batch = check_batch(
        op, ids, live, given.here(device), flat_hidden.dtype if in_float64 else torch.float32
    )
    with_entropy = return_entropy or objective.needs_entropy
    if in_float64:
        exact = float64.log_probs(flat_hidden, parameters, options, targets, temperature)
        return _in_float64(ids, exact, _with_advantages(batch, ids), objective, with_entropy)
    batch = _with_advantages(batch, ids)
    keep = keep_of(ids, mask, live, given) if compact else None
    call = _Call(
        flat_hidden, parameters, options, targets, batch, objective.terms, keep, with_entropy
    )
    covered = live if keep is None else to_device(keep, device)
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
        found = values(logp, entropy, batch._replace(mask=covered), call.terms)
        loss = found.loss.sum()
        out = Outputs(found.loss, logp, entropy, found.kl, found.clip)
    if return_entropy and keep is not None:
        out, covered = _with_others(call, mask, out), live
    if not with_entropy:
        out = out._replace(entropy=None)  # type: ignore[arg-type]
    result = loss_output(ids, out, batch._replace(mask=covered))
    skipped = torch.zeros((), dtype=torch.float32, device=device)
    if keep is not None and keep.numel():
        skipped = 1 - to_device(keep, device).float().mean()
    loss = once_differentiable(op, loss, anchors_of(hidden, *parameters))
    return result._replace(loss=loss, metrics={**result.metrics, "skipped_fraction": skipped})


def _with_advantages(batch: Batch, ids: Tensor) -> Batch:
    """Advantages in the place of rewards: compaction wants them before the launch."""
    rewards = batch.rewards
    if rewards.values is None:
        return batch
    double = batch.tokens.weight.dtype == torch.float64
    score = (float64.z_scores if double else z_scores)(rewards.values, rewards.group_size)
    rows = ids[None] if ids.ndim == 1 else ids
    tokens = batch.tokens._replace(advantages=spread(score, rows.shape, rewards.sequence))
    return batch._replace(tokens=tokens, rewards=Rewards(None, 1, None))


def _with_gradients(
    call: _Call, needs: Needs, dw_out: Tensor | None, packed: bool
) -> tuple[Tensor, Outputs]:
    """Compute the loss, what is known of each token, and the gradients, in one operator."""
    modes, everyone = call.terms.modes, call.keep
    off_policy = not known_on_policy(call.batch.tokens.old_logp, modes)
    by_sequence = modes.needs_sequences and not modes.by_entropy
    # With a frozen head and no bonus the coefficients may come late: no second phase either way.
    trained = needs.parameters or modes.has_bonus or bool(call.options.tp_group)
    if packed and call.keep is None and by_sequence and off_policy and trained:
        # Given a mask the operator may wait for the ends of sequences: no second phase then.
        everyone = torch.ones(call.targets.ids.numel(), dtype=torch.bool)
    loss, *found = linear_grpo(
        call.hidden,
        *flat(call.parameters, call.targets, call.batch.tokens, call.with_entropy, call.terms),
        *flat(everyone, call.batch.sequences, call.options, needs, dw_out),
    )
    return loss, Outputs(*found[:5])


def _with_others(call: _Call, mask: Tensor | None, out: Outputs) -> Outputs:
    """Log-probs and entropies of the tokens without a gradient as well, and what follows from them."""
    keep = call.keep
    assert keep is not None
    alive = mask if mask is None or mask.device == keep.device else call.targets.mask
    others = ~keep if alive is None else alive & ~keep
    with torch.no_grad():
        logp, entropy = call.log_probs(None, others)
        logp, entropy = out.logp + logp, out.entropy + entropy  # each 0 where the other is not
        found = values(logp, entropy, call.batch, call.terms)
    return Outputs(found.loss, logp, entropy, found.kl, found.clip)


def _in_float64(
    like: Tensor,
    scored: tuple[Tensor, Tensor],
    batch: Batch,
    objective: Objective,
    with_entropy: bool,
) -> LossOutput:
    """The loss of float64 log-probs and entropies; the metrics in float32, of every live token."""
    logp, entropy = scored
    found = values(logp, entropy, batch, objective.terms)
    share = batch.sequences.share
    rounded = batch._replace(
        tokens=Tokens(*(None if x is None else x.float() for x in batch.tokens)),  # type: ignore[arg-type]
        sequences=batch.sequences._replace(share=None if share is None else share.float()),
    )
    logp, entropy = logp.detach(), entropy.detach()
    out = Outputs(
        found.loss.detach().float(), logp.float(), entropy.float(), found.kl.float(), found.clip
    )
    if not with_entropy:
        out = out._replace(entropy=None)  # type: ignore[arg-type]
    result = loss_output(like, out, rounded)
    skipped = torch.zeros((), dtype=torch.float32, device=like.device)
    return result._replace(
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
