"""The objective on log-probs for objectives that look at whole sequences, as an operator."""

import torch
from torch import Tensor

from grpo_fast.notices import logged
from grpo_fast.objective import Objective
from grpo_fast.operands import Terms
from grpo_fast.ops.backend import run
from grpo_fast.ops.operator import operator
from grpo_fast.ops.policy_loss import RESULTS, backward, fake, none_to_empty, setup_context
from grpo_fast.records import PolicyLoss, Sequences, Tokens

ARGUMENTS = {
    "logp": Tensor,
    "mask": Tensor | None,
    "tokens": Tokens,
    "sequences": Sequences,
    "terms": Terms,
}


@logged("operator sequence_loss", inner=True)
def _sequence_loss(
    logp: Tensor, mask: Tensor | None, tokens: Tokens, sequences: Sequences, terms: Terms
) -> tuple[Tensor, ...]:
    given = (logp, mask, tokens, sequences, Objective.from_terms(*terms))
    by_pytorch = logp.dtype == torch.float64
    return none_to_empty(
        run("sequence_loss.sequence_loss_fwd", logp, *given, by_pytorch=by_pytorch), logp
    )


sequence_loss_op = operator(
    "sequence_loss",
    _sequence_loss,
    ARGUMENTS,
    RESULTS,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
)


def sequence_loss_fwd(
    logp: Tensor, mask: Tensor | None, tokens: Tokens, sequences: Sequences, terms: Terms
) -> PolicyLoss:
    """Compute an objective on log-probs (N,) of whole sequences; `loss` is differentiable in them."""
    return PolicyLoss(*sequence_loss_op(logp, mask, tokens, sequences, terms))
