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

from grpo_fast.operands import Modes, Terms

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
    """What an objective makes of log-probs; (N,), and (0,) where it is not computed."""

    loss: Tensor  # fp32, times the token's weight
    dlogp: Tensor  # fp32, dloss/dlogp
    kl: Tensor  # fp32
    clip: Tensor  # int8, bits of the clip flags


class Weighing(NamedTuple):
    """What decides how much each token weighs in the loss."""

    mask: Tensor | None  # (N,) bool: tokens that count; None for all
    floating: Tensor | None  # (N,): the mask, where it is a floating one
    token_weights: Tensor | None  # (N,) fp32; None: 1
    boundaries: Tensor | None  # (num_sequences + 1,) of packed tokens; None: one sequence
    num_items: Tensor | None  # 0-dim: the denominator of "token_mean"; None: the number of tokens
    loss_scale: Tensor | None  # 0-dim: a factor on the loss; None: 1. Kernels take numbers as well


class Weights(NamedTuple):
    """What each token weighs; (N,)."""

    weight: Tensor  # fp32, in the loss
    share: Tensor | None  # fp32, in sums over a sequence and in metrics: the floating mask; None: 1
    entropy_weight: Tensor | None  # fp32, in a mean over all tokens; None: not wanted
    sequence: Tensor | None  # int64, the sequence of each packed token; None: not packed


class Outgoing(NamedTuple):
    """Gradients of hidden states that leave a chunk of the head."""

    stage: Tensor  # (C, D): where they are
    dhidden: Tensor  # (rows, D): where they go, contiguous
    rows: Tensor | None  # (n,) int64: which rows of `dhidden`; None: the first ones
    n: int


class Incoming(NamedTuple):
    """Hidden states that a chunk of the head takes next."""

    hidden: Tensor  # (rows, D), any strides: where they are
    rows: Tensor | None  # (n,) int64: which rows of `hidden`; None: the first ones
    live: Tensor | None  # (n,) bool: rows that count, the others become 0; None: all
    n: int
    h: Tensor  # (C, D): where they go; rows from n on become 0


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


Z_SCORE = Standardization("group", 1e-4)  # of the losses' `rewards`: TRL's and the paper code's


KINDS = {Tensor: "Tensor", Any: "Tensor", int: "int", SymInt: "SymInt", bool: "bool", str: "str"}


def schema(**records: Any) -> str:
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


def select(record: Any, rows: Tensor | slice | None) -> Any:
    """The values of some tokens, in a record whose vectors are per token; None for all."""
    if rows is None:
        return record
    return type(record)(*(_of_rows(x, rows) for x in record))


def _of_rows(x: Any, rows: Tensor | slice) -> Any:
    """`x[rows]` of a vector; what is a number, empty or not there has no rows."""
    return x[rows] if isinstance(x, Tensor) and x.ndim and len(x) else x
