"""The records that travel from a loss to its kernel: their fields and the order of these.

PyTorch's operators take flat arguments. `schema` derives the schema of an operator from the
annotations of these records, `flat` makes its arguments, and `unflatten` turns them into records
again. So no order of fields is written down twice.

N is the number of tokens. Tensors are contiguous.
"""

import functools
import types
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from grpo_fast.operands import Modes, Terms

# What may be missing: None in kernels and in arguments of operators, (0,) in results of operators.
Missing = Annotated[Any, "Tensor?"]
SymInt = Annotated[int, "SymInt"]  # a size that may vary in a compiled graph


class Targets(NamedTuple):
    """The entry of each row of logits that is scored, and the temperature."""

    ids: Tensor  # (N,) int
    mask: Tensor | None = None  # (N,) bool: rows that count; None: all
    temperature: Tensor | None = None  # (N,) fp32; None: one for all, given as
    # 1 / temperature: operators take it 0-dim on the CPU, kernels as a number.
    inv_temperature: Any = 1.0


class Tokens(NamedTuple):
    """The arguments of an objective for each token besides its log-prob. All are (N,) fp32."""

    weight: Tensor  # weight of the token in the loss
    advantages: Tensor | None = None  # None: `Rewards` are given
    old_logp: Tensor | None = None  # None: on policy
    ref_logp: Tensor | None = None  # None: no KL term
    importance: Tensor | None = None  # None: 1
    score: Tensor | None = None  # its sign decides in TOPR; None: the advantage
    entropy_weight: Tensor | None = None  # weight in the entropy bonus; None: `weight`
    coefficient: Tensor | None = None  # added to dloss/dlogp; None: 0


class Rewards(NamedTuple):
    """Rewards that a kernel scores within groups of consecutive sequences."""

    values: Tensor | None = None  # (num_sequences,) fp32 or fp64; None: the tokens have advantages
    group_size: int = 1
    sequence: Tensor | None = None  # (N,) int64: sequence of each token; None: b for token (b, t)


class Sequences(NamedTuple):
    """The arguments of objectives that look at whole sequences, besides `Tokens`."""

    # (num_sequences + 1,) int64; None: all sequences have T_len tokens
    boundaries: Tensor | None = None
    T_len: SymInt = 0
    share: Tensor | None = None  # (N,) fp32: weight of a token in sums over its sequence; None: 1
    log_importance: Tensor | None = (
        None  # (N,) fp32: VESPO adds it to the log of the sequence weight
    )


class Outputs(NamedTuple):
    """The results of a loss kernel for each token, (N,).

    What is not computed is None in kernels, and (0,) where an operator returns it.
    """

    loss: Tensor  # fp32, times the token's weight
    logp: Tensor  # fp32
    entropy: Missing  # fp32, in nats
    kl: Missing  # fp32
    clip: Tensor  # int8, bits of the clip flags


class PolicyLoss(NamedTuple):
    """The results of an objective on log-probs, (N,); the KL as in `Outputs`."""

    loss: Tensor  # fp32, times the token's weight
    dlogp: Tensor  # fp32, dloss/dlogp
    kl: Missing  # fp32
    clip: Tensor  # int8, bits of the clip flags


class Weighing(NamedTuple):
    """The arguments that decide the weight of each token in the loss."""

    mask: Tensor | None = None  # (N,) bool: tokens that count; None for all
    floating: Tensor | None = None  # (N,): the mask, if it is floating; None: it is not
    token_weights: Tensor | None = None  # (N,) fp32; None: 1
    boundaries: Tensor | None = None  # (num_sequences + 1,) of packed tokens; None: one sequence
    num_items: Tensor | None = (
        None  # 0-dim: the denominator of "token_mean"; None: the number of tokens
    )
    loss_scale: Tensor | None = (
        None  # 0-dim: a factor on the loss; None: 1. Kernels also take numbers
    )


class Weights(NamedTuple):
    """The weights of each token; (N,)."""

    weight: Tensor  # fp32, weight in the loss
    share: Tensor | None  # fp32, weight in sums over a sequence and in metrics; None: 1
    entropy_weight: Tensor | None  # fp32, weight in a mean over all tokens; None: not wanted
    sequence: Tensor | None  # int64, the sequence of each packed token; None: not packed


class Outgoing(NamedTuple):
    """The gradients of hidden states of one chunk of the head, and where they go."""

    stage: Tensor  # (C, D): they are here
    dhidden: Tensor  # (rows, D): they go here; contiguous
    rows: Tensor | None  # (n,) int64: which rows of `dhidden`; None: the first ones
    n: int


class Incoming(NamedTuple):
    """The hidden states of the next chunk of the head, and where they go."""

    hidden: Tensor  # (rows, D), any strides: they are here
    rows: Tensor | None  # (n,) int64: which rows of `hidden`; None: the first ones
    live: Tensor | None  # (n,) bool: rows that count, the others become 0; None: all
    n: int
    h: Tensor  # (C, D): they go here; rows from n on become 0


class RowStatistics(NamedTuple):
    """The statistics of rows of logits that the gradient of log-probs needs; (N,) fp32."""

    logp: Tensor
    entropy: Missing  # as in `Outputs`
    top: Tensor  # the largest logit of the row; in the kernels in log2 units
    total: Tensor  # the sum of exponentials relative to it


class SoftCap(NamedTuple):
    """A soft cap: the logits z become `softcap * tanh(logit_scale * z / softcap)`."""

    softcap: float
    logit_scale: float


class Grouping(NamedTuple):
    """The rewards that form a group."""

    group_size: SymInt  # this many consecutive rewards, unless there are labels
    labels: Tensor | None = None  # (B,) int64; equal labels form a group


class Standardization(NamedTuple):
    """How a reward is scored within its group; `grpo_fast.ops.group_advantage` explains it."""

    scale: str
    eps: Any  # operators take it 0-dim on the CPU, kernels as a number
    unbiased: bool = True
    leave_one_out: bool = False
    skip_nan: bool = False
    raw_singletons: bool = False


SCORE_EPS = 1e-4  # of the z-scores that the losses take of rewards: TRL's and the paper code's
Z_SCORE = Standardization("group", SCORE_EPS)


KINDS = {
    Tensor: "Tensor",
    Any: "Tensor",
    int: "int",
    SymInt: "SymInt",
    Missing: "Tensor?",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}


def schema(**records: Any) -> str:
    """Return the part of an operator's schema that declares these records as its arguments.

    Args:
        records: NamedTuple classes, whose fields become `name_field`, or the type of one argument.
    """
    found: list[str] = []
    for name, kind in records.items():
        for field, annotation in _fields(kind).items():
            found.append(f"{_kind(annotation)} {name}{field and '_'}{field}")
    return ", ".join(found)


@functools.cache  # reading annotations would take longer than a launch
def _fields(kind: Any) -> dict[str, Any]:
    """Return the names and annotations of a record's fields; other types have one field without a name."""
    if kind is Terms:
        return {"modes": str, "numbers": Tensor}
    if hasattr(kind, "_fields"):
        return get_type_hints(kind, include_extras=True)
    return {"": kind}


def _kind(annotation: Any) -> str:
    """Return a type as schemas write it."""
    if isinstance(annotation, types.UnionType):
        (inner,) = (x for x in annotation.__args__ if x is not types.NoneType)
        return f"{_kind(inner)}?"
    return KINDS[annotation]


def flat(*records: Any) -> list[Any]:
    """Return the fields of records one after the other, as an operator takes them."""
    found: list[Any] = []
    for x in records:
        if isinstance(x, Terms):
            found += [x.modes.key, x.numbers]
        else:
            # Ask for a tuple first: `torch.compile` cannot ask a symbolic number for an attribute.
            found += list(x) if isinstance(x, tuple) and hasattr(x, "_fields") else [x]
    return found


def unflatten(arguments: Sequence[Any], *kinds: Any) -> list[Any]:
    """Return the records whose fields these are; `kinds` are the types that `schema` takes."""
    layout, total = _layout(kinds)
    assert total == len(arguments)
    return [make(*arguments[start:stop]) for make, start, stop in layout]


@functools.cache
def _layout(kinds: tuple[Any, ...]) -> tuple[list[tuple[Any, int, int]], int]:
    """How each record is made, and of which arguments; and how many arguments there are in all."""
    found, start = [], 0
    for kind in kinds:
        stop = start + len(_fields(kind))
        make = _terms if kind is Terms else kind if hasattr(kind, "_fields") else _itself
        found.append((make, start, stop))
        start = stop
    return found, start


def _terms(modes: str, numbers: Tensor) -> Terms:
    return Terms(Modes.of(modes), numbers)


def number_of_fields(*kinds: Any) -> int:
    """Return how many arguments of an operator records of these types are."""
    return _layout(kinds)[1]


def _itself(x: Any) -> Any:
    return x


def select(record: Any, rows: Tensor | slice | None) -> Any:
    """Return a record with the values of some tokens; `rows` None: of all tokens."""
    if rows is None:
        return record
    return type(record)(*(_of_rows(x, rows) for x in record))


def _of_rows(x: Any, rows: Tensor | slice) -> Any:
    """Return `x[rows]` of a vector; return numbers, None and empty vectors unchanged."""
    return x[rows] if isinstance(x, Tensor) and x.ndim and len(x) else x
