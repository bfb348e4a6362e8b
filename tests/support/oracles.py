"""Code of other trainers that tests compare with: statements of TRL's methods, verl's `core_algos`."""

import ast
import functools
import importlib.util
import inspect
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch

TRL = "the oracle is TRL's own code"


@functools.cache
def _statements_of_trl(first, last):
    """The code of the statements that `run_of_trl` runs: to find them takes a third of a second."""
    from trl.trainer import grpo_trainer

    source = textwrap.dedent(
        inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    )
    for node in ast.walk(ast.parse(source)):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if not isinstance(block, list):
                continue
            texts = [ast.get_source_segment(source, statement) for statement in block]
            starts = [i for i, text in enumerate(texts) if text.startswith(first)]
            ends = [i for i, text in enumerate(texts) if text.startswith(last)]
            if starts and ends:
                module = ast.Module(block[starts[0] : ends[0] + 1], type_ignores=[])
                return compile(module, "grpo_trainer.py", "exec")
    raise AssertionError(f"TRL has no statements from {first!r} to {last!r} any more")


def run_of_trl(first, last, scope):
    """Run statements of TRL's `_generate_and_score_completions` in `scope` and return it.

    From the first statement whose source starts with `first` to the one that starts with `last`, wherever in
    the method they stand next to each other: the formulas there have no function of their own.
    """
    pytest.importorskip("trl", "1.15", reason=TRL)
    from trl.trainer import grpo_trainer

    exec(_statements_of_trl(first, last), vars(grpo_trainer) | scope, scope)
    return scope


def masked_sum(x, mask, axis=None):
    """verl's: a mask of fractions weighs."""
    return (torch.where(mask.bool(), x, 0) * mask).sum(axis)


def masked_mean(x, mask, axis=None):
    return masked_sum(x, mask, axis) / (mask.sum(axis) + 1e-8)


def masked_whiten(x, mask):
    """Whiten as verl does: the variance is unbiased over the live tokens, with 1e-8 under the root."""
    live = x[mask.bool()]
    return (x - live.mean()) * torch.rsqrt(live.var() + 1e-8)


@functools.cache
def _load_verl(path):
    """verl's file alone: what it imports of verl is replaced, so that only torch and NumPy are needed."""
    tools = SimpleNamespace(
        masked_mean=masked_mean,
        masked_sum=masked_sum,
        masked_whiten=masked_whiten,
    )
    empty = {"as_torch_index": None, "group_mean_std": None}
    stubs = {
        "omegaconf": {"DictConfig": type("DictConfig", (), {})},
        "verl": {},
        "verl.utils": {"torch_functional": tools} | empty,
        "verl.utils.torch_functional": vars(tools),
        "verl.utils.import_utils": {"deprecated": lambda *_: lambda function: function},
        "verl.trainer": {},
        "verl.trainer.config": {"AlgoConfig": type("AlgoConfig", (), {})},
        "verl.workers": {},
        "verl.workers.config": {"ActorConfig": type("ActorConfig", (), {})},
    }
    modules = {}
    for name, contents in stubs.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(contents)
    spec = importlib.util.spec_from_file_location("verl_core_algos", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules):
        spec.loader.exec_module(module)
    return module


def verl_folder():
    """Find verl's sources: the installed package, or the copy that `make` puts beside the environment.

    It is kept off the path: verl's wheel brings a top-level package `tests`, which would hide ours.
    """
    spec = importlib.util.find_spec("verl")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in map(Path, [*folders, Path(sys.prefix) / "oracles" / "verl"]):
        if (folder / "trainer" / "ppo" / "core_algos.py").is_file():
            return folder
    return None


def verl_core_algos():
    """verl's `core_algos`, or a skip where verl is not installed."""
    folder = verl_folder()
    if folder is None:
        pytest.skip("verl is not installed: its core_algos is an oracle here")
    return _load_verl(folder / "trainer" / "ppo" / "core_algos.py")
