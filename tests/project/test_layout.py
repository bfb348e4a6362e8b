"""The layering rule, the homes of a kernel, and how long functions and calls may be."""

import ast
import graphlib
from pathlib import Path

import pytest

from grpo_fast import records, reference

ROOT = Path(__file__).resolve().parents[2]
# Bottom to top; a module imports from its own layer or from one below.
LAYERS = [
    {"notices", "presets", "spelling", "surrogates", "testing"},
    {"operands", "overwritten"},
    {"objective", "records"},
    {"checks", "sequences", "metrics", "reference"},
    {"kernels", "torch_kernels"},
    {"ops"},
    {"loss", "weights", "diagnostics"},
    {"integrations", "hub", "invariance", "shared_prompt"},
    {"doctor"},
    {"trainer"},
]
ALLOWED_IN_KERNELS = {
    "torch",
    "triton",
    "collections",
    "functools",
    "dataclasses",
    "typing",
    "grpo_fast",
}
# Files of kernels/ that no operator has the name of: what kernels share, and a second way to run `grpo`.
SHARED = {"tiles", "terms", "scalars", "scoring", "edges", "rows", "schedules", "on_chip", "chunks"}
# Kernels whose time is in that of others, and those that the specification has under another name or not.
WITHOUT_BENCHMARK = {"reduction_weights", "scaling"}
REFERENCE = {"grpo": "grpo_loss", "sequence_loss": "policy_terms", "scaling": None}
MODULES = sorted(ROOT.glob("kernels/*.py")) + sorted(
    path for path in (ROOT / "grpo_fast").glob("**/*.py") if "kernels" not in path.parts
)
STEMS = sorted(path.stem for path in ROOT.glob("kernels/*.py") if path.stem not in SHARED)
CODE = [
    *MODULES,
    *(p for x in ("benchmarks", "docs", "examples", "tests") for p in ROOT.glob(f"{x}/**/*.py")),
]
MOST_LINES, MOST_PARAMETERS, MOST_POSITIONAL = 80, 10, 8
# Public functions, whose signatures are fixed, and a host's own function.
PUBLIC = {
    "grpo_loss",
    "linear_grpo_loss",
    "policy_loss",
    "linear_logprob",
    "group_advantage",
    "clip_cov",
    "ppo_actor_loss_fn",
}


def name_of(path: Path) -> str:
    """The name under which a module of the product is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "grpo_fast" else ("grpo_fast", *parts)
    return ".".join(parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in MODULES}


def layer_of(module: str) -> int | None:
    """The layer of a module of the product; None of others, and of the package itself."""
    if not module.startswith("grpo_fast."):
        return None
    head = module.split(".")[1]
    found = [i for i, layer in enumerate(LAYERS) if head in layer]
    assert found or head.startswith("_"), f"{module} has no layer: give it one"
    return found[0] if found else None


def imports(tree: ast.AST, path: Path) -> set[str]:
    """The modules that code imports, the names of a `from` import among them if they are modules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & NAMES
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_downwards(path):
    mine = layer_of(name_of(path))
    for name in imports(ast.parse(path.read_text()), path):
        theirs = layer_of(name)
        if mine is not None and theirs is not None:
            assert theirs <= mine, f"{path} imports {name}, a layer above it"
            checks = name_of(path).startswith(
                "grpo_fast.doctor."
            )  # the self-check compares with it
            assert checks or "reference" not in name, f"{path} imports the specification"
        if "kernels" in path.relative_to(ROOT).parts[:1]:
            assert name.split(".")[0] in ALLOWED_IN_KERNELS, f"{path} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    """Imports at the top of modules; those inside functions are there for what is optional."""
    graph = {}
    for path in MODULES:
        tree = ast.parse(path.read_text())
        tree.body = [x for x in tree.body if isinstance(x, (ast.Import, ast.ImportFrom))]
        graph[name_of(path)] = (imports(tree, path) & NAMES) - {"grpo_fast", name_of(path)}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("stem", STEMS)
def test_a_kernel_has_its_homes(stem):
    homes = [
        f"kernels/{stem}.py",
        f"grpo_fast/torch_kernels/{stem}.py",
        f"grpo_fast/ops/{stem}.py",
        f"tests/ops/test_{stem}.py",
    ]
    if stem not in WITHOUT_BENCHMARK:
        homes.append(f"benchmarks/bench_{stem}.py")
    for home in homes:
        assert (ROOT / home).is_file(), f"{stem}: {home} is missing"
    name = REFERENCE.get(stem, stem)
    assert name is None or hasattr(reference, name)


def parameters_of(path: Path) -> dict[str, list[str]]:
    """The parameters of the functions that a file of kernels defines for its callers."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            found[node.name] = [x.arg for x in node.args.args]
    return found


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("grpo_fast/torch_kernels/*.py")), ids=lambda p: p.stem
)
def test_both_sets_of_kernels_have_the_same_signatures(path):
    theirs = ROOT / "kernels" / path.name
    if path.stem in ("__init__", "compiled"):  # Triton compiles the kernels itself
        return
    assert theirs.is_file()
    mine, theirs = parameters_of(path), parameters_of(theirs)
    called = {name for name in mine if f'"{path.stem}.{name}"' in OPERATORS}
    assert called or path.stem in ("rows", "terms")
    for name in called:
        assert mine[name] == theirs[name], f"{path.stem}.{name}"


OPERATORS = "".join(path.read_text() for path in ROOT.glob("grpo_fast/ops/**/*.py"))


def test_records_have_one_order():
    """What several records hold, they hold in the same order."""
    from grpo_fast.loss.arguments import LossArguments

    names = {"old_logps": "old_logp", "ref_logps": "ref_logp", "importance_weights": "importance"}
    orders = [
        [names.get(name, name) for name in x._fields]
        for x in [*vars(records).values(), LossArguments]
        if hasattr(x, "_fields")
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            both = [x for x in one if x in other]
            assert both == [x for x in other if x in one]


def functions(path: Path) -> list[ast.FunctionDef]:
    return [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.FunctionDef)]


def positional(call: ast.Call) -> int:
    """How many values a call passes by position, those of a starred tuple or list among them."""
    count = 0
    for x in call.args:
        star = x.value if isinstance(x, ast.Starred) else None
        count += len(star.elts) if isinstance(star, (ast.Tuple, ast.List)) else 1
    return count


def code_lines(path: Path) -> int:
    """The lines of a file that are code: no docstring, no comment, no empty line."""
    text = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        bool(x.strip()) and not x.lstrip().startswith("#") and i not in skipped for i, x in lines
    )


def test_the_loop_of_the_trainer_is_short():
    """People copy it: what is not part of a step has a file of its own."""
    loop = ("train", "update", "forward", "rollout")
    assert sum(code_lines(ROOT / f"grpo_fast/trainer/{name}.py") for name in loop) <= 1200


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_functions_and_calls_stay_readable(path):
    """Functions have at most 80 lines, docstrings apart, and 10 parameters; kernels may have more."""
    for function in functions(path):
        where = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        first, lines = function.body[0], function.end_lineno - function.lineno + 1
        if ast.get_docstring(function) is not None:
            lines -= first.end_lineno - first.lineno + 1
        assert lines <= MOST_LINES, f"{where} has {lines} lines"
        given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        is_kernel = any("jit" in ast.unparse(x) for x in function.decorator_list)
        if not is_kernel and function.name not in PUBLIC:
            assert len(given) <= MOST_PARAMETERS, f"{where} has {len(given)} parameters"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            count = positional(node)
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert count <= MOST_POSITIONAL, f"{where} passes {count} values by position"


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda p: p.stem)
def test_a_masked_load_says_what_is_elsewhere(path):
    """Anything, if it does not; but the interpreter takes 0, so no other test sees it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            words = {word.arg for word in node.keywords}
            assert "mask" not in words or "other" in words, f"{path.name}:{node.lineno}"


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
