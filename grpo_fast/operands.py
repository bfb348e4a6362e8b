"""Numbers and modes of an objective in the form that custom operators take: tensors and strings.

`torch.compile` compiles a function again for each new value of a Python float that an operator
takes, and with inductor it may run code that was made for another value. A tensor is an input of
the graph: its values may change from step to step. These tensors live on the CPU, where an operator
reads them without waiting.
"""

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from grpo_fast.surrogates import OPTIONS, SURROGATES

# Kernels compute in float32. A number outside of this range, or its reciprocal, would become inf or
# 0 there.
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max

Record = TypeVar("Record", bound=NamedTuple)


def replaced(record: Record, **fields: Any) -> Record:
    """Return a named tuple with new values of some fields, as `_replace` does.

    torch 2.8 and 2.9 cannot trace `_replace`, so code that `torch.compile` traces calls this.
    """
    kind = type(record)
    found = kind(*map(fields.pop, kind._fields, record))
    assert not fields, f"{kind.__name__} has no fields {', '.join(fields)}"
    return found


def hint(name: str, x: object) -> str:
    """Return the end of an error message about x, which is no Python number: how to convert it."""
    return (
        f"; pass float({name})" if isinstance(x, numbers.Real) and not isinstance(x, bool) else ""
    )


def traced() -> bool:
    """Tell whether operations are seen by something: a compiler, a mode of operators, a transform."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def operand(x: float) -> Tensor:
    """Return a number as a 0-dim float64 tensor on the CPU; it works in a compiled graph as well."""
    if torch.compiler.is_compiling():
        # It is a product, because the compiler turns that into operations on tensors. `torch.full`
        # and `torch.tensor` keep the value of the first call (torch 2.13).
        return torch.ones((), dtype=torch.float64, device="cpu") * x
    return torch.tensor(x, dtype=torch.float64, device="cpu")


def bound(x: float | None, like: Tensor) -> Any:
    """Return a number that PyTorch is to clamp `like` to; in a compiled graph a tensor, as in `operand`.

    Do arithmetic with the result, not with the number: of `1 - x` inductor keeps the first value
    (torch 2.13).
    """
    if x is None or not torch.compiler.is_compiling():
        return x
    return torch.ones((), dtype=like.dtype, device=like.device) * x


def operands(numbers: Sequence[float]) -> Tensor:
    """Return several numbers as a (n,) tensor, made as in `operand`."""
    if torch.compiler.is_compiling():
        return torch.stack([operand(x) for x in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


class Modes(NamedTuple):
    """The part of an objective that selects code, in words and flags; `Objective` explains the words."""

    surrogate: str
    ratio: str
    dppo_value: str
    kl: str
    kl_gradient: str
    entropy_reduction: str
    has_kl: bool  # beta is not 0
    has_bonus: bool  # entropy_coef is not 0
    has_penalty: bool  # quadratic_coef is not 0
    by_entropy: bool  # top_entropy_quantile is below 1
    drops_stale: bool  # off_policy_threshold is set

    @property
    def key(self) -> str:
        """The modes as one string, which a custom operator's schema can carry."""
        # Each flag is tested, not printed: in a compiled graph a flag may be symbolic and have no
        # string.
        flags = ["yes" if flag else "no" for flag in self[NUM_WORDS:]]
        return " ".join([*self[:NUM_WORDS], *flags])  # type: ignore[list-item]

    @staticmethod
    def of(key: str) -> "Modes":
        """Return the modes that have this `key`."""
        words = key.split()
        flags = [word == "yes" for word in words[NUM_WORDS:]]
        return Modes(*words[:NUM_WORDS], *flags)  # type: ignore[arg-type]

    @property
    def variant(self) -> str:
        """The name that the kernels have for the surrogate."""
        return f"{self.surrogate}_ratio" if self.dppo_value == "ratio" else self.surrogate

    @property
    def has_quadratic(self) -> bool:
        """Whether the surrogate has a term in d^2, which acts even where the advantage is 0."""
        return SURROGATES[self.surrogate].has_quadratic or self.dppo_value == "ratio"

    @property
    def through_mean(self) -> bool:
        """Whether a gradient flows back through the mean of a sequence."""
        return self.ratio == "sequence" or self.surrogate == "gmpo"

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss of a token depends on the log-probs of its whole sequence."""
        by_sequence = SURROGATES[self.surrogate].by_sequence
        return by_sequence or self.ratio != "token" or self.drops_stale

    @property
    def by_token(self) -> bool:
        """Whether a token's coefficient depends on that token alone: one launch is enough."""
        return not self.needs_sequences and not self.by_entropy

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss depends on the entropy of the tokens."""
        return self.has_bonus or self.by_entropy

    def without_kl(self) -> "Modes":
        """Return the modes without the KL term."""
        return replaced(self, has_kl=False)

    def surrogate_alone(self) -> "Modes":
        """Return the modes without KL term and entropy bonus."""
        return replaced(self, has_kl=False, has_bonus=False, entropy_reduction="same")

    def without_surrogate(self) -> "Modes":
        """Return the modes of KL term and entropy bonus alone, for tokens whose advantage is 0."""
        return replaced(
            self,
            surrogate="reinforce",
            ratio="token",
            dppo_value="logp",
            entropy_reduction="same",
            has_penalty=False,
            by_entropy=False,
            drops_stale=False,
        )


NUM_WORDS = 6  # the first fields of `Modes` are words; the others are flags


class Terms(NamedTuple):
    """An objective in the form that operators take: its modes, and all its numbers, used or not."""

    modes: Modes
    numbers: Tensor  # (len(NUMBERS),) float64 on the CPU, NaN for None

    def number(self, name: str) -> Tensor:
        """Return one of the numbers, 0-dim."""
        return self.numbers[NUMBERS.index(name)]


WORDS = ("dppo_value",)  # options of surrogates that are not numbers
# The names of the numbers of an objective, in the order of `Terms.numbers`.
NUMBERS = (
    *(option for option in OPTIONS if option not in WORDS),
    "top_entropy_quantile",
    "off_policy_threshold",
    "log_ratio_clip",
    "log_ratio_max",
    "beta",
    "kl_gap_clip",
    "kl_value_clip",
    "entropy_coef",
)
