"""The guard bands of `tests/support/guards.py` see what they are there for."""

import os

import pytest
import torch

from tests.support.guards import BAND, OutOfBoundsError, watched

triton = pytest.importorskip("triton", reason="the kernels need Triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="guards the interpreter's buffers"
)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    keep = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + shift, mask=keep, other=0), mask=keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool], ids=str)
def test_a_copy_within_bounds_is_one(dtype):
    x = (torch.arange(10) % 3).to(dtype)
    y = torch.zeros_like(x)
    _copy_kernel[(1,)](x, y, 10, 0, 16)
    torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_read_outside_changes_the_result(shift):
    x, y = torch.ones(10), torch.zeros(10)
    _copy_kernel[(1,)](x, y, 10, shift, 16)
    assert y.isnan().sum() == 1


def test_a_read_in_the_gap_between_rows_changes_the_result():
    x, y = torch.ones(2, 8)[:, :5], torch.zeros(10)
    _copy_kernel[(1,)](x, y, 10, 0, 16)
    assert y.isnan().nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize(("n", "place"), [(11, 10), (16, 10)])
def test_a_write_outside_is_found(n, place):
    x, y = torch.ones(20), torch.zeros(10)
    with pytest.raises(
        OutOfBoundsError, match=f"_copy_kernel wrote .* to element {place} of a buffer of 10"
    ):
        _copy_kernel[(1,)](x, y, n, 0, 16)


def test_a_write_into_another_view_of_the_same_storage_is_found():
    both = torch.zeros(20)
    with pytest.raises(OutOfBoundsError, match="element 5"):
        _copy_kernel[(1,)](torch.ones(20), both[:5], 6, 0, 16)


def test_one_buffer_given_twice_is_one():
    """As logits and their gradient in place."""
    x = torch.arange(10.0)
    _copy_kernel[(1,)](x, x, 9, 1, 16)
    assert x.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]


def test_smaller_elements_over_larger_ones_stay_there():
    """As a gradient in half precision over logits in float32: what is written is read from then on."""
    rows = torch.arange(16.0).view(2, 8)
    x, y = rows[:, :5], rows.view(torch.float16)[:, :5]
    _copy_kernel[(1,)](x, y, 5, 0, 16)
    assert y[0].tolist() == [0, 1, 2, 3, 4]
    assert x[0, 3:].tolist() == [3, 4]
    assert x[1].tolist() == [8, 9, 10, 11, 12]
    with pytest.raises(OutOfBoundsError, match="element 5 of a buffer of 13"):
        _copy_kernel[(1,)](x, y, 11, 0, 16)  # the gap between the rows


@triton.jit
def _drop_kernel(x_ptr, y_ptr, n, shift):
    x = tl.load(x_ptr + shift)
    tl.store(y_ptr, tl.where(n > 0, 1.0, x))


@triton.jit
def _count_kernel(x_ptr, n):
    tl.atomic_add(x_ptr + n, 1)


@pytest.mark.parametrize("shift", [-1, 10, -BAND, BAND + 9])
def test_a_read_whose_value_is_dropped_is_seen_by_its_address(shift):
    x, y = torch.ones(10), torch.zeros(1)
    _drop_kernel[(1,)](x, y, 1, shift)
    assert y.item() == 1
    with (
        watched() as watch,
        pytest.raises(OutOfBoundsError, match=f"_drop_kernel reads element {shift} of a buffer"),
    ):
        _drop_kernel[(1,)](x, y, 1, shift)
    assert watch.kernels == ["_drop_kernel"]


@pytest.mark.parametrize("shift", [0, 9])
def test_what_is_within_is_not_reported(shift):
    x = torch.ones(10)
    counts = torch.zeros(10, dtype=torch.int32)
    with watched():
        _drop_kernel[(1,)](x, torch.zeros(1), 1, shift)
        _copy_kernel[(1,)](torch.ones(10), x, 10, 0, 16)
        _count_kernel[(2,)](counts, shift)
    assert counts[shift] == 2


@pytest.mark.parametrize(
    ("launch", "found"),
    [
        (
            lambda x: _copy_kernel[(1,)](x, x.clone(), 12, 0, 16),
            "reads element 11 of a buffer of 11",
        ),
        (
            lambda x: _copy_kernel[(1,)](torch.ones(12), x, 12, 0, 16),
            "writes element 11 of a buffer",
        ),
        (lambda x: _count_kernel[(1,)](x.int(), 11), "writes element 11 of a buffer of 11"),
        (lambda x: _drop_kernel[(1,)](x, x, 1, 2**40), "reads 1 elements far from every tensor"),
    ],
)
def test_every_kind_of_access_is_looked_at(launch, found):
    with watched(), pytest.raises(OutOfBoundsError, match=found):
        launch(torch.zeros(11))


def test_the_gap_between_rows_belongs_to_nobody():
    rows = torch.ones(2, 8)[:, :5]
    with watched(), pytest.raises(OutOfBoundsError, match="reads element 5 of a buffer of 13"):
        _copy_kernel[(1,)](rows, torch.zeros(16), 6, 0, 16)


def test_every_byte_of_an_access_is_looked_at():
    """Elements of two sizes in one buffer, as of a gradient over logits: of one, half belongs to a tensor."""
    x = torch.zeros(4)
    wide, halves = x[:1], x.view(torch.float16)[:3]
    with watched():
        _copy_kernel[(1,)](wide, halves, 1, 0, 16)
    with watched(), pytest.raises(OutOfBoundsError, match="reads element 1 of a buffer of 2"):
        _copy_kernel[(1,)](wide, halves, 2, 0, 16)
