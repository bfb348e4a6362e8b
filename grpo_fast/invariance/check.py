"""`check_invariance`: forwards of one sequence alone and in batches, compared bit by bit."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.checks import shape_of
from grpo_fast.integrations.transformers import evaluating, is_sharded
from grpo_fast.invariance.places import Place, same_bits
from grpo_fast.invariance.report import InvarianceReport, advice, operators_of
from grpo_fast.invariance.tracing import Trace
from grpo_fast.ops.logprob import logprob

OP = "check_invariance"
LENGTH = 24  # tokens of a sequence that is drawn


@dataclasses.dataclass(frozen=True)
class Forward:
    """A batch that holds the sequence at a place; ids and positions (rows, columns)."""

    name: str
    place: Place
    ids: Tensor
    mask: Tensor
    positions: Tensor


def check_invariance(
    model: nn.Module,
    input_ids: Tensor | Sequence[Sequence[int]] | None = None,
    *,
    batch_sizes: Sequence[int] = (2, 8),
    padding: int | None = None,
    packed: bool = False,
    seed: int = 0,
    verbose: bool = True,
) -> InvarianceReport:
    """Return which operators of a model give a sequence other bits in another batch.

    Such a model gives a token another log-prob when its sequence is in another batch. The ratio to
    log-probs of the same weights is then not exactly 1. The logits of an invariant model are the same
    bits:

        >>> lm = torch.nn.Sequential(torch.nn.Embedding(50, 50), torch.nn.Softmax(-1))
        >>> ids = torch.randint(50, (8, 6))
        >>> assert lm(ids)[:1].equal(lm(ids[:1]))
        >>> assert check_invariance(lm, ids, verbose=False).invariant

    The first sequence runs alone, twice, and then: in batches of each size; in the last row; there
    with other sequences; padded on the right and on the left. Each operator is judged by
    itself: it is given the recorded bits of the forward alone. A model is also compared without this
    help, which gives the log-ratios.

    The model is in evaluation mode meanwhile, and nothing of it is left changed. Only forwards
    are compared, not gradients. A compiled model is looked into as an eager one.

    Args:
        model: takes `input_ids` (B, T), by this name or as its first argument, and returns logits
            (B, T, V), or an object that has them as `logits`. If it takes `attention_mask` and
            `position_ids`, it gets them; without both it is not padded on the left, and without a
            mask not at all.
        input_ids: (n, T), two sequences or more of equal length; the first one is compared, the
            others are its company. None: random tokens.
        batch_sizes: each 2 or more.
        padding: in columns, less than T. Default: 5, or T - 1 if that is less.
        packed: also put the sequence behind another one in the same row, with positions that start
            again. The model must tell the two apart by the positions alone, as those of transformers
            with attn_implementation "sdpa" or "flash_attention_2" do.
        seed: of the random tokens.
        verbose: print the report.

    Returns:
        An `InvarianceReport`.

    Raises:
        TypeError: `model` is no module, returns no logits, or its weights are sharded (FSDP,
            ZeRO-3).
        ValueError: an argument does not fit.

    Source of the term: He et al., "Defeating Nondeterminism in LLM Inference", Thinking Machines
    2025.
    """
    ids = _checked_ids(_checked_model(model), input_ids, seed)
    sizes = _checked_sizes(batch_sizes)
    if padding is None:
        padding = max(1, min(5, ids.shape[1] - 1))
    if isinstance(padding, bool) or not isinstance(padding, int) or not 0 < padding < ids.shape[1]:
        raise ValueError(
            f"{OP}: padding: want an integer in [1, {ids.shape[1] - 1}], as a sequence has "
            f"{ids.shape[1]} tokens, got {padding!r}"
        )
    with _unchanged(model), torch.compiler.set_stance("force_eager"):
        accepted = _accepted(model)
        forwards = _forwards(ids, sizes, padding, packed, accepted)
        recorded = Trace(model, forwards[0].place)
        with recorded.watching(model):
            try:
                _logits(model, forwards[0], accepted)
            except IndexError as error:
                raise ValueError(
                    f"{OP}: input_ids: want ids that the model has, got [{int(ids.min())}, "
                    f"{int(ids.max())}]: {error}"
                ) from error
        findings = {}
        for forward in forwards[1:]:
            trace = Trace(model, forward.place, recorded)
            with trace.watching(model):
                _logits(model, forward, accepted)
            findings[forward.name] = trace.findings
    with _unchanged(model):
        logits = {x.name: _own_logits(model, x, accepted) for x in forwards}
    report = _report(model, ids[0], logits, findings, sizes)
    if verbose:
        print(report)
    return report


def _report(
    model: nn.Module, ids: Tensor, logits: dict[str, Tensor], findings: dict, sizes: Sequence[int]
) -> InvarianceReport:
    alone, *others = logits
    if int(ids.max()) >= logits[alone].shape[-1] or int(ids.min()) < 0:
        raise ValueError(
            f"{OP}: input_ids: want ids in [0, {logits[alone].shape[-1]}), as the model has as many logits, "
            f"got [{int(ids.min())}, {int(ids.max())}]"
        )
    logps = {name: logprob(x[:-1].float(), ids[1:]) for name, x in logits.items()}
    ratios = {name: float((logps[name] - logps[alone]).abs().max()) for name in others}
    operators = operators_of(findings, AGAIN)
    deterministic = same_bits(logits[AGAIN], logits[alone])
    first, last, company = (logits[x.format(max(sizes))] for x in (BATCH, LAST, OTHERS))
    fixed_shape = same_bits(first, last) and same_bits(first, company)
    equal = all(same_bits(logits[name], logits[alone]) for name in others)
    weight = next(model.parameters(), logits[alone])
    invariant = equal and not operators
    return InvarianceReport(
        model=f"{type(model).__name__} ({str(weight.dtype).removeprefix('torch.')}, {weight.device})",
        invariant=invariant,
        operators=operators,
        forwards=ratios,
        deterministic=deterministic,
        fixed_shape=fixed_shape,
        helps=() if invariant else advice(operators, deterministic, fixed_shape),
    )


AGAIN, BATCH, LAST = "the same call again", "batch of {}", "last row, batch of {}"
OTHERS, RIGHT, LEFT = "other company, batch of {}", "right padding of {}", "left padding of {}"


def _forwards(
    ids: Tensor, sizes: Sequence[int], padding: int, packed: bool, accepted: set[str]
) -> list[Forward]:
    """Return the batches; the first one is the sequence alone."""
    L, most = ids.shape[1], max(sizes)
    company = ids[1:].repeat(-(-(most - 1) // (len(ids) - 1)), 1)

    def forward(name: str, rows: Tensor, place: Place, mask: Tensor | None = None) -> Forward:
        mask = torch.ones_like(rows) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return Forward(name, place, rows, mask, positions)

    def batch(name: str, n: int, row: int = 0, beside: Tensor = company) -> Forward:
        rows = torch.cat([beside[:row], ids[:1], beside[row : n - 1]])
        return forward(name, rows, Place(L, n, L, row))

    found = [forward(name, ids[:1], Place(L, 1, L)) for name in ("alone", AGAIN)]
    found += [batch(BATCH.format(n), n) for n in sizes]
    found.append(batch(LAST.format(most), most, most - 1))
    found.append(batch(OTHERS.format(most), most, most - 1, company.flip(1).roll(1, 0)))
    wide = torch.cat([ids[:1], company[: most - 1]])
    wide = torch.cat([wide, wide[:, :padding]], 1)
    mask = torch.ones_like(wide)
    if "attention_mask" in accepted:
        mask[0, L:] = 0
        found.append(forward(RIGHT.format(padding), wide, Place(L, most, L + padding), mask))
    if {"attention_mask", "position_ids"} <= accepted:
        wide, mask = wide.roll(padding, 1), mask.roll(padding, 1)
        place = Place(L, most, L + padding, before=padding)
        found.append(forward(LEFT.format(padding), wide, place, mask))
    if packed:
        if "position_ids" not in accepted:
            raise ValueError(
                f"{OP}: packed: want False, as the model takes no position_ids, got True"
            )
        row = torch.cat([company[:1], ids[:1]], 1)
        positions = torch.arange(L, device=ids.device).repeat(2)[None]
        place = Place(L, 1, 2 * L, before=L)
        found.append(Forward("packed", place, row, torch.ones_like(row), positions))
    return found


def _logits(model: nn.Module, forward: Forward, accepted: set[str]) -> Tensor:
    """Return the logits (rows, columns, V) of a batch."""
    given: dict[str, Any] = {
        "attention_mask": None if forward.name == "packed" else forward.mask,
        "position_ids": forward.positions,
        "use_cache": False,
    }
    given = {name: x for name, x in given.items() if name in accepted}
    if "input_ids" in accepted:
        output = model(input_ids=forward.ids, **given)
    else:
        output = model(forward.ids, **given)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{OP}: model: want logits, or an output with logits, got {type(output).__name__}"
        )
    if logits.ndim != 3 or logits.shape[:2] != forward.ids.shape:
        raise ValueError(
            f"{OP}: model: want logits (B, T, V) for input_ids {shape_of(forward.ids)}, got "
            f"{shape_of(logits)}"
        )
    return logits


def _own_logits(model: nn.Module, forward: Forward, accepted: set[str]) -> Tensor:
    """Return the logits (T, V) of the sequence that is compared."""
    place = forward.place
    own = _logits(model, forward, accepted)[place.row, place.before : place.before + place.length]
    return own.clone()


def _checked_model(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: model: want a torch.nn.Module, got {type(model).__name__}")
    if is_sharded(model):
        raise TypeError(f"{OP}: model: its weights are sharded: check it before they are")
    return model


def _checked_ids(model: nn.Module, input_ids: Any, seed: int) -> Tensor:
    weight = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
    if input_ids is None:
        table = next((x for x in model.modules() if isinstance(x, nn.Embedding)), None)
        if table is None:
            raise ValueError(
                f"{OP}: input_ids: want them, as the model has no nn.Embedding, got None"
            )
        draw = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(table.num_embeddings, (8, LENGTH), generator=draw)
    try:
        ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{OP}: input_ids: want sequences of equal length: {error}") from error
    if ids.ndim != 2 or len(ids) < 2 or ids.shape[1] < 2:
        raise ValueError(
            f"{OP}: input_ids: want (n, T), two sequences or more of two tokens or more, got "
            f"{shape_of(ids)}"
        )
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{OP}: input_ids: want integers, got {ids.dtype}")
    return ids.to(weight.device, torch.int64)


def _checked_sizes(batch_sizes: Sequence[int]) -> list[int]:
    sizes = list(batch_sizes)
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in sizes):
        raise ValueError(f"{OP}: batch_sizes: want integers, each 2 or more, got {batch_sizes!r}")
    return sizes


def _accepted(model: nn.Module) -> set[str]:
    """Return the names of the arguments of a model, inside the wrappers of DDP, PEFT and others."""
    inner: Any = model
    while True:
        names = set(inspect.signature(inner.forward).parameters)
        children = dict(inner.named_children())
        if hasattr(type(inner), "get_base_model"):
            inner = inner.get_base_model()
        elif "input_ids" not in names and "_orig_mod" in children:
            inner = children["_orig_mod"]
        elif "input_ids" not in names and "kwargs" in names and "module" in children:
            inner = children["module"]
        else:
            return names


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients; buffers and random number generators are as before afterwards."""
    buffers = [(x, x.clone()) for x in model.buffers()]
    devices = {x.device for x in model.parameters() if x.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices), evaluating(model):
        try:
            yield
        finally:
            for x, before in buffers:
                x.copy_(before)
