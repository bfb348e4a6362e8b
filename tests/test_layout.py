"""The layering rule, and the five homes of a kernel."""

import ast
from pathlib import Path

import pytest

from grpo_fast import reference

ROOT = Path(__file__).resolve().parents[1]
# Bottom to top; a module imports from its own layer or from one below.
LAYERS = [
    {"kernels"},
    {"presets", "_names"},
    {"_operands", "_overwritten"},
    {"objective"},
    {"reference", "reference_terms", "reference_rewards"},
    {"ops"},
    {"loss", "weights", "_selected", "diagnostics"},
    {"integrations"},
    {"trainer"},
]
ALLOWED_IN_KERNELS = {"torch", "triton", "functools", "dataclasses", "grpo_fast"}
# What kernels have in common, and parts of other stems that have a file of their own. The rest are stems.
SHARED = {
    "tiles",
    "terms",
    "scoring",
    "edges",
    "rows",
    "schedules",
    "scale_rows",
    "on_chip",
    "chunks",
}
# A kernel that every loss launches once has its time in theirs.
BENCHMARK = {"reduction_weights": "policy_loss"}
REFERENCE = {"grpo": "grpo_loss", "sequence_loss": "policy_terms"}
MODULES = sorted(ROOT.glob("kernels/*.py")) + sorted(
    path for path in (ROOT / "grpo_fast").glob("**/*.py") if "kernels" not in path.parts
)
STEMS = sorted(path.stem for path in ROOT.glob("kernels/*.py") if path.stem not in SHARED)


def layer_of(module: str) -> int | None:
    head = module.removeprefix("grpo_fast.").split(".")[0]
    if not module.startswith("grpo_fast."):
        return None
    return next((i for i, layer in enumerate(LAYERS) if head in layer), None)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_downwards(path):
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts if relative.parts[0] == "grpo_fast" else ("grpo_fast", *relative.parts)
    mine = layer_of(".".join(parts))
    for name in imports(path):
        theirs = layer_of(name)
        if mine is not None and theirs is not None:
            assert theirs <= mine, f"{relative} imports {name}, a layer above it"
        if parts[1] == "kernels":
            assert name.split(".")[0] in ALLOWED_IN_KERNELS, f"{relative} imports {name}"


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_has_five_homes(stem):
    for home in (
        f"kernels/{stem}.py",
        f"grpo_fast/ops/{stem}.py",
        f"tests/test_{stem}.py",
        f"benchmarks/bench_{BENCHMARK.get(stem, stem)}.py",
    ):
        assert (ROOT / home).is_file(), f"{stem}: {home} is missing"
    assert hasattr(reference, REFERENCE.get(stem, stem))


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda p: p.stem)
def test_a_masked_load_says_what_is_elsewhere(path):
    """Anything, if it does not; but the interpreter takes 0, so no other test sees it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            words = {word.arg for word in node.keywords}
            assert "mask" not in words or "other" in words, f"{path.name}:{node.lineno}"


def test_files_and_functions_stay_readable():
    # Launchers and operators take long argument lists, one argument a line.
    for path in [*MODULES, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        lines = path.read_text().count("\n")
        assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines"


def test_nothing_speaks_of_the_machine_it_was_written_on():
    """No absolute path of a developer's machine, and no package registry's address."""
    banned = [
        "/" + "work/",
        "/" + "tmp/v/",
        "py" + "pi.org",
        "/" + "home/",
        "download." + "pytorch",
    ]
    for path in ROOT.rglob("*"):
        hidden = any(
            part.startswith(".") and part != ".ci" for part in path.relative_to(ROOT).parts
        )
        if (
            hidden
            or not path.is_file()
            or path.suffix not in {".py", ".md", ".toml", ".txt", ".json", ""}
        ):
            continue
        if {"runs", "build"} & set(path.relative_to(ROOT).parts):
            continue
        text = path.read_text(errors="replace")
        for word in banned:
            assert word not in text, f"{path.relative_to(ROOT)} mentions {word}"
