"""The pages in docs/ say what the code does, and their prose wraps."""

import ast
import contextlib
import dataclasses
import importlib
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import tomllib
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
from grpo_fast.trainer import cli
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.weights import importance
from tests.support import accuracy

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [*DOCS.glob("**/*.md"), *DOCS.parent.glob("*.md"), DOCS.parent / "kernels" / "README.md"]
HOSTS = [DOCS / "integrations.md", *DOCS.glob("trainers/*.md")]
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


def blocks(path):
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "name", ["concepts", "install", "invariance", "numerics", "start", "troubleshooting"]
)
def test_the_code_of_a_page_prints_what_it_says(name, capsys):
    """The blocks run one after the other; the last block of the start is the reader's own file."""
    code = "".join(blocks(DOCS / f"{name}.md")[: 1 if name == "start" else None])
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert said or name == "install"
    for text in said:
        assert text in printed, f"{name}.md: no line is {text!r} in {printed}"
    if name == "troubleshooting":
        assert printed.index("True", 4) < printed.index("False"), "the KL, and its clamp"


def test_warnings_and_errors_are_quoted_as_they_are():
    """Each text in the last two tables of the page stands in the code; "..." is what varies."""
    text = (DOCS / "troubleshooting.md").read_text()
    tables = text.split("\n## Warnings\n")[1]
    quoted = re.findall(r"^\| `([^`]+)`", tables, re.MULTILINE)
    assert len(quoted) > 8
    constants = set()
    for path in (DOCS.parent / "grpo_fast").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.add(node.value)
    of_pytorch = "Trying to backward through the graph a second time"
    for line in quoted:
        for part in filter(None, (x.strip(" .():=") for x in line.split("..."))):
            known = any(part in x for x in constants) or line == of_pytorch
            assert known, f"nothing says {part!r}"


def test_metrics_that_the_page_on_trouble_names_exist():
    known = set(re.findall(r"^\| `(\S+)` \|", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    text = (DOCS / "troubleshooting.md").read_text()
    prefixes = r"ratio|clip_fraction|approx_kl|importance_weight|groups|skipped|effective"
    named = set(re.findall(rf"[`\"]((?:{prefixes})_\w+)[`\"]", text))
    assert len(named) > 7
    assert named <= known | {"importance_weights"}, named - known


def test_every_adapter_is_documented_by_names_that_exist():
    text = "".join(page.read_text() for page in HOSTS)
    named = set(re.findall(r"grpo_fast\.integrations\.(\w+)(?:\.(\w+))?", text))
    for page in HOSTS:
        for code in blocks(page):
            for module in re.findall(r"from grpo_fast\.integrations import (\w+)", code):
                named |= {(module, name) for name in re.findall(rf"^{module}\.(\w+)", code, re.M)}
    own_page = {"transformers"}
    for module, name in named - {("verl_logprobs", "")}:  # importing that one patches verl
        adapter = importlib.import_module(f"grpo_fast.integrations.{module}")
        assert not name or module == "trl" or hasattr(adapter, name), f"{module} has no {name}"
    folder = DOCS.parent / "grpo_fast" / "integrations"
    files = {path.stem for path in folder.glob("[a-z]*")} - {"shared"}
    assert files - own_page <= {module for module, _ in named}
    pages = {page.stem for page in HOSTS} | {"trl", "verl_logprobs"}
    assert files - own_page <= pages, "each trainer has a page"
    for trainer, losses in (("verl", verl.POLICY_LOSSES), ("skyrl", skyrl.POLICY_LOSSES)):
        page = (DOCS / "trainers" / f"{trainer}.md").read_text()
        assert all(f"`{name}`" in page for name in losses)


def test_versions_are_those_of_the_project():
    """The oldest versions are those that pip is asked for; the tests' own are pinned."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = " ".join([*project["dependencies"], *extras["train"], *extras["trl"]])
    pins = (DOCS.parent / "constraints.txt").read_text()
    rows = re.findall(
        r"^\| (\w+)(?:, for [\w ]+)? \| ([\d.]+).*? \| ([\d.]+) \|$",
        (DOCS / "compatibility.md").read_text(),
        re.MULTILINE,
    )
    assert [name for name, *_ in rows] == [
        "Python",
        "torch",
        "triton",
        "einops",
        "transformers",
        "TRL",
    ]
    assert project["requires-python"] == f">={rows[0][1]}"
    for name, oldest, used in rows[1:]:
        assert re.search(rf"\b{name.lower()}>={re.escape(oldest)}\b", wanted), name
        assert f"\n{name.lower()}=={used}\n" in pins, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(DOCS.parent).as_posix())
def test_prose_wraps(page):
    """At 100 columns, but for tables, code and links."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    lines = [x for x in text.splitlines() if len(x) > 100 and "|" not in x and "http" not in x]
    assert not [x for x in lines if not x.startswith("`")], lines[:3]


def command_lines(path):
    """The lines of a page's code blocks that call `grpo-fast`, without comments, as lists of words."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    code = "".join(text for language, text in fences if not language)
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(x, comments=True)[1:] for x in lines if x.startswith("grpo-fast ")]


def test_commands_have_the_options_that_documents_give_them(capsys):
    """The help of a command lists them; `train` has those of its configuration, and `plan` takes both."""
    found = [(page.name, words) for page in PAGES for words in command_lines(page)]
    assert len(found) > 25
    known = {"train": {f"--{field.name}" for field in dataclasses.fields(TrainConfig)}}
    for command in {words[0] for _, words in found} - {"train"}:
        with contextlib.suppress(SystemExit):  # argparse ends so
            cli.main([command, "--help"])
        known[command] = set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))
    known["plan"] |= known["train"]
    for page, (command, *words) in found:
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= known[command], f"{page}: grpo-fast {command} has no {options}"
