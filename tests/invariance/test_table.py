"""The table of docs/invariance.md: what may change without a change of the bits, or of more than rounding.

Each row of the table names its tests, and each test here is in a row.
"""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch

from grpo_fast.torch_kernels import compiled
from tests.support import invariance
from tests.support.cases import in_other_company
from tests.support.invariance import Found, computed

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "invariance.md"
BY_SEQUENCE = {name for name in invariance.FUNCTIONS if name.endswith("by sequence")}
HEAD = [name for name in invariance.FUNCTIONS if name.startswith("linear")]


RUN = {
    "triton": [name for name in invariance.FUNCTIONS if name not in BY_SEQUENCE],
    "compiled": ["logprob", "grpo_loss"],
}


def cases(*names):
    """Every path with these functions, except those that take long to interpret or to compile."""
    found = [
        pytest.param(path, name, id=f"{path}-{name}")
        for path in invariance.PATHS
        for name in names
        if path == "torch" or name in RUN.get(path, ())
    ]
    return pytest.mark.parametrize("path, name", found, indirect=["path"])


SAME_BITS = {"rtol": 0, "atol": 0}
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
CHUNK = {"chunk_size": 4}


@pytest.fixture
def path(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="the kernels need Triton")
    if request.param == "compiled" and (DEVICE != "cpu" or compiled.why_not()):
        pytest.skip("nothing is compiled here")
    for name, value in invariance.PATHS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


by_function = cases(*invariance.FUNCTIONS)
by_token = cases(*(name for name in invariance.FUNCTIONS if name != "group_advantage"))
by_head = cases(*HEAD)


def options_of(name):
    """The head in chunks of one length, whatever the batch: without it see `test_chunk_length`."""
    return CHUNK if name.startswith("linear") else {}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def batch(vocabulary=invariance.V):
    return invariance.batch(vocabulary, DEVICE)


@functools.cache
def whole(path, name):
    """The results for the batch, computed once for all tests."""
    return computed(name, batch(), **options_of(name))


def same(got: Found, want: Found, **tolerance):
    """The rows are the same bits, or within a tolerance; the sums are within rounding, if they are there."""
    for name, x in want.rows.items():
        torch.testing.assert_close(got.rows[name], x, **(tolerance or SAME_BITS), msg=name)
    for name, x in want.sums.items():
        scale = x.abs().max().item()
        torch.testing.assert_close(got.sums[name], x, rtol=0, atol=2e-6 * scale, msg=name)


def rows(found: Found) -> Found:
    return Found(found.rows, {})


@by_function
def test_run_to_run(path, name):
    want, got = whole(path, name), computed(name, batch(), **options_of(name))
    for a, b in ((got.rows, want.rows), (got.sums, want.sums)):
        for key, x in b.items():
            torch.testing.assert_close(a[key], x, **SAME_BITS, msg=key)


@by_function
def test_other_company(path, name):
    """The last sequence alone; of rewards its group, which stays together."""
    which = slice(2 if name == "group_advantage" else 3, 4)
    got = computed(name, batch().sequences(which), **options_of(name))
    same(got, rows(whole(path, name).sequences(which)), **in_other_company(path, DEVICE))


@by_token
def test_without_padding(path, name):
    """A sequence of two of three columns, alone and without the third one."""
    alone = batch().sequences(slice(1, 2)).of(lambda x: x[:, :2] if x.ndim > 1 else x)
    want = whole(path, name).sequences(slice(1, 2))
    want = Found({key: x[:, :2] for key, x in want.rows.items()}, {})
    got = computed(name, alone, **options_of(name))
    same(got, want, **in_other_company(path, DEVICE))


@by_function
def test_order_of_the_sequences(path, name):
    order = torch.tensor([2, 3, 0, 1])  # groups stay together
    got = computed(name, batch().sequences(order), **options_of(name))
    same(got, whole(path, name).sequences(order), **in_other_company(path, DEVICE))


@by_token
def test_padded_is_packed(path, name):
    got = computed(name, batch().packed(), **options_of(name))
    want = whole(path, name)
    mask = batch()["mask"]
    want = Found({key: x[mask] for key, x in want.rows.items()}, want.sums)
    same(got, want, **in_other_company(path, DEVICE))


@by_token
def test_micro_batches(path, name):
    """The losses, and the gradients of the weight, of two halves add up to those of the whole."""
    halves = [
        computed(name, batch().sequences(half), **options_of(name))
        for half in (slice(0, 2), slice(2, 4))
    ]
    want = whole(path, name)
    got = {key: torch.cat([x.rows[key] for x in halves]) for key in want.rows}
    got = Found(got, {key: sum(x.sums[key] for x in halves) for key in want.sums})
    same(got, want, **in_other_company(path, DEVICE))


@cases("logprob", "grpo_loss")
def test_any_vocabulary(path, name):
    """Rows that start at odd addresses: in the kernels a row's last bit depends on its place."""
    odd = batch(invariance.V - 3)
    order = torch.tensor([3, 1, 2, 0])
    got = computed(name, odd.sequences(order))
    want = computed(name, odd).sequences(order)
    same(got, want, **(SAME_BITS if path == "torch" else ROUNDING))


@by_head
@pytest.mark.parametrize("size", [7, None])
def test_chunk_length(size, path, name):
    got = computed(name, batch(), chunk_size=size)
    same(got, whole(path, name), **ROUNDING)


@by_head
def test_tokens_that_are_left_out(path, name):
    got = computed(name, batch(), compact=False, **CHUNK)
    same(got, whole(path, name), **in_other_company(path, DEVICE))


@pytest.mark.parametrize("name", ["logprob"])
@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_one_long_row(path, name):
    """PyTorch divides the sum of a single long row between threads, but not that of one among several."""
    before = torch.get_num_threads()
    among = invariance.batch(40_960).sequences(slice(2, 4))
    tokens = [slice(t, t + 1) for t in range(invariance.T)]  # of the first of the two
    first = among.sequences(slice(0, 1))
    rows_alone = [first.of(lambda x, t=t: x[:, t] if x.ndim > 1 else x) for t in tokens]
    try:
        want, *found = (with_threads(2, name, given) for given in (among, *rows_alone))
    finally:
        torch.set_num_threads(before)
    for t, got in zip(tokens, found, strict=True):
        same(got, Found({key: x[:1, t] for key, x in want.rows.items()}, {}))


@pytest.mark.parametrize("name", invariance.FUNCTIONS)
@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_threads(path, name):
    """Tensors that PyTorch divides between threads: more than 32,768 entries."""
    before = torch.get_num_threads()
    given = batch_of_threads()
    try:
        one, two = (with_threads(n, name, given) for n in (1, 2))
    finally:
        torch.set_num_threads(before)
    same(two, one)


@functools.cache
def batch_of_threads():
    return invariance.batch(4096)


def with_threads(number, name, given):
    torch.set_num_threads(number)
    return computed(name, given, **options_of(name))


@pytest.mark.parametrize("name", [x for x in invariance.FUNCTIONS if x not in BY_SEQUENCE])
@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_kernels_and_pytorch(path, name, monkeypatch):
    """What the interpreter or a GPU computes, and PyTorch's operators."""
    kernels = whole(path, name)
    for key, value in invariance.PATHS["torch"].items():
        monkeypatch.setenv(key, value)
    same(whole("torch", name), kernels, **ROUNDING)


def named():
    """The tests that the page names: (file, function)."""
    return re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE.read_text())


def functions_of(file):
    tree = ast.parse((ROOT / file).read_text())
    return {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}


def test_every_row_names_a_test_that_exists():
    table = re.search(r"^\| what changes .*?\n\n", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    lines = table.strip().splitlines()[2:]
    assert len(lines) > 10
    for line in lines:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", line), line
    for file, function in named():
        assert function in functions_of(file), f"{file} has no {function}"


def test_every_test_has_a_row():
    here = "tests/invariance/test_table.py"
    mine = {x for x in functions_of(here) if x.startswith("test_")}
    listed = {function for file, function in named() if file == here}
    own = {x for x in mine if x.startswith("test_every_")}
    assert mine - own == listed
