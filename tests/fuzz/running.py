"""Which functions are fuzzed and how often, and the run of a case."""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from tests.fuzz import losses, others, weights, wrong
from tests.fuzz.drawing import Draws, UndecidedError

CASES = {**losses.CASES, **others.CASES, **weights.CASES, **wrong.CASES}
CHUNK = 50  # cases of a function that a process runs one after another
# How many chunks a function gets for each one of the others.
SHARE = {
    "grpo_loss": 12,
    "linear_grpo_loss": 8,
    "policy_loss": 6,
    "logprob": 5,
    "linear_logprob": 4,
}
SHARE |= {"group_advantage": 4, "wrong arguments": 4, "token_diagnostics": 2}
# Functions that launch kernels, which the interpreter runs.
LAUNCHES = ("grpo_loss", "linear_grpo_loss", "policy_loss", "logprob", "linear_logprob")
LAUNCHES += ("group_advantage",)
# Public names that no strategy calls, and why.
WITHOUT_STRATEGY = {
    "Choice": "a record",
    "Head": "a record",
    "InvarianceReport": "a record",
    "LossOutput": "a record; the cases of the losses read its fields",
    "Operator": "a record",
    "Part": "a record",
    "Plan": "a record; it needs models of transformers",
    "Report": "a record",
    "TokenDiagnostics": "a record; `token_diagnostics` returns it",
    "FallbackError": "an error",
    "log_calls": "prints lines; tests/project/test_log.py",
    "assert_as_accurate": "the criterion itself; tests/project/test_docstrings.py",
    "check_invariance": "needs a model; tests/invariance",
    "GRPOTrainer": "needs TRL; tests/integrations",
    "objective": "needs TRL; tests/integrations",
    "patch": "needs TRL; tests/integrations",
    **dict.fromkeys(
        ("with_head", "hidden_states", "head_of", "check_head", "inside_forward"),
        "needs a model of transformers; tests/integrations/test_transformers.py",
    ),
    **dict.fromkeys(
        ("plan", "forward", "backward", "choose", "check", "layers_recomputed"),
        "needs a model of transformers; tests/shared_prompt compares on real architectures",
    ),
}


class Failure(NamedTuple):
    """A case that failed, with as few choices as it still fails with."""

    name: str
    seed: int
    backend: str
    error: str
    about: dict[str, Any]

    @property
    def command(self) -> str:
        """The line that runs this case again."""
        backend = "" if self.backend == "torch" else f" --backend {self.backend}"
        only = f"'{self.name}'" if " " in self.name else self.name
        return f"python -m tests.fuzz --only {only} --seed {self.seed} --cases 1{backend}"


class Result(NamedTuple):
    """What a chunk gave."""

    name: str
    cases: int
    undecided: int  # of these
    failures: list[Failure]


@contextlib.contextmanager
def prepared(backend: str) -> Iterator[None]:
    """Choose the implementation; fill what `torch.empty` returns with NaN; and put bands around buffers."""
    os.environ["GRPO_FAST_BACKEND"] = backend
    threads, fill = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with contextlib.ExitStack() as stack:
        if backend == "triton" and not torch.cuda.is_available():
            assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 first"
            from triton.runtime.interpreter import GridExecutor

            from tests.support.guards import guarded
            from tests.support.quick import quick

            stack.enter_context(quick())
            bands = guarded(GridExecutor.__call__)
            stack.enter_context(mock.patch.object(GridExecutor, "__call__", bands))
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(fill)
    del os.environ["GRPO_FAST_BACKEND"]


def tried(
    name: str, seed: int, backend: str, simplest: frozenset[str] = frozenset()
) -> Failure | None:
    """Run one case; return its failure.

    Raises:
        UndecidedError: the case shows nothing.
    """
    draws = Draws(seed, backend, simplest)
    try:
        CASES[name](draws)
    except UndecidedError:
        raise
    except Exception as error:
        text = (
            str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        )
        return Failure(name, seed, backend, text, draws.about)
    return None


def simpler(failure: Failure) -> Failure:
    """Make one choice after another the simplest, as long as the case fails."""
    simplest: frozenset[str] = frozenset()
    for choice in list(failure.about):
        with contextlib.suppress(UndecidedError):
            found = tried(*failure[:3], simplest | {choice})
            if found is not None:
                failure, simplest = found, simplest | {choice}
    return failure


def chunk(name: str, seeds: range, backend: str = "torch", most: int = 1) -> Result:
    """Run the cases of these seeds.

    Args:
        most: how many failures are made simpler; the others are returned as they are.
    """
    undecided, failures = 0, []
    for seed in seeds:
        try:
            found = tried(name, seed, backend)
        except UndecidedError:
            undecided += 1
            continue
        if found is not None:
            failures.append(simpler(found) if len(failures) < most else found)
    return Result(name, len(seeds), undecided, failures)


def work(task: tuple[str, range, str]) -> Result:
    """Run a chunk with what `prepared` sets."""
    with warnings.catch_warnings(), prepared(task[2]):
        warnings.simplefilter("ignore")
        return chunk(*task)


def shares(names: list[str], cases: int) -> dict[str, int]:
    """How many cases each function gets."""
    total = sum(SHARE.get(name, 1) for name in names)
    return {name: math.ceil(cases * SHARE.get(name, 1) / total) for name in names}


def tasks(names: list[str], cases: int, first: int) -> Iterator[tuple[str, range]]:
    """The chunks of a run, functions in turns, as (name, seeds)."""
    left = shares(names, cases)
    for start in range(0, max(left.values()), CHUNK):
        for name in names:
            if start < left[name]:
                yield name, range(first + start, first + min(start + CHUNK, left[name]))
