"""The fused language-model head that replaces TRL's."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_fast.integrations.transformers import Head
from grpo_fast.notices import fell_back
from grpo_fast.ops import linear_logprob
from grpo_fast.ops.head.arguments import HEAD_DTYPES


class FusedLogProb:
    """A replacement of `trl.trainer.utils._ChunkedLogProbFunction`, of which TRL calls `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Return (log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of each row.

        An output whose name is not in `outputs` is None. hidden is (N, D), weight (V, D). `chunk_size` is for
        TRL's kernel; ours chooses its own.
        """

        def theirs(wanted: tuple[str, ...]) -> tuple[Tensor | None, ...]:
            from trl.kernels import ChunkedLogProbFunction  # TRL 1.15's needs Triton

            operands = (hidden, weight, bias, targets)
            options = (temperature, chunk_size, final_logit_softcapping, logit_scale)
            return ChunkedLogProbFunction.apply(*operands, *options, wanted)

        reason, cure = None, "Up to stage 2 the head is fused"
        if hasattr(weight, "ds_id"):
            reason = "the head is sharded by ZeRO-3"
        for x in (hidden, weight, bias):
            if x is not None and x.dtype not in HEAD_DTYPES:
                reason = f"the fused one does not take {x.dtype}"
                cure = "Leave the head out of the quantisation: modules_to_not_convert=['lm_head']"
        if reason is not None:
            fell_back("trl_head", reason, cure=cure)
            return theirs(outputs)
        others: tuple[Tensor | None, ...] = (None, None, None)
        wanted = tuple(name for name in outputs if name not in ("log_probs", "entropy"))
        if wanted:  # they have no gradient in TRL either
            with torch.no_grad():
                others = theirs(wanted)[2:]
        head = Head(weight, bias, final_logit_softcapping, logit_scale)
        with without_autocast(hidden) as hidden_:
            scored = log_probs(
                hidden_, head, targets, temperature=temperature, with_entropy="entropy" in outputs
            )
        return *scored, *others


def log_probs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Call `linear_logprob` with a `Head`: (log-probs, entropy or None)."""
    options = {"temperature": temperature, "mask": mask, **head.options}
    if with_entropy:
        return linear_logprob(hidden, head.weight, ids, return_entropy=True, **options)
    return linear_logprob(hidden, head.weight, ids, **options), None


@contextlib.contextmanager
def without_autocast(hidden: Tensor) -> Iterator[Tensor]:
    """Turn autocast off, and convert hidden to the dtype that autocast would give it.

    Float64 stays float64, as under autocast.
    """
    kind = hidden.device.type
    cast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if cast else hidden.dtype
    with torch.autocast(kind, enabled=False):
        yield hidden.to(dtype)
