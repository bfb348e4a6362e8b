"""Every fallback: its message, the error that GRPO_FAST_STRICT=1 makes of it, and its row in the page."""

import ast
import importlib
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import Unsupported

from grpo_fast import grpo_loss, linear_logprob, notices
from grpo_fast.notices import FALLBACKS, FallbackError, fell_back
from grpo_fast.ops import backend
from grpo_fast.ops.head import arguments, chunk_length, chunked, products

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "doctor.md").read_text()
# Provoked where their hosts are: in these files.
ELSEWHERE = {
    "trl_loss": "integrations/test_trl_loss.py",
    "host_log_probs": "integrations/test_slime.py",
    "verl": "integrations/test_verl.py",
    "uncompiled": "ops/test_compiled_rows.py",
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    notices.forget()
    yield
    notices.forget()


def gpu_without_triton(monkeypatch):
    monkeypatch.delenv("GRPO_FAST_BACKEND")
    monkeypatch.setattr(backend, "why_no_triton", lambda: "Triton is not installed")
    assert not backend.use_triton(SimpleNamespace(device=torch.device("cuda", 0)))


def loss(**options):
    logits = torch.randn(1, 2, 8, requires_grad=True) * 1
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return grpo_loss(logits, ids, advantages=torch.ones(1), **options).loss


def on_chip(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_ON_CHIP", "1")
    loss()


def head(dtype):
    hidden, weight = torch.randn(3, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype)
    return linear_logprob(hidden, weight, torch.tensor([0, 1, 2]))


def float64(monkeypatch):
    monkeypatch.setattr(arguments, "on_gpu", lambda x: True)
    assert head(torch.float64).dtype == torch.float64


def float32_copies(monkeypatch):
    """As on AMD's GPUs, before PyTorch 2.10."""
    for module in (chunked, products):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    monkeypatch.setattr(products, "MIXED_MM", False)
    monkeypatch.setattr(chunk_length, "processors", lambda x: 4)
    head(torch.bfloat16)


def slabs(monkeypatch):
    monkeypatch.setattr(products, "has_mixed_products", lambda x: True)
    monkeypatch.setattr(products, "MIXED_ADDMM", False)
    done = []
    monkeypatch.setattr(products, "_accumulate_in_slabs", lambda *x: done.append(x))
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    products.accumulate(torch.zeros(2, 2), half, half)
    assert done


def inplace(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert loss(inplace=True).isfinite()


def compiled_in_place(monkeypatch):
    from grpo_fast.integrations.transformers import compiler_of

    model = tiny_model()
    model.compile(backend="eager")
    assert compiler_of(model) is None


def tiny_model():
    pytest.importorskip("transformers", reason="the model is Hugging Face's")
    from grpo_fast.doctor.paths import tiny_model

    return tiny_model(torch.device("cpu"))


def unshared(monkeypatch):
    """Dropout would be the same for all completions of a prompt."""
    model = tiny_model()
    from grpo_fast import shared_prompt

    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    prompts = torch.full((1, 30), 5)
    plan = shared_prompt.plan(prompts, torch.full((4, 3), 6), group_size=4)
    shared_prompt.forward(model.train(), plan)


def trl_head(monkeypatch):
    pytest.importorskip("transformers", reason="the head's class is in the adapter of transformers")
    from grpo_fast.integrations.trl.head import FusedLogProb

    theirs = ModuleType("trl.kernels")
    theirs.ChunkedLogProbFunction = SimpleNamespace(apply=lambda *_: "theirs")
    monkeypatch.setitem(sys.modules, "trl.kernels", theirs)
    weight = torch.randn(9, 4)
    weight.ds_id = 0
    ids = torch.tensor([1, 2, 3])
    assert FusedLogProb.apply(torch.randn(3, 4), weight, None, ids, 1.0, 9) == "theirs"


def from_logits(monkeypatch):
    forward = importlib.import_module("grpo_fast.trainer.forward")

    def refuse(model):
        raise ValueError("layers between")

    monkeypatch.setattr(forward, "check_head", refuse)
    policy, config = SimpleNamespace(model=None), SimpleNamespace(share_prompts="auto")
    assert forward.Forward(policy, config, None).from_logits


def lock(monkeypatch):
    pytest.importorskip("filelock")
    runs = importlib.import_module("grpo_fast.trainer.runs")

    class NoLock:
        def __init__(self, *args, **options):
            pass

        def acquire(self, timeout):
            raise NotImplementedError

        def release(self):
            pass

    monkeypatch.setattr(runs, "FileLock", NoLock)
    monkeypatch.setattr(runs.files, "write", lambda *_: None)
    with runs.hold(Path("nowhere")):
        pass


PROVOKED = {
    "triton": gpu_without_triton,
    "on_chip": on_chip,
    "float64": float64,
    "float32_copies": float32_copies,
    "slabs": slabs,
    "inplace": inplace,
    "compiled_in_place": compiled_in_place,
    "unshared": unshared,
    "trl_head": trl_head,
    "from_logits": from_logits,
    "lock": lock,
}
QUIET = {"float64", "slabs", "inplace", "host_log_probs"}  # the documents say what runs
LOGGED, PRINTED = {"unshared"}, {"from_logits", "lock"}


@pytest.mark.parametrize("name", PROVOKED)
def test_a_fallback_says_so(name, monkeypatch, capsys, caplog):
    monkeypatch.delenv("GRPO_FAST_STRICT", raising=False)
    if name == "unshared":
        passes = importlib.import_module("grpo_fast.shared_prompt.passes")
        monkeypatch.setattr(passes, "_SAID", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PROVOKED[name](monkeypatch)
    if name in QUIET:
        assert not said
    elif name in PRINTED:
        assert FALLBACKS[name].what in capsys.readouterr().out
    elif name in LOGGED:
        assert "shared prompts: unshared: attention_dropout 0.1" in caplog.text
        assert caplog.records[-1].levelname == "WARNING"
    else:
        (warning,) = said
        assert str(warning.message).startswith(f"grpo_fast: {FALLBACKS[name].what}: ")


@pytest.mark.parametrize("name", PROVOKED)
def test_strict_makes_it_an_error(name, monkeypatch):
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    what, cure = (re.escape(x) for x in FALLBACKS[name])
    with pytest.raises(FallbackError, match=f"GRPO_FAST_STRICT=1: {what}: .*{cure}"):
        PROVOKED[name](monkeypatch)


def test_strict_under_torch_compile(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    torch.compiler.reset()
    logits, ids = torch.randn(1, 2, 8, requires_grad=True), torch.zeros(1, 2, dtype=torch.int64)

    def step(logits):
        return grpo_loss(logits * 1, ids, advantages=torch.ones(1), inplace=True).loss

    with pytest.raises(Unsupported, match=r"FallbackError.*inplace=True\) has no effect"):
        torch.compile(step, fullgraph=True, backend="eager")(logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_strict_under_torch_compile_without_fullgraph(monkeypatch):
    """The caller runs uncompiled, and raises as well."""
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="eager")
    for _ in range(2):  # what the compiler keeps raises again
        with pytest.raises(FallbackError, match=r"^GRPO_FAST_STRICT=1: .*inplace=True\) has no"):
            compiled(inplace=True)


def test_what_is_asked_for_is_no_fallback(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    assert loss().isfinite()  # CPU tensors, on the PyTorch path
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    assert not backend.use_triton(gpu)  # GRPO_FAST_BACKEND=torch
    monkeypatch.delenv("GRPO_FAST_BACKEND")
    assert not backend.use_triton(SimpleNamespace(device=torch.device("mps")))
    assert head(torch.float64).dtype == torch.float64  # on a CPU


def test_one_completion_a_prompt_has_nothing_to_share(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    model = tiny_model()
    from grpo_fast import shared_prompt

    model.model.layers[0].self_attn.attention_dropout = 0.1
    plan = shared_prompt.plan(torch.arange(18).view(2, 9), torch.full((2, 3), 6), group_size=1)
    assert shared_prompt.choose(model.train(), plan).route == "unshared"
    shared_prompt.forward(model, plan)


@pytest.mark.parametrize(
    "others, refused",
    [
        # Of another process: its route, whether prompts repeat there, whether that is impossible.
        (("unshared", 0, 0), False),
        (("packed", 0, 0), False),
        (("packed", 1, 0), True),  # no route is exact for both
        (("unshared", 1, 1), True),
    ],
)
def test_processes_that_share_the_weights_refuse_together(others, refused, monkeypatch):
    """This one has a completion for each prompt; dropout forbids all routes."""
    model = tiny_model()
    from grpo_fast import shared_prompt
    from grpo_fast.shared_prompt import passes

    def reduced(found, _):
        theirs = list(passes.ROUTES).index(others[0])
        found[:5] = torch.maximum(found[:5], torch.tensor([theirs, -theirs, 1, *others[1:]]))

    monkeypatch.setattr(passes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(passes.dist, "all_reduce", reduced)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    plan = shared_prompt.plan(torch.arange(18).view(2, 9), torch.full((2, 3), 6))
    own = shared_prompt.choose(model.train(), plan)
    choice, parts = passes._agreed(model, plan, own, 1)
    assert (choice.route, parts) == ("unshared", 1)
    assert isinstance(choice, passes.Impossible) is refused


@pytest.mark.parametrize("value", ["yes", "2", "true"])
def test_other_values_are_refused(value, monkeypatch):
    monkeypatch.setenv("GRPO_FAST_STRICT", value)
    with pytest.raises(ValueError, match=f"GRPO_FAST_STRICT='{value}': want 0 or 1"):
        fell_back("triton", "a test")


def test_a_warning_is_given_once_for_each_reason():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for reason in ("one", "two", "one"):
            fell_back("triton", reason)
    assert [str(x.message).partition(". ")[0].rpartition(": ")[2] for x in said] == ["one", "two"]


def calls():
    """(file, first argument) of every call of `fell_back` in the library."""
    for path in sorted((ROOT / "grpo_fast").rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "fell_back(" in text else ():
            name = node.func if isinstance(node, ast.Call) else None
            if getattr(name, "id", getattr(name, "attr", None)) == "fell_back":
                yield path.relative_to(ROOT / "grpo_fast").as_posix(), node.args[0]


def test_every_fallback_goes_through_one_function_and_is_in_the_page():
    found = {}
    for path, first in calls():
        assert isinstance(first, ast.Constant), f"{path}: want the name of the fallback itself"
        found.setdefault(first.value, set()).add(path)
    assert found.keys() == FALLBACKS.keys()
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.partition("## Fallbacks")[2], re.MULTILINE)
    )
    assert rows.keys() == FALLBACKS.keys()
    for name, row in rows.items():
        assert FALLBACKS[name].what in row.replace("\\|", "|"), name


def test_every_fallback_is_provoked():
    assert PROVOKED.keys() | ELSEWHERE.keys() == FALLBACKS.keys()
    for name, file in ELSEWHERE.items():
        text = (ROOT / "tests" / file).read_text()
        assert "GRPO_FAST_STRICT" in text, name
        assert "FallbackError" in text, name


def test_nobody_warns_otherwise():
    """A warning that is no fallback would go here, with the reason."""
    for path in sorted((ROOT / "grpo_fast").rglob("*.py")):
        if path.name != "notices.py" and "kernels" not in path.parts:
            assert "warnings.warn(" not in path.read_text(), path
