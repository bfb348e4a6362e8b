"""The records that travel from a loss to its kernel: what they hold, and in which order.

Operators of PyTorch take flat arguments. `schema` derives an operator's schema from the annotations of these
records, `flat` makes its arguments and `unflatten` makes records of them again, so that no order of fields is
written down twice.

N is the number of tokens. Tensors are contiguous.
"""

import types
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

from torch import Tensor

from grpo_fast._operands import Modes, Terms

SymInt = Annotated[int, "SymInt"]  # a size that a compiled graph may leave open


class Targets(NamedTuple):
    """Which entry of each row of logits is scored, and at which temperature."""

    ids: Tensor  # (N,) int
    mask: Tensor | None  # (N,) bool: rows that count; None for all
    temperature: Tensor | None  # (N,) fp32; None: the same for all, and then
    inv_temperature: Any  # 1 / temperature: of operators 0-dim on the CPU, of kernels a number


class Tokens(NamedTuple):
    """What an objective takes of each token besides its log-prob. All (N,) fp32."""

    weight: Tensor  # of the token in the loss
    advantages: Tensor | None  # None: there are `Rewards`
    old_logp: Tensor | None  # None: on policy
    ref_logp: Tensor | None  # None: no KL term
    importance: Tensor | None  # None: 1
    score: Tensor | None  # decides the sign in TOPR; None: the advantage
    entropy_weight: Tensor | None  # of the token in the entropy bonus; None: `weight`
    coefficient: Tensor | None  # added to dloss/dlogp; None: 0


class Rewards(NamedTuple):
    """Rewards that a kernel scores within groups of consecutive sequences."""

    values: Tensor | None  # (num_sequences,) fp32 or fp64; None: the tokens have advantages
    group_size: int
    sequence: Tensor | None  # (N,) int64: the sequence of each token; None: row (b, t) belongs to b


class Sequences(NamedTuple):
    """What objectives that look at whole sequences take besides `Tokens`."""

    boundaries: Tensor | None  # (num_sequences + 1,) int64; None: all sequences have T_len tokens
    T_len: SymInt
    share: Tensor | None  # (N,) fp32: weight of a token in sums over its sequence; None: 1
    log_importance: Tensor | None  # (N,) fp32: what VESPO adds to the log of the sequence weight


class Outputs(NamedTuple):
    """What a loss kernel leaves of each token; (N,), and (0,) where it is not computed."""

    loss: Tensor  # fp32, times the token's weight
    logp: Tensor  # fp32
    entropy: Tensor  # fp32, in nats
    kl: Tensor  # fp32
    clip: Tensor  # int8, bits of the clip flags


class PolicyLoss(NamedTuple):
    """What a loss kernel makes of log-probs; (N,)."""

    loss: Tensor  # fp32, times the token's weight
    dlogp: Tensor  # fp32, the derivative of the summed loss in the log-prob
    kl: Tensor | None  # fp32; None: no KL term
    clip: Tensor  # int8, bits of the clip flags


class RowStatistics(NamedTuple):
    """What the gradient of log-probs needs of the forward; (N,) fp32."""

    logp: Tensor
    entropy: Tensor  # (0,) where it is not computed
    top: Tensor  # the largest logit of the row; the kernels: in log2 units
    total: Tensor  # the sum of exponentials relative to it


class SoftCap(NamedTuple):
    """Logits z stand for `softcap * tanh(logit_scale * z / softcap)`."""

    softcap: float
    logit_scale: float


class Grouping(NamedTuple):
    """Which rewards form a group."""

    group_size: int  # as many consecutive ones, unless there are
    labels: Tensor | None  # (B,) int64; equal labels form a group


class Standardization(NamedTuple):
    """How a reward is scored within its group; see `grpo_fast.ops.group_advantage`."""

    scale: str
    eps: Any  # of operators 0-dim on the CPU, of kernels a number
    unbiased: bool = True
    leave_one_out: bool = False
    skip_nan: bool = False
    raw_singletons: bool = False


SCORE_EPS = 1e-4  # of the z-score that losses take of rewards: TRL's and the paper code's
Z_SCORE = Standardization("group", SCORE_EPS)


class Weighing(NamedTuple):
    """What decides how much a token weighs in the loss, besides the reduction."""

    mask: Tensor | None  # (N,) bool: tokens that count; None: all
    floating: Tensor | None  # (N,): the mask as it was given, where it is floating
    token_weights: Tensor | None  # (N,) fp32; None: 1
    boundaries: Tensor | None  # (num_sequences + 1,) int; None: all sequences are equally long
    num_items: Any  # None, a number, or a tensor of one element on the device
    loss_scale: Any  # likewise


class Outgoing(NamedTuple):
    """Rows that leave the workspace of the head: gradients of hidden states."""

    stage: Tensor  # (C, D) contiguous
    dhidden: Tensor  # (num_rows, D) contiguous, written
    rows: Tensor | None  # (n,) int64: where they go; None: to the first rows
    n: int


class Incoming(NamedTuple):
    """Rows that enter the workspace of the head: hidden states."""

    hidden: Tensor  # (num_rows, D), any strides
    rows: Tensor | None  # (n,) int64: where they come from; None: from the first rows
    live: Tensor | None  # (n,) bool: zeros are written for the others; None: all are live
    n: int
    h: Tensor  # (C, D) contiguous, written


KINDS = {Tensor: "Tensor", Any: "Tensor", int: "int", SymInt: "SymInt", bool: "bool", str: "str"}


def schema(**records: type) -> str:
    """The arguments of an operator that takes these records, as its schema declares them.

    Args:
        records: NamedTuple classes, whose fields become `name_field`, or the type of one argument.
    """
    found: list[str] = []
    for name, kind in records.items():
        for field, annotation in _fields(kind).items():
            found.append(f"{_kind(annotation)} {name}{field and '_'}{field}")
    return ", ".join(found)


def _fields(kind: Any) -> dict[str, Any]:
    """The names and annotations of a record's fields; what is no record has one without a name."""
    if kind is Terms:
        return {"modes": str, "numbers": Tensor}
    if hasattr(kind, "_fields"):
        return get_type_hints(kind, include_extras=True)
    return {"": kind}


def _kind(annotation: Any) -> str:
    """A type as schemas write it."""
    if isinstance(annotation, types.UnionType):
        (inner,) = (x for x in annotation.__args__ if x is not types.NoneType)
        return f"{_kind(inner)}?"
    return KINDS[annotation]


def flat(*records: Any) -> list[Any]:
    """The fields of records one after the other, as an operator takes them."""
    found: list[Any] = []
    for x in records:
        if isinstance(x, Terms):
            found += [x.modes.key, x.numbers]
        else:
            found += list(x) if hasattr(x, "_fields") else [x]
    return found


def unflatten(arguments: Sequence[Any], *kinds: Any) -> list[Any]:
    """The records whose fields these are; `kinds` are the types that `schema` takes."""
    found: list[Any] = []
    start = 0
    for kind in kinds:
        piece = arguments[start : start + len(_fields(kind))]
        if kind is Terms:
            found.append(Terms(Modes.of(piece[0]), piece[1]))
        else:
            found.append(kind(*piece) if hasattr(kind, "_fields") else piece[0])
        start += len(piece)
    assert start == len(arguments)
    return found
