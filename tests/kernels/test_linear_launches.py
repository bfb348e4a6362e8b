"""How much work `linear_grpo_loss` hands to a GPU: operators that compute or fill, and kernels, per chunk."""

import collections
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="the kernels need Triton")

from triton.runtime.interpreter import GridExecutor

from grpo_fast import Objective
from grpo_fast.loss import linear_grpo_loss
from tests.support.mixed import mixed_products

linear_grpo = importlib.import_module("grpo_fast.ops.linear_grpo")
C, D, V = 4, 8, 40_000  # rows of a chunk; a row of logits is shared by programs
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided")


class Counted(TorchDispatchMode):
    """Counts by name; what is on the host, and what is empty, launches nothing."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) == "grpo_fast.linear_grpo.default":
            with self:
                return linear_grpo.linear_grpo.by_fields(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        # float64: numbers, which stay on the host.
        works = any(x.numel() and x.dtype != torch.float64 for x in made)
        name = func._schema.name.removeprefix("aten::")
        if works and not func.is_view and name not in EMPTY and "::" not in name:
            self.found[name] += 1
        return out


@pytest.fixture
def count(monkeypatch):
    """What a call launches; the kernels do not run, but for one whose results are indices."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    run = GridExecutor.__call__

    def counted(tokens, masked=0, frozen=False, hidden=True, length=3, **given):
        counts, products = Counted(), []

        def launch(self, *args, **kwargs):
            counts.found[self.fn.__name__] += 1
            if self.fn.__name__ == "_reduction_weights_kernel":
                with _disable_current_modes():
                    run(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", launch)
        N = tokens + masked
        states = torch.zeros(N, D, dtype=torch.bfloat16, requires_grad=hidden)
        weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=not frozen)
        given = {
            "mask": (torch.arange(N) >= masked) if masked else None,
            "old_logps": torch.zeros(N),
            "cu_seqlens": torch.tensor([0, *range(masked + length, N, length), N]),
        } | given
        given["advantages"] = torch.ones(len(given["cu_seqlens"]) - 1)
        with mixed_products(products), counts:
            linear_grpo_loss(
                *(states, weight, torch.zeros(N, dtype=torch.int64)), chunk_size=C, **given
            )
        counts.found["product"] = len(products)
        return counts.found

    return counted


def per_chunk(count, **given):
    found = count(3 * C, **given)
    found.subtract(count(2 * C, **given))
    return {name: n for name, n in found.items() if n}


by_logits = pytest.mark.parametrize("logits_dtype", ["fp32", "bf16"])
# With what is masked left out, with masked rows in the chunks, with nothing masked.
by_masks = pytest.mark.parametrize(
    ("masked", "compact"), [(2, True), (2, False), (0, True)], ids=["left out", "inside", "none"]
)
SEQUENCES = Objective(ratio="sequence")
AT_ONCE = {
    "token": {},
    "known": {"objective": SEQUENCES, "old_logps": None},
    "entropy": {"objective": Objective(entropy_coef=0.1)},
}


@by_logits
@by_masks
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", AT_ONCE)
def test_a_chunk_takes_five(way, frozen, masked, compact, logits_dtype, count):
    """Products for logits, dhidden and dweight, the kernel on the logits, and one that moves rows."""
    given = {"masked": masked, "compact": compact, "frozen": frozen, "logits_dtype": logits_dtype}
    found = per_chunk(count, **given, **AT_ONCE[way])
    products = {"product": 2 if frozen else 3}
    assert found == {"_grpo_kernel": 1, "_move_rows_kernel": 1} | products


def test_without_a_gradient_of_the_hidden_states_nothing_is_moved(count):
    assert per_chunk(count, hidden=False) == {"_grpo_kernel": 1, "product": 2}


@by_logits
@by_masks
def test_log_probs_before_the_gradient(masked, compact, logits_dtype, count):
    """Where all log-probs come first: the logits twice, a kernel for each time."""
    given = {"masked": masked, "compact": compact, "logits_dtype": logits_dtype}
    found = per_chunk(count, objective=Objective(top_entropy_quantile=0.5), **given)
    moves = found.pop("_move_rows_kernel")
    assert moves == (2 if masked else 1)
    assert found == {"_logprob_fwd_kernel": 1, "_logprob_bwd_kernel": 1, "product": 4}
    late = per_chunk(count, objective=SEQUENCES, frozen=True, **given)
    assert late == {"_grpo_kernel": 1, "_move_rows_kernel": 1, "product": 2}


@by_logits
def test_whole_sequences_in_a_chunk(logits_dtype, count):
    """The loss of its sequences comes between the two kernels."""
    found = per_chunk(count, objective=SEQUENCES, length=C, logits_dtype=logits_dtype)
    assert found.pop("_sequence_loss_kernel") == 1
    assert found.pop("sub", 0) <= 1  # boundaries, counted from the first token of the chunk
    kernels = {"_logprob_fwd_kernel": 1, "_logprob_bwd_kernel": 1, "_move_rows_kernel": 1}
    assert found == kernels | {"product": 3}


def test_results_of_chunks_are_not_put_together(count):
    """Beside the chunks: one sum, one set of counters; nothing is concatenated."""
    found = count(2 * C)
    assert found["cat"] == 0
    assert found["new_zeros"] == 1
