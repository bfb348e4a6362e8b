"""Log-probs and entropies of tokens from logits, as operators and as the public function."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from grpo_fast import checks
from grpo_fast.notices import logged
from grpo_fast.ops.autograd import anchors_of, once_differentiable, without_graph
from grpo_fast.ops.backend import note_schedule, run
from grpo_fast.ops.operator import operator
from grpo_fast.records import RowStatistics, SoftCap, Targets, unflatten
from grpo_fast.spelling import keywords_explained
from grpo_fast.torch_kernels.rows import new_gradient

FORWARD = {"logits": Tensor, "targets": Targets, "with_entropy": bool}
BACKWARD = {
    "dlogp": Tensor,
    "dentropy": Tensor | None,
    "logits": Tensor,
    "targets": Targets,
    "statistics": RowStatistics,
}


def read_rows(
    logits: Tensor,
    targets: Targets,
    with_entropy: bool,
    softcap: SoftCap | None = None,
    out: RowStatistics | None = None,
    arrived: Tensor | None = None,
) -> RowStatistics:
    """Compute the log-probs of rows, and the statistics that the gradient needs.

    The entropy is (0,) unless wanted.

    Args:
        logits: (B, T, V), B T = N.
        out: the vectors to write; None: they are made here.
        arrived: (N,) int32 zeros, in which the programs of a row count themselves; None: made where
            needed.
    """
    targets = targets._replace(inv_temperature=targets.inv_temperature.item())
    if out is not None and not with_entropy:
        out = out._replace(entropy=None)
    given = (logits, targets, with_entropy, softcap, out, arrived)
    found = run("logprob.logprob_fwd", logits, *given)
    note_schedule("logprob.schedule_of", logits, logits, softcap)
    if not with_entropy:
        found = found._replace(entropy=logits.new_empty(0, dtype=torch.float32))
    return found


def write_rows(
    dlogp: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Targets,
    statistics: RowStatistics,
    dlogits: Tensor,
    softcap: SoftCap | None = None,
) -> None:
    """Write the gradient of logits (B, T, V) into `dlogits`, which may be `logits`.

    Args:
        targets: an id of -1 says that no column of this row is scored.
        statistics: what `read_rows` returned.
    """
    targets = targets._replace(inv_temperature=targets.inv_temperature.item())
    if dentropy is None:
        statistics = statistics._replace(entropy=None)
    given = (dlogp, dentropy, logits, targets, statistics, dlogits, softcap)
    run("logprob.logprob_bwd", logits, *given)


@logged("operator logprob_fwd", inner=True)
def _logprob_fwd(logits: Tensor, targets: Targets, with_entropy: bool) -> tuple[Tensor, ...]:
    """Call `read_rows` on logits (B, T, V), as an operator."""
    return tuple(read_rows(logits, targets, with_entropy))


def _fake_fwd(logits: Tensor, targets: Targets, with_entropy: bool) -> tuple[Tensor, ...]:
    N = targets.ids.shape[0]
    return tuple(
        logits.new_empty(n, dtype=torch.float32) for n in (N, N if with_entropy else 0, N, N)
    )


def _logprob_bwd(
    dlogp: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Targets,
    statistics: RowStatistics,
) -> Tensor:
    """Return the gradient of logits (B, T, V), in their dtype."""
    dlogits = new_gradient(logits)
    write_rows(dlogp.contiguous(), dentropy, logits, targets, statistics, dlogits)
    return dlogits


def _fake_bwd(dlogp: Tensor, dentropy: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
    return new_gradient(logits)


logprob_bwd = operator(
    "logprob_bwd",
    _logprob_bwd,
    BACKWARD,
    "Tensor",
    fake=_fake_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, ctx.with_entropy = inputs
    ctx.save_for_backward(logits, *targets, *output)
    ctx.set_materialize_grads(False)


@without_graph("logprob")
def _backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, *_: Any) -> tuple:
    logits, *rest = ctx.saved_tensors
    targets, statistics = unflatten(rest, Targets, RowStatistics)
    if not ctx.with_entropy:
        dentropy = None
    if dlogp is None and dentropy is None:
        return (None,)
    if dlogp is None:
        dlogp = torch.zeros_like(statistics.logp)
    return (logprob_bwd(dlogp, dentropy, logits, targets, statistics),)


logprob_fwd = operator(
    "logprob_fwd",
    _logprob_fwd,
    FORWARD,
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
    backward=_backward,
    setup_context=_setup_context,
)


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
@logged("logprob")
@keywords_explained()
def logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-prob of each id under softmax(logits / temperature), in one read of the logits.

        >>> logits, ids = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
        >>> want = (logits / 0.7).log_softmax(-1)
        >>> logp, entropy = logprob(logits, ids, temperature=0.7, return_entropy=True)
        >>> torch.testing.assert_close(logp, want.gather(-1, ids[..., None]).squeeze(-1))
        >>> torch.testing.assert_close(entropy, -(want.exp() * want).sum(-1))

    It computes in float32 whatever the dtype of `logits`, without a tensor of the size of `logits`.
    Both results are differentiable, and the gradient of a confident token does not round to 0. On a
    GPU a row has the same bits in any batch if 8 divides V and the strides of `logits`. Otherwise
    its last bit may depend on its position in the batch.

    Args:
        logits: (B, T, V) or (N, V), float32, bfloat16 or float16. The last dimension must be
            contiguous; the others may be strided (`logits[:, :-1]` is not copied).
        ids: (B, T) or (N,), int32 or int64, each in [0, V) where the mask is not 0.
        temperature: positive; a number, or one per token.
        mask: (B, T) or (N,). A row whose mask is 0 is not read, may hold NaN, and gets no gradient.
            Its log-prob and entropy are unspecified (finite).
        return_entropy: also return the entropy.

    Returns:
        The log-probs in nats, float32, of the shape of `ids`. With `return_entropy` a tuple
        (log-probs, entropies), both in nats.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a temperature that is not
            positive, an id outside the vocabulary. Ids are checked on the CPU, and elsewhere with
            GRPO_FAST_VALIDATE=1; otherwise the kernels return NaN for a wrong id.

    Source: online softmax, arXiv 1805.02867.
    """
    logits3 = checks.check_logits("logprob", logits, ids, "ids")
    targets = checks.check_targets("logprob", "ids", ids, logits, mask, temperature)
    logp, entropy, _, _ = logprob_fwd(logits3, targets, return_entropy)
    anchors = anchors_of(logits)
    logp = once_differentiable("logprob", logp, anchors)
    if return_entropy:
        entropy = once_differentiable("logprob", entropy, anchors)
        return logp.view(ids.shape), entropy.view(ids.shape)
    return logp.view(ids.shape)
