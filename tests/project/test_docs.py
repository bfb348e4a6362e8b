"""The pages in docs/ say what the code does, and their prose wraps."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from grpo_fast import weights
from grpo_fast.integrations import skyrl, verl
from grpo_fast.objective import (
    DEFAULTS,
    KL,
    USED_BY,
    Objective,
    Ratio,
    Reduction,
    Surrogate,
)
from grpo_fast.presets import CALLER, PAPERS, PRESETS, TRAINERS
from grpo_fast.weights import importance
from tests.support import accuracy

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md"), DOCS.parent / "kernels" / "README.md"]
TEXT = (DOCS / "objectives.md").read_text()


def test_every_choice_has_a_row():
    for kind in (Surrogate, Ratio, KL, Reduction):
        for choice in get_args(kind):
            assert re.search(rf"^\| `{choice}` \|", TEXT, re.MULTILINE), choice


def test_every_option_is_named():
    for field in dataclasses.fields(Objective):
        if field.init and field.name not in ("surrogate", "ratio", "reduction", "kl"):
            assert field.name in TEXT, field.name


def test_a_surrogate_names_the_options_that_belong_to_it():
    for surrogate in get_args(Surrogate):
        row = re.search(rf"^\| `{surrogate}` \|.*$", TEXT, re.MULTILINE)[0]
        if surrogate == "dppo_kl":  # "the same" as the row above
            continue
        for option, users in USED_BY.items():
            assert (f"`{option}`" in row) == (surrogate in users), (surrogate, option)


def options_of(name):
    return ", ".join(f"`{k}={v!r}`" for k, v in PRESETS[name].items())


@pytest.mark.parametrize("name", accuracy.CASES)
def test_errors_are_within_what_the_page_says(name, backend, device):
    row = re.search(rf"^\| `{re.escape(name)}` \| (\S+) \| (\S+) \|$", TEXT, re.MULTILINE)
    assert row, f"{name} has no row in the table of errors"
    loss, grad = accuracy.errors(accuracy.CASES[name], device)
    assert loss <= float(row[1])
    assert grad <= float(row[2])


def test_presets_are_listed_as_they_are():
    for name in PAPERS:
        row = f"| `{name}` | {options_of(name)} |"
        assert row in TEXT, f"the row of {name} should read: {row}"


def trainer_table():
    """The section "Which trainer calls it what", from the code's own table."""
    lines = ["| name | options | and from the caller |", "|---|---|---|"]
    for trainer, release in TRAINERS.items():
        lines.append(f"| **{release}** | | |")
        names = [name for name in PRESETS if name.startswith(f"{trainer}/")]
        # A level of TRL's is its loss type with a ratio per sequence, and no line of its own.
        names = [name for name in names if not name.endswith("/sequence")]
        lines += [f"| `{name}` | {options_of(name)} | {CALLER.get(name, '')} |" for name in names]
    return "\n".join(lines)


def test_trainers_meanings_are_listed_as_they_are():
    assert trainer_table() in TEXT, f"the table should read:\n{trainer_table()}"
    for name, options in PRESETS.items():
        if name.endswith("/sequence"):
            assert options == PRESETS[name.removesuffix("/sequence")] | {"ratio": "sequence"}


def test_defaults_have_no_effect():
    """An option that belongs to other surrogates must be legal at its default."""
    for surrogate in get_args(Surrogate):
        unused = {k: DEFAULTS[k] for k, users in USED_BY.items() if surrogate not in users}
        assert Objective(surrogate=surrogate, **unused) == Objective(surrogate=surrogate)


def test_every_weight_has_a_row():
    text = (DOCS / "weights.md").read_text()
    for name in (*weights.__all__, *importance.LEVELS, *importance.MODES):
        assert re.search(rf"^\| `{name}` \|", text, re.MULTILINE), name


def test_the_examples_of_the_weights_run():
    examples = re.findall(r"```python\n(.*?)```", (DOCS / "weights.md").read_text(), re.DOTALL)
    old = -torch.rand(4, 5)
    scope = {
        "torch": torch,
        "Objective": Objective,
        "old_logps": old,
        "sampling_logps": old + 0.1 * torch.randn(4, 5),
        "entropy": torch.rand(4, 5),
        "mask": torch.ones(4, 5),
        "advantages": torch.randn(4),
        "rewards": torch.tensor([0.0, 1.0, 1.0, 1.0]),
        "step": 1,
    }
    assert len(examples) == 6
    for example in examples:
        scope["logps"] = (old + 0.1 * torch.randn(4, 5)).requires_grad_()
        exec(example, scope)
        scope.pop("out").loss.backward()
        assert scope["logps"].grad.isfinite().all()


def test_every_adapter_is_documented_by_names_that_exist():
    text = (DOCS / "integrations.md").read_text()
    named = set(re.findall(r"grpo_fast\.integrations\.(\w+)(?:\.(\w+))?", text))
    for module, name in named - {("verl_logprobs", "")}:  # importing that one patches verl
        adapter = importlib.import_module(f"grpo_fast.integrations.{module}")
        assert not name or hasattr(adapter, name), f"{module} has no {name}"
    folder = DOCS.parent / "grpo_fast" / "integrations"
    files = {path.stem for path in folder.glob("[a-z]*")} - {"shared"}
    elsewhere = {"trl", "transformers"}  # with pages of their own
    assert files - elsewhere <= {module for module, _ in named}
    for losses in (verl.POLICY_LOSSES, skyrl.POLICY_LOSSES):
        assert all(f"`{name}`" in text for name in losses)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(DOCS.parent).as_posix())
def test_prose_wraps(page):
    """At 100 columns, but for tables, code and links."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    lines = [x for x in text.splitlines() if len(x) > 100 and "|" not in x and "http" not in x]
    assert not [x for x in lines if not x.startswith("`")], lines[:3]
