"""Log-probs and entropies of tokens from hidden states, without the logits of all tokens in memory.

The language-model head runs in chunks of tokens (`grpo_fast.ops.head`).
"""

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast import checks
from grpo_fast.notices import logged
from grpo_fast.ops.autograd import anchors_of, once_differentiable, without_graph
from grpo_fast.ops.head import float64
from grpo_fast.ops.head.arguments import HeadArguments, Needs, Options, Parameters, check_head
from grpo_fast.ops.head.chunked import Head
from grpo_fast.ops.head.passes import (
    NO_GRADIENT,
    empty_gradients,
    kept_rows,
    read_all,
    read_with_unit_gradient,
    scaled,
    scatter_rows,
    write_all,
)
from grpo_fast.ops.operator import operator
from grpo_fast.ops.scaling import weigh_rows
from grpo_fast.records import RowStatistics, Targets, flat, select, unflatten
from grpo_fast.spelling import keywords_explained

# The arguments of the two operators.
FORWARD = {
    "hidden": Tensor,
    "parameters": Parameters,
    "targets": Targets,
    "keep": Tensor | None,  # (N,) bool, on any device: the rows that take part
    "with_entropy": bool,
    "unit": bool,  # compute the gradient of each log-prob in its hidden state
    "options": Options,
}
BACKWARD = {
    "dlogp": Tensor,
    "dentropy": Tensor | None,
    "hidden": Tensor,
    "parameters": Parameters,
    "targets": Targets,
    "keep": Tensor | None,
    "statistics": RowStatistics,
    "needs": Needs,
    "options": Options,
}
five = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


@logged("operator linear_logprob", inner=True)
def _forward(
    hidden: Tensor,
    parameters: Parameters,
    targets: Targets,
    keep: Tensor | None,
    with_entropy: bool,
    unit: bool,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `RowStatistics`, and with `unit` the gradient of each log-prob in its hidden state."""
    rows = kept_rows(keep, hidden)
    if keep is not None:  # `keep` holds no masked row
        targets = targets._replace(mask=None)
    needs = NO_GRADIENT._replace(hidden=unit)
    head = Head(hidden, parameters, options, rows, targets.mask, needs)
    targets = select(scaled(targets, options), rows)
    N = len(hidden)
    if unit:
        logp = scatter_rows(read_with_unit_gradient(head, targets)[0], rows, N)
        nothing = [logp.new_empty(0) for _ in range(3)]
        return logp, nothing[0], nothing[1], nothing[2], head.hidden_gradient()
    logp, entropy, top, total = read_all(head, targets, with_entropy)
    return (
        scatter_rows(logp, rows, N),
        scatter_rows(entropy, rows, N, computed=with_entropy),
        scatter_rows(top, rows, N),
        scatter_rows(total, rows, N, 1.0),
        hidden.new_empty(0),
    )


def _fake_forward(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, targets, _, with_entropy, unit, _ = arguments
    N = targets.ids.shape[0]
    scored, kept = N if with_entropy else 0, 0 if unit else N
    vectors = [hidden.new_empty(n, dtype=torch.float32) for n in (N, scored, kept, kept)]
    return (*vectors, hidden.new_empty(hidden.shape if unit else 0))


def _backward_pass(
    dlogp: Tensor, dentropy: Tensor | None, hidden: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in the order of `Needs`, (0,) where not wanted."""
    parameters, targets, keep, statistics, needs, options = arguments
    rows = kept_rows(keep, hidden)
    if keep is not None:
        targets = targets._replace(mask=None)
    head = Head(hidden, parameters, options, rows, targets.mask, needs)
    write_all(
        head,
        select(scaled(targets, options), rows),
        dlogp if rows is None else dlogp[rows],
        dentropy if rows is None or dentropy is None else dentropy[rows],
        select(statistics, rows),
    )
    return head.gradients()


def _fake_backward(
    dlogp: Tensor, dentropy: Tensor | None, hidden: Tensor, *arguments: Any
) -> tuple:
    parameters, *_, needs, _ = arguments
    return empty_gradients(hidden, parameters, needs)


linear_logprob_bwd = operator(
    "linear_logprob_bwd",
    _backward_pass,
    BACKWARD,
    five,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, parameters, targets, keep, _, ctx.unit, options = inputs
    if ctx.unit:  # the hidden states themselves are not needed any more
        ctx.save_for_backward(output[4])
    else:
        saved = flat(hidden, parameters, targets, keep, *output[:4], options)
        tensors = [x for x in saved if x is None or isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = saved[len(tensors) :]  # the last options are no tensors
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


@without_graph("linear_logprob")
def _backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, *_: Any) -> tuple:
    if ctx.unit:
        (dhidden,) = ctx.saved_tensors
        return () if dlogp is None else (weigh_rows(dhidden, dlogp),)
    kinds = [Tensor, Parameters, Targets, Tensor, RowStatistics, Options]
    saved = unflatten([*ctx.saved_tensors, *ctx.others], *kinds)
    hidden, parameters, targets, keep, statistics, options = saved
    if not statistics.entropy.shape[0]:
        dentropy = None
    needs = Needs(*ctx.needs_input_grad[:5])
    if (dlogp is None and dentropy is None) or not any(needs):
        return ()
    if dlogp is None:
        dlogp = torch.zeros_like(statistics.logp)
    rest = (parameters, targets, keep, statistics, needs, options)
    gradients = linear_logprob_bwd(dlogp, dentropy, hidden, *rest)
    return tuple(
        g.to(x.dtype) if n and x is not None else None
        for g, x, n in zip(gradients, (hidden, *parameters), needs, strict=True)
    )


linear_logprob_fwd = operator(
    "linear_logprob_fwd",
    _forward,
    FORWARD,
    five,
    fake=_fake_forward,
    backward=_backward,
    setup_context=_setup_context,
    differentiable=2,
)


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    logits_dtype: Literal["fp32", "bf16"] = ...,
    vocab_size: int | None = ...,
    compact: bool = ...,
    chunk_size: int | None = ...,
    lora: tuple[Tensor, Tensor, float] | None = ...,
    tp_group: dist.ProcessGroup | None = ...,
) -> Tensor: ...
@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
    logits_dtype: Literal["fp32", "bf16"] = ...,
    vocab_size: int | None = ...,
    compact: bool = ...,
    chunk_size: int | None = ...,
    lora: tuple[Tensor, Tensor, float] | None = ...,
    tp_group: dist.ProcessGroup | None = ...,
) -> tuple[Tensor, Tensor]: ...
@logged("linear_logprob")
@keywords_explained()
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    logits_dtype: Literal["fp32", "bf16"] = "fp32",
    vocab_size: int | None = None,
    compact: bool = True,
    chunk_size: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-prob of each id under the head's distribution, without all logits in memory.

    With `cap(x) = softcap * tanh(x / softcap)` its values and gradients are those of

        logprob(cap(logit_scale * (hidden @ weight.T + bias)), ids, ...)

    For example:

        >>> hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4, requires_grad=True)
        >>> ids, bias = torch.randint(7, (2, 3)), torch.randn(7)
        >>> logp = linear_logprob(hidden, weight, ids, bias=bias)
        >>> want = logprob(hidden @ weight.T + bias, ids)
        >>> torch.testing.assert_close(logp, want)
        >>> torch.testing.assert_close(*(torch.autograd.grad(x.sum(), weight) for x in (logp, want)))

    Only the logits of one chunk of tokens exist at a time. The results are differentiable in
    `hidden`, `weight`, `bias` and `lora`, for any gradient of both. The backward computes each
    chunk of logits again: 8 N D V operations in all; 4 N D V where only `hidden` wants a gradient
    and there is no entropy; 2 N D V without a gradient. A second derivative raises.

    Args:
        hidden: (B, T, D) or (N, D), float32, bfloat16, float16 or float64: the last hidden states.
            Row t scores token t. The matrix products are in this dtype.
        weight: (rows, D) of the head, of any of these dtypes. It is converted to the dtype of
            `hidden` for the products. Its gradient is accumulated in float32 and returned in the
            dtype of `weight`. If `hidden`, `weight`, `bias` or `lora` is float64, everything is
            computed in float64, results too, by PyTorch's operators in chunks of tokens. This is
            for models that need all digits and not speed.
        ids: (B, T) or (N,), int32 or int64, each in [0, vocab_size) where the mask is not 0.
        bias: (rows,).
        softcap: bound of the logits, as in the formula above (Gemma 2); None for none.
        logit_scale: positive factor on the logits (Cohere).
        temperature: positive; a number, or one per token.
        mask: one per token. Where it is 0 nothing is read (`hidden` may hold NaN there) and there
            is no gradient; log-prob and entropy are unspecified (finite).
        return_entropy: also return the entropy.
        logits_dtype: "fp32": the logits of half-precision operands are not rounded. "bf16": they
            are rounded to the dtype of the operands, as in the model's own head; this takes less
            workspace.
        vocab_size: how many rows of `weight` are vocabulary; the rows after them are padding.
            Default: all.
        compact: leave masked tokens out of the products. Their number must reach the host: one sync
            on a GPU, unless `mask` is on the CPU.
        chunk_size: tokens per chunk; every matrix product has exactly this number of rows. At the
            same `chunk_size` the result of a row depends on the rest of the batch only as far as
            the matrix library makes it. Default: chosen from the number of tokens and the device.
        lora: (A (r, D), B (rows, r), scaling): adds `scaling * (hidden @ A.T) @ B.T` to the logits.
        tp_group: processes that share the vocabulary, as in `linear_grpo_loss`.

    Returns:
        The log-probs in nats, float32 (or float64), of the shape of `ids`. With `return_entropy` a
        tuple (log-probs, entropies), both in nats.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it. Values are
            checked as in `logprob`.
        NotImplementedError: forward-mode derivatives.

    Source: online softmax, arXiv 1805.02867.
    """
    op = "linear_logprob"
    flat_hidden, parameters, options, V = check_head(
        op,
        hidden,
        ids,
        "ids",
        HeadArguments(
            weight=weight,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            logits_dtype=logits_dtype,
            vocab_size=vocab_size,
            chunk_size=chunk_size,
            lora=lora,
            tp_group=tp_group,
        ),
    )
    given = checks.check_mask(op, mask, ids, anywhere=True)
    keep = given if compact else None
    live = None if given is None else given.to(ids.device, non_blocking=True)
    flat_ids = checks.check_ids(op, "ids", ids, live, V)
    targets = Targets(flat_ids, live, *checks.check_temperature(op, temperature, ids, live))
    if flat_hidden.dtype == torch.float64:
        exact = float64.log_probs(flat_hidden, parameters, options, targets, temperature)
        found = tuple(x.view(ids.shape) for x in exact)
        return (found[0], found[1]) if return_entropy else found[0]
    frozen = not any(x is not None and x.requires_grad for x in parameters)
    unit = torch.is_grad_enabled() and hidden.requires_grad and frozen
    unit = unit and not (return_entropy or tp_group)
    logp, entropy, *_ = linear_logprob_fwd(
        flat_hidden, parameters, targets, keep, return_entropy, unit, options
    )
    anchors = anchors_of(hidden, *parameters)
    logp = once_differentiable(op, logp, anchors)
    if return_entropy:
        entropy = once_differentiable(op, entropy, anchors)
        return logp.view(ids.shape), entropy.view(ids.shape)
    return logp.view(ids.shape)
