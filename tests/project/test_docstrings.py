"""The examples in the docstrings of public functions run, and no docstring begins with a riddle."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers

import grpo_fast
from grpo_fast import diagnostics, loss, ops, reference, shared_prompt, testing, weights

ROOT = Path(__file__).resolve().parents[2]


def public() -> dict[str, object]:
    """The public functions and classes, by the name of the module that a user imports them from."""
    found = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (grpo_fast, diagnostics, loss, ops, weights)
        for name in module.__all__
    }
    for name in ("backward", "check", "choose", "forward", "plan", "with_head"):
        found[f"grpo_fast.shared_prompt.{name}"] = getattr(shared_prompt, name)
    found["grpo_fast.Objective.preset"] = grpo_fast.Objective.preset
    found["grpo_fast.testing.assert_as_accurate"] = testing.assert_as_accurate
    for name, x in vars(reference).items():
        if inspect.isfunction(x) and x.__module__ == reference.__name__ and name[0] != "_":
            found[f"{reference.__name__}.{name}"] = x
    once = {id(x): name for name, x in reversed(found.items()) if not inspect.ismodule(x)}
    return {name: found[name] for name in sorted(once.values())}


PUBLIC = public()
# Docstrings with other sections than Args and Returns. Classes have attributes.
SECTIONS = {
    # Their arguments are those of the losses of the same name.
    "grpo_fast.reference.grpo_loss": ["Returns"],
    "grpo_fast.reference.policy_loss": ["Returns"],
    "grpo_fast.LossOutput": ["Attributes"],
    "grpo_fast.Objective": ["Attributes", "Raises"],
    "grpo_fast.diagnostics.TokenDiagnostics": ["Attributes"],
    "grpo_fast.testing.assert_as_accurate": ["Args", "Raises"],  # returns nothing
}
RIDDLE = re.compile(r"(Of|As|The same|That of|What)\b")
FILES = [
    path
    for path in sorted([*ROOT.glob("kernels/*.py"), *ROOT.glob("grpo_fast/**/*.py")])
    if "kernels" not in path.relative_to(ROOT).parts[1:]  # a link
]


def tiny_causal_lm() -> transformers.LlamaForCausalLM:
    """Make a Llama with random weights and 61 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **sizes, **heads))


def scope(name: str) -> dict[str, object]:
    """The names that an example may use: torch, the package's, and those of its own module."""
    home = importlib.import_module(PUBLIC[name].__module__)
    names = {x: getattr(grpo_fast, x) for x in grpo_fast.__all__}
    names |= {"shared_prompt": shared_prompt, "tiny_causal_lm": tiny_causal_lm}
    return {"torch": torch, **names, **{x: y for x, y in vars(home).items() if x[0] != "_"}}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, backend, device):
    if backend == "triton" and name.startswith(
        ("grpo_fast.reference.", "grpo_fast.testing.", "grpo_fast.shared_prompt.")
    ):
        pytest.skip("no operators in it")
    text = inspect.getdoc(PUBLIC[name])
    assert ">>>" in text, f"{name}: its docstring has no example"
    test = doctest.DocTestParser().get_doctest(text, scope(name), name, None, 0)
    report = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    with torch.device(device):
        doctest.DocTestRunner(verbose=False, optionflags=flags).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", PUBLIC)
def test_sections(name):
    text = inspect.getdoc(PUBLIC[name])
    assert text.split("\n")[1] == "", f"{name}: its first line is no whole sentence"
    for section in SECTIONS.get(name, ["Args", "Returns"]):
        assert re.search(rf"^{section}:$", text, re.MULTILINE), f"{name}: no section {section}"
    if "Args:" in text or "Attributes:" in text:
        for parameter in inspect.signature(PUBLIC[name]).parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{name}: {parameter} is not explained"


def first_lines(path: Path) -> dict[str, str]:
    """The first lines of the docstrings of a file, by their place."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, kinds)]
    found = {x: ast.get_docstring(x) for x in nodes}
    return {
        f"{path.relative_to(ROOT)}:{getattr(x, 'lineno', 1)}": text.strip().partition("\n")[0]
        for x, text in found.items()
        if text
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_first_lines_stand_alone(path):
    """Without the name above it a first line that begins so has no subject."""
    riddles = {where: line for where, line in first_lines(path).items() if RIDDLE.match(line)}
    assert not riddles
