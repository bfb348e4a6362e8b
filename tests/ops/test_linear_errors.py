"""The arguments that `linear_grpo_loss` and `linear_logprob` refuse; the message names the argument."""

import pytest
import torch

from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob

B, T, D, V = 2, 3, 4, 10


def arguments(device="cpu"):
    return {
        "hidden": torch.randn(B, T, D, device=device),
        "weight": torch.randn(V, D, device=device),
        "ids": torch.zeros(B, T, dtype=torch.int64, device=device),
    }


HEAD_CASES = {
    "hidden, no tensor": ({"hidden": 3}, TypeError, "hidden: want a tensor"),
    "hidden, dtype": ({"hidden": torch.zeros(B, T, D).long()}, TypeError, "hidden: want .*int64"),
    "hidden, rank": ({"hidden": torch.zeros(D)}, ValueError, r"hidden: .*\(4,\)"),
    "ids, shape": ({"ids": torch.zeros(B, 5).long()}, ValueError, r"ids: .*\(2, 5\)"),
    "ids, range": ({"ids": torch.full((B, T), V)}, ValueError, r"ids: 10 at \(0, 0\)"),
    "ids, beyond vocab_size": (
        {"ids": torch.full((B, T), 8), "vocab_size": 8},
        ValueError,
        r"ids: 8 at .*\[0, 8\)",
    ),
    "weight, shape": ({"weight": torch.zeros(V, 5)}, ValueError, r"weight: .*\(10, 5\)"),
    "weight, int8": (
        {"weight": torch.zeros(V, D).char()},
        TypeError,
        "weight: .*int8; .*dequantised",
    ),
    "weight, float8": (
        {"weight": torch.zeros(V, D).to(torch.float8_e4m3fn)},
        TypeError,
        "weight: .*float8_e4m3fn; .*dequantised",
    ),
    "weight, transposed": ({"weight": torch.zeros(D, V)}, ValueError, r"weight: .*\(4, 10\)"),
    "bias": ({"bias": torch.zeros(V + 1)}, ValueError, r"bias: want \(10,\), got \(11,\)"),
    "bias, dtype": ({"bias": torch.zeros(V).int()}, TypeError, "bias: want .*int32"),
    "lora B, dtype": (
        {"lora": (torch.zeros(2, D), torch.zeros(V, 2).byte(), 1.0)},
        TypeError,
        "lora B: want .*uint8",
    ),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: .*-1.0"),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap: want positive"),
    "logit_scale": ({"logit_scale": float("inf")}, ValueError, "logit_scale: .*inf"),
    "logit_scale, type": ({"logit_scale": "1"}, TypeError, "logit_scale: want a number"),
    "logits_dtype": ({"logits_dtype": "fp8"}, ValueError, "logits_dtype='fp8'"),
    "vocab_size": ({"vocab_size": V + 1}, ValueError, "vocab_size=11 is more than the 10 rows"),
    "vocab_size of 0": ({"vocab_size": 0}, ValueError, "vocab_size: want a positive int"),
    "chunk_size": ({"chunk_size": -2}, ValueError, "chunk_size: .*-2"),
    "chunk_size, longest": ({"chunk_size": 2**20 + 1}, ValueError, "chunk_size: .*1048577"),
    "chunk_size, type": ({"chunk_size": 2.0}, TypeError, "chunk_size: want an int"),
    "lora, entries": ({"lora": (1, 2)}, ValueError, "lora: want"),
    "lora, A": (
        {"lora": (torch.zeros(2, 5), torch.zeros(V, 2), 1.0)},
        ValueError,
        r"lora A: want \(r, 4\)",
    ),
    "lora, B": (
        {"lora": (torch.zeros(2, D), torch.zeros(V, 3), 1.0)},
        ValueError,
        r"lora B: want \(10, 2\)",
    ),
    "mask": ({"mask": torch.ones(B)}, ValueError, r"mask: want \(2, 3\)"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: .*0.0"),
}


@pytest.mark.parametrize(("change", "error", "message"), HEAD_CASES.values(), ids=HEAD_CASES)
def test_head(change, error, message):
    given = arguments() | change
    leading = [given.pop(name) for name in ("hidden", "weight", "ids")]
    with pytest.raises(error, match=f"linear_logprob: .*{message}"):
        linear_logprob(*leading, **given)
    with pytest.raises(error, match=f"linear_grpo_loss: .*{message}"):
        linear_grpo_loss(*leading, advantages=torch.ones(B), **given)


LOSS_CASES = {
    "no advantages": ({"advantages": None}, ValueError, "either advantages or rewards"),
    "dw_out, dtype": ({"dw_out": torch.zeros(V, D).half()}, ValueError, "dw_out: .*float16"),
    "dw_out, shape": ({"dw_out": torch.zeros(D, V)}, ValueError, r"dw_out: .*\(4, 10\)"),
    "dw_out in float64": (
        {"dw_out": torch.zeros(V, D), "bias": torch.zeros(V).double()},
        ValueError,
        "dw_out is float32, and not available with float64",
    ),
    "dw_out of a frozen head": ({"dw_out": torch.zeros(V, D)}, ValueError, "weight does not"),
}


@pytest.mark.parametrize(("change", "error", "message"), LOSS_CASES.values(), ids=LOSS_CASES)
def test_loss(change, error, message):
    given = arguments()
    given = [*given.values()], {"advantages": torch.ones(B)} | change
    with pytest.raises(error, match=f"linear_grpo_loss: .*{message}"):
        linear_grpo_loss(*given[0], **given[1])


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_forward_mode_is_refused(name):
    """Not answered with 0, which is what a custom operator does by itself."""
    given = arguments()

    def computed(loss, x):
        leading = (given | {name: x}).values()
        return (
            linear_grpo_loss(*leading, advantages=torch.ones(B)).loss
            if loss
            else linear_logprob(*leading)
        )

    for loss in (True, False):
        with pytest.raises(NotImplementedError, match=f"linear_.*: {name} carries a tangent"):
            torch.func.jvp(lambda x, loss=loss: computed(loss, x), (given[name],), (given[name],))
