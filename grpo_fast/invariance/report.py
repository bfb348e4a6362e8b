"""The result of `check_invariance`: the operators that depend on the batch, and what follows."""

import dataclasses
import math
import re
from collections.abc import Iterable

from grpo_fast.invariance.tracing import Finding

MOST_LINES = 12  # operators that are printed
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "grouped_mm", "mkldnn")


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator whose result for a sequence depends on the batch.

    Attributes:
        names: of the operator in PyTorch, for example ("mm",). Several: one or more of these that the
            module calls; they got other shapes or rows in another order, so that they could not be
            told apart. None at all: the module calls a kernel that PyTorch does not see.
        module: the path of the module that calls it. If there are several, "*" stands for their
            numbers, as in "model.layers.*.mlp.up_proj".
        kind: the class of this module.
        calls: in how many of these modules it was found.
        difference, relative: its largest difference between two forwards, and this divided by the
            largest entry of the result.
        mixes_rows: it computes its result from several rows, such as a mean over the batch, or the
            place of a token in an expert's queue. Otherwise it only rounds in another way.
        forwards: the names of the forwards in which it was found.
    """

    names: tuple[str, ...]
    module: str
    kind: str
    calls: int
    difference: float
    relative: float
    mixes_rows: bool
    forwards: tuple[str, ...]

    def __str__(self) -> str:
        where = f"{self.module} ({self.kind})" if self.module else self.kind
        what = " or ".join(self.names[:4]) or "a kernel that is no operator of PyTorch"
        what += " or another operator" if len(self.names) > 4 else ""
        how = "mixes rows" if self.mixes_rows else f"differs by {self.relative:.0e} of its largest"
        many = f", {self.calls} modules" if self.calls > 1 else ""
        return f"{what} in {where}{many}: {how}"


@dataclasses.dataclass(frozen=True)
class InvarianceReport:
    """Whether a model gives a sequence the same bits in any batch, and which operators do not.

    Attributes:
        model: the class of the model, its dtype and device.
        invariant: the logits of the sequence were the same bits in every forward, and no operator
            differed.
        operators: those that depend on the batch, in the order in which they run. Each was given the
            same bits for the sequence.
        forwards: by name, the largest |log-ratio| of a token between this forward and the one of the
            sequence alone, in nats; NaN if a log-prob is.
        deterministic: the same call twice gave the same bits.
        fixed_shape: in batches of the same shape the bits depend neither on the row nor on the other
            sequences.
        helps: what to do, one sentence each.
    """

    model: str
    invariant: bool
    operators: tuple[Operator, ...]
    forwards: dict[str, float]
    deterministic: bool
    fixed_shape: bool
    helps: tuple[str, ...]

    @property
    def log_ratio(self) -> float:
        """The largest |log-ratio| of a token, in nats. With the same weights it should be 0."""
        values = list(self.forwards.values())
        return math.nan if any(map(math.isnan, values)) else max(values)

    def __str__(self) -> str:
        verdict = "invariant" if self.invariant else "depends on the batch"
        lines = [
            f"batch invariance of {self.model}: {verdict}",
            "  largest |log-ratio| of a token:",
        ]
        width = max(map(len, self.forwards))
        lines += [f"    {name:<{width}}  {x:.1e}" for name, x in self.forwards.items()]
        if self.log_ratio != 0:
            far = math.expm1(self.log_ratio)
            lines.append(
                f"  so a ratio with the same weights is not 1, but up to {far:.1e} from it"
            )
        if self.operators:
            lines.append("  operators that depend on the batch, in the order of the forward:")
            lines += [f"    {x}" for x in self.operators[:MOST_LINES]]
            if len(self.operators) > MOST_LINES:
                lines.append(f"    and {len(self.operators) - MOST_LINES} more: .operators")
        elif not self.invariant:
            lines.append("  no operator of the model, uncompiled, was found to depend on the batch")
        if self.helps:
            lines.append("  what helps:")
            lines += [f"    - {x}" for x in self.helps]
        return "\n".join(lines)


def operators_of(findings: dict[str, list[Finding]], again: str) -> tuple[Operator, ...]:
    """Return the operators of all forwards, those of modules with equal paths but for numbers as one.

    What differs in the same call `again` is random: it is not said to mix rows.
    """
    random = {(x.operators, x.path) for x in findings[again]}
    groups: dict[tuple, list[tuple[str, Finding]]] = {}
    for forward, found in findings.items():
        for x in found:
            mixes = x.mixes_rows and (x.operators, x.path) not in random
            key = (x.operators, re.sub(r"(?<![^.])\d+(?![^.])", "*", x.path), x.kind, mixes)
            groups.setdefault(key, []).append((forward, x))
    return tuple(
        Operator(
            names=names,
            module=module if len({x.path for _, x in group}) > 1 else group[0][1].path,
            kind=kind,
            calls=len({x.path for _, x in group}),
            difference=max(x.difference for _, x in group),
            relative=max(x.relative for _, x in group),
            mixes_rows=mixes_rows,
            forwards=tuple(dict.fromkeys(forward for forward, _ in group)),
        )
        for (names, module, kind, mixes_rows), group in sorted(
            groups.items(), key=lambda entry: min(x.order for _, x in entry[1])
        )
    )


def advice(
    operators: Iterable[Operator], deterministic: bool, fixed_shape: bool
) -> tuple[str, ...]:
    """Say what helps against these operators."""
    operators = tuple(operators)
    found = []
    if not deterministic:
        found.append(
            "the same call twice differs: look for dropout in eval mode, or kernels with atomic additions "
            "(torch.use_deterministic_algorithms(True))"
        )
    elif fixed_shape and not any(x.mixes_rows for x in operators):
        found.append(
            "equal shapes give equal bits: compute the old log-probs with the batches of the update, padded "
            "alike, or leave out old_logps in the first update: the ratio is then exactly 1"
        )
    names = {name for x in operators for name in x.names}
    if any(x.mixes_rows for x in operators):
        found.append(
            "an operator mixes rows: replace it by one that treats each row alone; no batch shape helps"
        )
    if any(name.strip("_").startswith(PRODUCTS) for name in names):
        found.append(
            "matrix products: the library adds up in another order for another shape. Kernels whose order is "
            "fixed help (batch-invariant kernels); a wider dtype makes the difference smaller"
        )
    attention = ("attention", "softmax")
    if any(word in name for word in attention for name in names):
        found.append(
            "attention: try another attn_implementation, or batches without padding (packed, or of equal "
            "lengths)"
        )
    if any(re.search(r"[Ee]xpert|MoE|MoeBlock", x.kind) for x in operators):
        found.append(
            "experts: the number of tokens of an expert depends on the batch, and with it the shapes of its "
            "products; with a capacity also which tokens are dropped"
        )
    return tuple(found)
