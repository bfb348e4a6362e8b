"""Record a forward of one sequence, and find the operators that differ in a forward of a batch.

Modules are seen by hooks, PyTorch's operators by a dispatch mode. An operator of the second forward
is judged only if it got the recorded bits for the sequence. If it returned others, it depends on
the batch. Then the recorded bits take the place of its own, so that each operator behind it is
judged by itself.

Where the operators of two forwards cannot be told to be the same (other shapes, other branches,
kernels that PyTorch does not see), the module around them is judged instead.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_fast.invariance.places import Place, same_bits

LOOKAHEAD = 16  # how many recorded operators of a module are tried for one of the second forward
ROUNDING = 0.05  # of the largest entry: more is no rounding
Values = dict[str, Tensor]


# Operators that only put numbers elsewhere: they do not round.
MOVES = frozenset(
    (
        *("_to_copy", "_unsafe_view", "cat", "clone", "constant_pad_nd"),
        *("copy_", "embedding", "fill_", "gather", "index"),
        *("index_put_", "index_select", "masked_fill", "masked_fill_", "repeat"),
        *("roll", "scalar_tensor", "scatter", "select_scatter", "slice_scatter"),
        *("sort", "stack", "topk", "where", "zero_"),
    )
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """An operator that depends on the batch, or several of a module, of which one or more does."""

    operators: tuple[str, ...]
    path: str
    kind: str
    order: int  # in the recorded forward
    difference: float
    relative: float
    mixes_rows: bool


@dataclasses.dataclass
class Step:
    """One call of an operator: its tensors, without the parameters."""

    function: Any
    inputs: Values
    numbers: tuple[float, ...]
    outputs: list[Tensor]
    order: int


@dataclasses.dataclass
class Call:
    """One call of a module: its tensors, and the operators that it called itself."""

    path: str
    kind: str
    inputs: Values
    start: int = 0
    end: int = 0
    outputs: Values = dataclasses.field(default_factory=dict)
    steps: list[Step] = dataclasses.field(default_factory=list)
    # Of a second forward: the recorded call, the next of its steps, whether the inputs have the
    # recorded bits, the operators that no recorded one is like, and those that may have mixed rows.
    recorded: "Call | None" = None
    following: int = 0
    clean: bool = False
    unjudged: list[str] = dataclasses.field(default_factory=list)
    suspects: list[Finding] = dataclasses.field(default_factory=list)


class Trace(TorchDispatchMode):
    """A forward that is recorded (`recorded` None), or compared with a recorded one."""

    def __init__(self, model: nn.Module, place: Place, recorded: "Trace | None" = None):
        super().__init__()
        self.place, self.recorded = place, recorded
        self.calls: dict[tuple[str, int], Call] = {}
        self.findings: list[Finding] = []
        self._counts: Counter[str] = Counter()
        self._stack: list[Call] = []
        self._resting = False
        self._clock = 0
        self._weights = {
            x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())
        }

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """See every module and every operator of the forwards within."""
        handles = []
        try:
            for path, module in model.named_modules():
                kind = type(module).__name__
                before = self._before(path, kind)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        """Do not see the operators within: they are not the model's."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    # Modules

    def _before(self, path: str, kind: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            with self._unseen():
                self._enter(path, kind, self._named(args, kwargs))

        return hook

    def _enter(self, path: str, kind: str, inputs: Values) -> None:
        outer = self._stack[-1] if self._stack else None
        number = self._counts[path]
        self._counts[path] += 1
        call = Call(path, kind, inputs, start=self._tick())
        self._stack.append(call)
        if self.recorded is None:
            call.inputs = {name: x.clone() for name, x in inputs.items()}
            self.calls[path, number] = call
            return
        call.recorded = self.recorded.calls.get((path, number))
        if call.recorded is not None:
            call.clean = all(
                self._settled(inputs[name], want, outer, call.recorded.start, entering=True)
                for name, want in call.recorded.inputs.items()
                if name in inputs
            )

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        with self._unseen():
            call = self._stack.pop()
            outputs = self._named((output,), {})
            call.end = self._tick()
            if self.recorded is None:
                call.outputs = {name: x.clone() for name, x in outputs.items()}
            elif call.recorded is not None and call.clean:
                for name, want in call.recorded.outputs.items():
                    if name in outputs and want.is_floating_point():
                        self._settled(outputs[name], want, call, call.recorded.end, entering=False)

    def _settled(
        self, x: Tensor, want: Tensor, culprit: Call | None, order: int, entering: bool
    ) -> bool:
        """Whether the part of the sequence in x has the recorded bits, or has them now.

        If it had others, the operators of `culprit` are to blame, if it got the right inputs.
        """
        part = self.place.part(x, want.shape)
        if part is None:
            return False
        if same_bits(part, want):
            return True
        if not want.is_floating_point():
            # Positions of columns are other numbers behind padding.
            return x.ndim == 1 and len(x) == self.place.width
        if culprit is None or not culprit.clean:
            return False
        names = tuple(dict.fromkeys(culprit.unjudged))
        finding = self._finding(names, culprit, order, part, want)
        rounding = finding.relative < ROUNDING
        if entering and not rounding:
            return False  # perhaps rows in another order: the end of the culprit will show
        if culprit.suspects and not rounding:
            self.findings += culprit.suspects
            culprit.suspects = []
        else:
            self.findings.append(finding)
        return _replace(part, want)

    # Operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._resting or not self._stack or not _computes(func):
            return func(*args, **kwargs)
        inputs = self._named(args, kwargs)
        if not inputs and torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        call, numbers = self._stack[-1], _numbers(args, kwargs)
        step = None
        if self.recorded is None:
            inputs = {name: x.clone() for name, x in inputs.items()}
        elif call.recorded is not None:
            step = self._step(func, inputs, numbers, call)
        output = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if self.recorded is None:
            kept = [x.clone() for x in outputs]
            call.steps.append(Step(func, inputs, numbers, kept, self._tick()))
        elif step is None:
            if any(x.is_floating_point() for x in outputs):
                call.unjudged += {name_of(func)} - MOVES
        else:
            for x, want in zip(outputs, step.outputs, strict=False):
                self._judge(step, call, x, want)
        return output

    def _step(self, func: Any, inputs: Values, numbers: tuple, call: Call) -> Step | None:
        """Return the recorded call of an operator with the same bits for the sequence."""
        assert call.recorded is not None
        steps = call.recorded.steps
        for i in range(call.following, min(call.following + LOOKAHEAD, len(steps))):
            step = steps[i]
            if step.function is func and step.numbers == numbers and self._agree(inputs, step):
                call.following = i + 1
                return step
        return None

    def _agree(self, inputs: Values, step: Step) -> bool:
        # A mask may be there in one of the forwards only.
        for name in inputs.keys() & step.inputs.keys():
            part = self.place.part(inputs[name], step.inputs[name].shape)
            if part is None or not same_bits(part, step.inputs[name]):
                return False
        return True

    def _judge(self, step: Step, call: Call, x: Tensor, want: Tensor) -> None:
        part, name = self.place.part(x, want.shape), name_of(step.function)
        if part is None or same_bits(part, want):
            return
        finding = self._finding((name,), call, step.order, part, want)
        own = x.is_floating_point() and self.place.has_own(x, want.shape)
        if not own or finding.relative >= ROUNDING:
            # One result for all rows, which others need; or a choice, such as a place among all
            # tokens; or rows in other places. It stays: what follows shows whether it matters.
            call.suspects.append(dataclasses.replace(finding, mixes_rows=True))
            return
        self.findings.append(finding)
        _replace(part, want)

    def _finding(
        self, names: tuple[str, ...], call: Call, order: int, got: Tensor, want: Tensor
    ) -> Finding:
        difference = float((got.double() - want.double()).abs().nan_to_num().max())
        largest = float(want.double().abs().nan_to_num().max())
        relative = difference / largest if largest else difference
        return Finding(names, call.path, call.kind, order, difference, relative, mixes_rows=False)

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> Values:
        """Return the tensors of a call by their places, without the model's own."""
        found: Values = {}
        for name, value in (*enumerate(args), *kwargs.items()):
            for i, x in enumerate(tree_leaves(value)):
                if isinstance(x, Tensor) and not self._of_model(x):
                    found[f"{name}.{i}"] = x
        return found

    def _of_model(self, x: Tensor) -> bool:
        return x.layout != torch.strided or x.untyped_storage().data_ptr() in self._weights


def _replace(part: Tensor, want: Tensor) -> bool:
    """Write the recorded bits; False where the memory of several elements is one."""
    if any(
        stride == 0 and size > 1 for stride, size in zip(part.stride(), part.shape, strict=True)
    ):
        return False
    part.copy_(want)
    return True


def name_of(func: Any) -> str:
    """Return the name of an operator without its overload, for example "mm"."""
    return str(func.overloadpacket.__name__)


def _numbers(args: tuple, kwargs: dict[str, Any]) -> tuple[float, ...]:
    return tuple(x for x in tree_leaves((args, kwargs)) if isinstance(x, float))


def _computes(func: Any) -> bool:
    """Whether an operator computes numbers, and neither only makes a view nor leaves memory as it is."""
    returns = func._schema.returns
    views = any(x.alias_info is not None and not x.alias_info.is_write for x in returns)
    return not views and "empty" not in name_of(func) and func.namespace != "prim"
