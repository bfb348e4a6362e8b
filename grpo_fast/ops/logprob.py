"""Differentiable token log-probs and entropy (kernels: `grpo_fast.kernels.logprob`)."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from grpo_fast._names import keywords_explained
from grpo_fast.ops import _arguments, _rows
from grpo_fast.ops._autograd import anchors_of, once_differentiable, without_graph
from grpo_fast.ops._backend import launch, use_triton


def read_rows(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: Tensor,
    with_entropy: bool,
    softcap: _rows.SoftCap | None = None,
    out: tuple[Tensor, ...] | None = None,
    arrived: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """logp, entropy ((0,) unless wanted), and the row statistics that the gradient needs; (N,) fp32.

    Args:
        logits: (B, T, V), B T = N. ids, mask, temperature: (N,). inv_temperature: 0-dim, on the CPU.
        out: what is returned, to be written; None: made here.
        arrived: as the launcher takes it.
    """
    common = inv_temperature.item()
    if use_triton(logits):
        from grpo_fast.kernels import logprob as kernels

        given = None if out is None else (out[0], out[1] if with_entropy else None, *out[2:])
        logp, entropy, m, s = launch(
            kernels.logprob_fwd,
            logits,
            logits,
            ids,
            mask,
            temperature,
            common,
            with_entropy,
            *(softcap or (None, None)),
            given,
            arrived,
        )
        if out is not None:
            return out
        return logp, logp.new_empty(0) if entropy is None else entropy, m, s
    N = ids.numel()
    logp, entropy, top = (logits.new_zeros(N, dtype=torch.float32) for _ in range(3))
    total = logits.new_ones(N, dtype=torch.float32)
    for rows, (block,) in _rows.row_blocks(logits):
        live = _rows.live_rows(mask, rows)
        z = block if live is None else block[live]
        where = rows if live is None else live + rows.start
        work = torch.empty(z.shape, dtype=torch.float32, device=z.device)
        scale = common if temperature is None else 1 / temperature[where]
        if softcap is not None:
            z = softcap.apply(z)
        _, statistics, _ = _rows.exponentials(z, ids[where].long(), scale, work, with_entropy)
        logp[where], top[where], total[where] = statistics.logp, statistics.top, statistics.total
        if statistics.entropy is not None:
            entropy[where] = statistics.entropy
    found = logp, entropy if with_entropy else entropy.new_empty(0), top, total
    for x, y in zip(out or (), found, strict=False):
        x.copy_(y)
    return out or found


@torch.library.custom_op("grpo_fast::logprob_fwd", mutates_args=())
def logprob_fwd(
    logits: Tensor,  # (B, T, V)
    ids: Tensor,  # (N,)
    mask: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: Tensor,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`read_rows` as an operator."""
    logp, entropy, top, total = read_rows(
        logits, ids, mask, temperature, inv_temperature, with_entropy
    )
    return logp, entropy, top, total


@logprob_fwd.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: Tensor,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = ids.shape[0]
    vectors = [logits.new_empty(n, dtype=torch.float32) for n in (N, N * with_entropy, N, N)]
    return vectors[0], vectors[1], vectors[2], vectors[3]


def write_rows(
    dlogp: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: Tensor,
    logp: Tensor,
    entropy: Tensor,
    top: Tensor,
    total: Tensor,
    dlogits: Tensor,
    softcap: _rows.SoftCap | None = None,
) -> None:
    """Write the gradient into `dlogits`, (B, T, V), which may be `logits`.

    ids: -1 where no column is scored.
    """
    common = inv_temperature.item()
    if use_triton(logits):
        from grpo_fast.kernels import logprob as kernels

        with_entropy = None if dentropy is None else entropy
        launch(
            kernels.logprob_bwd,
            logits,
            dlogp.contiguous(),
            None if dentropy is None else dentropy.contiguous(),
            logits,
            ids,
            mask,
            temperature,
            common,
            logp,
            with_entropy,
            top,
            total,
            dlogits,
            *(softcap or ()),
        )
        return
    for rows, (block, dblock) in _rows.row_blocks(logits, dlogits):
        live = _rows.live_rows(mask, rows)
        where = rows if live is None else live + rows.start
        z = block if live is None else block[live]
        if softcap is not None:
            z = softcap.apply(z)
        direct = live is None and dblock.dtype == torch.float32
        out = dblock if direct else torch.empty(z.shape, dtype=torch.float32, device=z.device)
        scale = common if temperature is None else 1 / temperature[where]
        u = _rows.scaled_difference(z, top[where][:, None], scale, out)
        e = u.exp() if dentropy is not None else u.exp_()
        statistics = _rows.Statistics(
            logp[where], None if dentropy is None else entropy[where], top[where], total[where]
        )
        dz = _rows.gradient(
            e,
            u if dentropy is not None else None,
            ids[where].long(),
            dlogp[where],
            None if dentropy is None else dentropy[where],
            statistics,
            scale,
            None if softcap is None else softcap.slope(z),
        )
        _rows.store(dblock, live, dz)


@torch.library.custom_op("grpo_fast::logprob_bwd", mutates_args=())
def logprob_bwd(
    dlogp: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: Tensor,
    logp: Tensor,
    entropy: Tensor,
    top: Tensor,
    total: Tensor,
) -> Tensor:
    """dlogits, (B, T, V), in the dtype of `logits`."""
    dlogits = _rows.new_gradient(logits)
    row_arguments = (ids, mask, temperature, inv_temperature, logp, entropy, top, total)
    write_rows(dlogp, dentropy, logits, *row_arguments, dlogits)
    return dlogits


@logprob_bwd.register_fake
def _(dlogp: Tensor, dentropy: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
    return _rows.new_gradient(logits)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.with_entropy = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


@without_graph("logprob")
def _backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, *_: Any) -> tuple:
    logits, ids, mask, temperature, inv_temperature, *statistics = ctx.saved_tensors
    logp, entropy, top, total = statistics
    if not ctx.with_entropy:
        dentropy = None
    if dlogp is None and dentropy is None:
        return (None,) * 6
    dlogits = logprob_bwd(
        torch.zeros_like(logp) if dlogp is None else dlogp,
        dentropy,
        logits,
        ids,
        mask,
        temperature,
        inv_temperature,
        logp,
        entropy,
        top,
        total,
    )
    return dlogits, None, None, None, None, None


logprob_fwd.register_autograd(_backward, setup_context=_setup_context)


@overload
def logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@keywords_explained()
def logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of `ids` under `softmax(logits / temperature)`, and its entropy, in one read of the logits.

    Equivalent to `(logits / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)`, computed
    in float32 whatever the dtype of `logits`, without a tensor of the size of `logits`. Differentiable in
    both outputs; the gradient of a confident token does not round to 0. On a GPU a row has the same bits in
    any batch if 8 divides V and the strides of `logits`; otherwise its last bit may depend on its place.

    Args:
        logits: (B, T, V) or (N, V), float32, bfloat16 or float16; the last dimension contiguous, the
            others may be strided (`logits[:, :-1]` is not copied).
        ids: (B, T) or (N,), int32 or int64, each in [0, V) where the mask is not 0.
        temperature: positive; a number, or one per token.
        mask: (B, T) or (N,); rows where it is 0 are not read, may hold NaN, and get no gradient. Their
            log-prob and entropy are unspecified (finite).
        return_entropy: also return the entropy in nats.

    Returns:
        log-probs, float32, of the shape of `ids`; with `return_entropy` a tuple (log-probs, entropy).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a temperature that is not
            positive, ids outside the vocabulary (checked on the CPU, or with GRPO_FAST_VALIDATE=1;
            else the kernels give NaN for them).
    """
    logits3 = _arguments.check_logits("logprob", logits, ids, "ids")
    _arguments.check_device("logprob", "ids", ids, logits)
    mask = _arguments.check_mask("logprob", mask, ids)
    flat_ids = _arguments.check_ids("logprob", "ids", ids, mask, logits.shape[-1])
    temperatures, inv_temperature = _arguments.check_temperature("logprob", temperature, ids, mask)
    logp, entropy, _, _ = logprob_fwd(
        logits3, flat_ids, mask, temperatures, inv_temperature, return_entropy
    )
    anchors = anchors_of(logits)
    logp = once_differentiable("logprob", logp, anchors)
    if return_entropy:
        entropy = once_differentiable("logprob", entropy, anchors)
        return logp.view(ids.shape), entropy.view(ids.shape)
    return logp.view(ids.shape)
