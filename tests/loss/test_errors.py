"""Bad input: an error that names the argument and the offending value."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from grpo_fast import Objective, notices
from grpo_fast.loss import fold_statistics, grpo_loss, policy_loss
from grpo_fast.ops import backend, group_advantage, logprob
from grpo_fast.ops.backend import Strided, use_triton
from grpo_fast.records import Grouping

LOGITS = torch.zeros(4, 3, 10)
IDS = torch.zeros(4, 3, dtype=torch.int64)
A = torch.zeros(4)
TOKENS = torch.zeros(4, 3)
PACKED = {
    "logits": LOGITS.view(12, 10),
    "completion_ids": IDS.view(12),
    "advantages": TOKENS.view(12),
}
MEAN = Objective(reduction="token_mean")


def nan(x):
    return torch.full_like(x, torch.nan)


LOSS_CASES = {
    "logits not a tensor": ({"logits": [1.0]}, TypeError, "logits: want a tensor"),
    "logits 1-D": ({"logits": torch.zeros(10)}, ValueError, r"logits: want \(B, T, V\).*\(10,\)"),
    "logits float64": ({"logits": LOGITS.double()}, TypeError, "logits: .*float64"),
    "logits of ints": ({"logits": LOGITS.long()}, TypeError, "logits: .*int64"),
    "no vocabulary": ({"logits": LOGITS[..., :0]}, ValueError, "vocabulary is empty"),
    "V not contiguous": (
        {"logits": torch.zeros(4, 10, 3).transpose(1, 2)},
        ValueError,
        "last dimension must be contiguous",
    ),
    "ids of another shape": (
        {"completion_ids": IDS[:, :2]},
        ValueError,
        r"completion_ids: .*\(4, 2\)",
    ),
    "ids not ints": ({"completion_ids": IDS.float()}, TypeError, "completion_ids: .*float32"),
    "id too large": ({"completion_ids": IDS + 10}, ValueError, r"completion_ids: 10 at \(0, 0\)"),
    "id negative": ({"completion_ids": IDS - 100}, ValueError, "completion_ids: -100 at"),
    "mask of another shape": ({"mask": A}, ValueError, r"mask: want \(4, 3\), got \(4,\)"),
    "neither advantages nor rewards": (
        {"advantages": None},
        ValueError,
        "advantages or rewards.*neither",
    ),
    "both": ({"rewards": A, "group_size": 2}, ValueError, "advantages or rewards.*both"),
    "rewards without a size": (
        {"advantages": None, "rewards": A},
        ValueError,
        "group_size: needed",
    ),
    "size does not divide": (
        {"advantages": None, "rewards": A, "group_size": 3},
        ValueError,
        "group_size: .*4 rewards, got 3",
    ),
    "size of zero": (
        {"advantages": None, "rewards": A, "group_size": 0},
        ValueError,
        "group_size: .*got 0",
    ),
    "size not an int": (
        {"advantages": None, "rewards": A, "group_size": 2.0},
        TypeError,
        "group_size: want an int",
    ),
    "size with advantages": ({"group_size": 2}, ValueError, "group_size=2 has no effect"),
    "NaN reward": (
        {"advantages": None, "rewards": nan(A), "group_size": 2},
        ValueError,
        "rewards: nan at 0",
    ),
    "too many rewards": (
        {"advantages": None, "rewards": torch.zeros(8), "group_size": 2},
        ValueError,
        r"rewards: want \(4,\), got \(8,\)",
    ),
    "rewards per token": (
        {"advantages": None, "rewards": TOKENS, "group_size": 2},
        ValueError,
        r"rewards: want \(B,\), got \(4, 3\)",
    ),
    "advantages transposed": (
        {"advantages": torch.zeros(3)},
        ValueError,
        r"advantages: want \(4,\)",
    ),
    "old_logps (B,)": ({"old_logps": A}, ValueError, r"old_logps: want \(4, 3\), got \(4,\)"),
    "ref_logps transposed": ({"ref_logps": TOKENS.T}, ValueError, r"ref_logps: .*got \(3, 4\)"),
    "complex old_logps": ({"old_logps": TOKENS.cfloat()}, TypeError, "old_logps: .*complex64"),
    "beta without ref": (
        {"objective": Objective(beta=0.1)},
        ValueError,
        r"ref_logps: needed.*beta=0.1",
    ),
    "importance (T,)": (
        {"importance_weights": torch.zeros(3)},
        ValueError,
        "importance_weights: want",
    ),
    "importance weights that require grad": (
        {"importance_weights": TOKENS.clone().requires_grad_()},
        ValueError,
        r"importance_weights requires grad.*pass importance_weights.detach\(\)",
    ),
    "token weights that require grad": (
        {"token_weights": TOKENS.clone().requires_grad_()},
        ValueError,
        r"token_weights requires grad.*pass token_weights.detach\(\)",
    ),
    "scores with clip": ({"scores": A}, ValueError, "scores have no effect with surrogate='clip'"),
    "scores (T,)": (
        {"scores": torch.zeros(3), "objective": Objective(surrogate="topr")},
        ValueError,
        "scores: want",
    ),
    "no old log-probs to measure drift from": (
        {"objective": Objective(off_policy_threshold=0.1)},
        ValueError,
        "old_logps: needed, since off_policy_threshold=0.1",
    ),
    "no rollout to correct for": (
        {"objective": Objective(surrogate="rollout_is")},
        ValueError,
        "old_logps: needed, since surrogate='rollout_is'",
    ),
    "no old policy to stay close to": (
        {"objective": Objective(surrogate="dro", quadratic_coef=0.1)},
        ValueError,
        "old_logps: needed, since quadratic_coef=0.1",
    ),
    "token_weights (B,)": ({"token_weights": A}, ValueError, r"token_weights: want \(4, 3\)"),
    "num_items with sequence_mean": ({"num_items": 3}, ValueError, "num_items.*'sequence_mean'"),
    "num_items negative": ({"num_items": -3, "objective": MEAN}, ValueError, "num_items: .*got -3"),
    "num_items NaN": (
        {"num_items": float("nan"), "objective": MEAN},
        ValueError,
        "num_items: .*nan",
    ),
    "num_items a vector": ({"num_items": A, "objective": MEAN}, ValueError, r"num_items: .*\(4,\)"),
    "num_items a string": ({"num_items": "3", "objective": MEAN}, TypeError, "num_items: .*'3'"),
    "temperature 0": ({"temperature": 0}, ValueError, "temperature: .*got 0"),
    "temperature negative": ({"temperature": -1.0}, ValueError, "temperature: .*got -1.0"),
    "temperature NaN": ({"temperature": float("nan")}, ValueError, "temperature: .*nan"),
    "temperature inf": ({"temperature": float("inf")}, ValueError, "temperature: .*inf"),
    "temperature a string": ({"temperature": "1"}, TypeError, "temperature: .*'1'"),
    "every temperature is 0": ({"temperature": TOKENS}, ValueError, "temperature: .*got 0.0"),
    "one temperature is 0": (
        {"temperature": torch.arange(12.0).view(4, 3)},
        ValueError,
        "temperature: .*got 0.0",
    ),
    "temperature (B,)": (
        {"temperature": A + 1},
        ValueError,
        r"temperature: want \(4, 3\), got \(4,\)",
    ),
    "0-dim temperature of 0": (
        {"temperature": torch.tensor(0.0)},
        ValueError,
        "temperature: .*got 0",
    ),
    "cu_seqlens on padded": (
        {"cu_seqlens": torch.tensor([0, 12])},
        ValueError,
        r"cu_seqlens .*\(4, 3\)",
    ),
    "cu_seqlens decreasing": (
        PACKED | {"cu_seqlens": torch.tensor([0, 7, 5, 12])},
        ValueError,
        "cu_seqlens: decreases from 7 to 5",
    ),
    "cu_seqlens too short": (
        PACKED | {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        "cu_seqlens: must go from 0 to N = 12, got 0 to 5",
    ),
    "cu_seqlens without a sequence": (
        PACKED | {"cu_seqlens": torch.tensor([0])},
        ValueError,
        "cu_seqlens: has no sequence for N = 12 tokens",
    ),
    "cu_seqlens from 1": (
        PACKED | {"cu_seqlens": torch.tensor([1, 12])},
        ValueError,
        "got 1 to 12",
    ),
    "cu_seqlens of floats": (
        PACKED | {"cu_seqlens": torch.tensor([0.0, 12])},
        TypeError,
        "cu_seqlens: ",
    ),
    "cu_seqlens 2-D": (
        PACKED | {"cu_seqlens": torch.tensor([[0, 12]])},
        ValueError,
        "cu_seqlens: want",
    ),
    "objective by name": (
        {"objective": "grpo"},
        TypeError,
        "objective: want an Objective.*got 'grpo'",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), LOSS_CASES.values(), ids=LOSS_CASES)
def test_grpo_loss(change, error, message, backend):
    arguments = {"logits": LOGITS, "completion_ids": IDS, "advantages": A} | change
    with pytest.raises(error, match=message) as caught:
        grpo_loss(arguments.pop("logits"), arguments.pop("completion_ids"), **arguments)
    assert str(caught.value).startswith("grpo_loss: ")


POLICY_CASES = {
    "logps of ints": ({"logps": IDS}, TypeError, "logps: .*int64"),
    "logps 3-D": ({"logps": LOGITS}, ValueError, r"logps: .*\(4, 3, 10\)"),
    "bonus without entropy": (
        {"objective": Objective(entropy_coef=0.1)},
        ValueError,
        "entropy: needed",
    ),
    "entropy (B,)": ({"entropy": A}, ValueError, r"entropy: want \(4, 3\), got \(4,\)"),
    "no advantages": ({"advantages": None}, ValueError, "advantages"),
    "old_logps (B,)": ({"old_logps": A}, ValueError, r"old_logps: want \(4, 3\)"),
}


@pytest.mark.parametrize(("change", "error", "message"), POLICY_CASES.values(), ids=POLICY_CASES)
def test_policy_loss(change, error, message, backend):
    arguments = {"logps": TOKENS, "advantages": A} | change
    with pytest.raises(error, match=message):
        policy_loss(arguments.pop("logps"), **arguments)


def test_logprob():
    with pytest.raises(ValueError, match=r"logprob: ids: want \(4, 3\)"):
        logprob(LOGITS, IDS[:2])
    with pytest.raises(ValueError, match="logprob: ids: 99 at"):
        logprob(LOGITS, IDS + 99)
    with pytest.raises(ValueError, match="logprob: temperature"):
        logprob(LOGITS, IDS, temperature=-1)


GROUP_CASES = {
    "neither": ({}, ValueError, "either group_size or group_ids"),
    "both": (
        {"group_size": 2, "group_ids": IDS[:, 0]},
        ValueError,
        "either group_size or group_ids",
    ),
    "not dividing": ({"group_size": 3}, ValueError, "group_size: .*got 3"),
    "unknown scale": ({"group_size": 2, "scale": "std"}, ValueError, "scale='std' is unknown"),
    "negative eps": ({"group_size": 2, "eps": -1.0}, ValueError, "eps: .*-1.0"),
    "labels of another shape": ({"group_ids": IDS[:2, 0]}, ValueError, r"group_ids: want \(4,\)"),
    "labels of floats": ({"group_ids": A}, TypeError, "group_ids: .*float32"),
    "unknown baseline": ({"group_size": 2, "baseline": "rloo"}, ValueError, "baseline='rloo' is"),
    "unknown aggregation": ({"group_size": 2, "aggregation": "gdpo"}, ValueError, "aggregation='g"),
    "unknown nan": ({"group_size": 2, "nan": "omit"}, ValueError, "nan='omit'.*error, skip"),
    "unknown singleton": ({"group_size": 2, "singleton": 1}, ValueError, "singleton=1 is unknown"),
    "weights of one reward": ({"group_size": 2, "weights": A}, ValueError, "weights: has no eff"),
    "aggregation of one reward": (
        {"group_size": 2, "aggregation": "normalize_then_sum"},
        ValueError,
        "aggregation='normalize_then_sum' has no effect",
    ),
    "raw over the batch": (
        {"group_size": 2, "singleton": "raw", "scale": "batch"},
        ValueError,
        "singleton='raw' goes with .*'batch'",
    ),
}

SEVERAL_CASES = {
    "3-D": ({"rewards": LOGITS}, ValueError, r"rewards: want \(B,\) or \(B, K\), got \(4, 3, 10\)"),
    "no column": ({"rewards": TOKENS[:, :0]}, ValueError, r"rewards: want .*\(4, 0\)"),
    "NaN": ({"rewards": nan(TOKENS)}, ValueError, r"rewards: nan at \(0, 0\).*nan='skip'"),
    "inf, though NaN is skipped": (
        {"rewards": TOKENS + torch.inf, "nan": "skip"},
        ValueError,
        r"rewards: inf at \(0, 0\)",
    ),
    "too many weights": ({"weights": A}, ValueError, r"weights: want \(3,\).*got \(4,\)"),
    "weights in a list": ({"weights": [1.0, 1.0, 1.0]}, TypeError, "weights: want a tensor"),
    "infinite weight": ({"weights": A[:3] + torch.inf}, ValueError, "weights: want finite"),
    "batch std with GDPO": (
        {"aggregation": "normalize_then_sum", "scale": "batch"},
        ValueError,
        "scale='batch' has no effect",
    ),
    "RLOO with GDPO": (
        {"aggregation": "normalize_then_sum", "baseline": "leave_one_out"},
        ValueError,
        "baseline='leave_one_out' has no effect",
    ),
    "labels of tokens": (
        {"group_size": None, "group_ids": IDS},
        ValueError,
        r"group_ids: want \(4,\), got \(4, 3\)",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), SEVERAL_CASES.values(), ids=SEVERAL_CASES)
def test_group_advantage_of_several_rewards(change, error, message):
    arguments = {"rewards": TOKENS, "group_size": 2} | change
    with pytest.raises(error, match=message):
        group_advantage(arguments.pop("rewards"), **arguments)


@pytest.mark.parametrize(("change", "error", "message"), GROUP_CASES.values(), ids=GROUP_CASES)
def test_group_advantage(change, error, message):
    with pytest.raises(error, match=message):
        group_advantage(A, **change)
    with pytest.raises(ValueError, match=r"rewards: inf at 1, want finite rewards$"):
        group_advantage(torch.tensor([0.0, torch.inf]), group_size=2)
    with pytest.raises(
        ValueError, match=r"rewards: nan at 1, .*nan='skip' leaves missing ones out"
    ):
        group_advantage(torch.tensor([0.0, torch.nan]), group_size=2)


def test_backend_switch(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="GRPO_FAST_BACKEND='cuda'"):
        logprob(LOGITS, IDS)
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        logprob(LOGITS, IDS)
    why = "Triton is not installed"
    monkeypatch.setattr("grpo_fast.ops.backend.why_no_triton", lambda: why)
    with pytest.raises(RuntimeError, match=f"GRPO_FAST_BACKEND=triton, but {why}"):
        logprob(LOGITS, IDS)


def test_which_backend_runs(monkeypatch):
    """The switch itself is asked: both implementations return the same numbers."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("grpo_fast.ops.backend.why_no_triton", lambda: "")
    for forced, runs in (("triton", True), ("torch", False), ("", False)):
        monkeypatch.setenv("GRPO_FAST_BACKEND", forced)
        assert use_triton(LOGITS) is runs
    monkeypatch.delenv("GRPO_FAST_BACKEND")
    assert use_triton(LOGITS) is False


def test_a_gpu_without_triton_is_told(monkeypatch):
    """Once, where the user's own tensors are on a GPU."""
    monkeypatch.delenv("GRPO_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backend, "why_no_triton", lambda: "Triton is not installed")
    notices.forget()
    on_a_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.warns(UserWarning, match="PyTorch's operators run .*: Triton is not installed"):
        assert use_triton(on_a_gpu) is False
    assert use_triton(on_a_gpu) is False  # and no second warning, which would be an error here
    notices.forget()


def test_versions_that_are_too_old_are_named(monkeypatch):
    triton = SimpleNamespace(__version__="3.3.1", __spec__=object())
    monkeypatch.setitem(sys.modules, "triton", triton)
    backend.why_no_triton.cache_clear()
    assert backend.why_no_triton() == "Triton 3.3.1 is installed, and the kernels need 3.4"
    backend.why_no_triton.cache_clear()
    code = "import torch; torch.__version__ = '2.7.1+cpu'; import grpo_fast.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        "ImportError: grpo_fast needs torch >= 2.8, and torch 2.7.1+cpu is installed" in done.stderr
    )


def test_launchers_get_vectors_without_gaps(monkeypatch):
    """Matrices keep their strides, and so do vectors whose launcher asks for that."""
    monkeypatch.setattr(backend, "use_triton", lambda x: True)
    launcher = SimpleNamespace(launch=lambda *args, **kwargs: (args, kwargs))
    monkeypatch.setattr(backend, "_module", lambda path: launcher)
    sliced, expanded = torch.arange(8.0)[::2], torch.ones(()).expand(4)
    matrix = torch.arange(12.0).view(3, 4).T
    record = Grouping(3, sliced)
    found, named = backend.run(
        "stem.launch",
        LOGITS,
        *(sliced, expanded, Strided(sliced), matrix, None, record),
        vector=sliced,
        matrix=matrix,
    )
    for x in (found[0], found[1], found[5].labels, named["vector"]):
        assert x.stride() == (1,)
    for x in (found[0], found[5].labels, named["vector"]):
        assert x.equal(sliced)
    assert found[1].equal(expanded)
    assert found[2] is sliced
    assert found[3] is named["matrix"] is matrix
    assert found[4] is None
    assert found[5].group_size == 3


def test_the_pytorch_path_launches_no_kernel(monkeypatch):
    """Not one module of kernels is asked for, and those of PyTorch are."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    asked, load = [], backend._module
    monkeypatch.setattr(backend, "_module", lambda path: asked.append(path) or load(path))
    rewards = torch.tensor([0.0, 1.0, 3.0, 2.0])
    for objective in (Objective(), Objective(ratio="sequence")):
        out = grpo_loss(
            LOGITS.clone().requires_grad_(), IDS, rewards=rewards, group_size=2, objective=objective
        )
        (2 * out.loss).backward()
    logps = logprob(LOGITS.clone().requires_grad_(), IDS)
    policy_loss(logps, advantages=rewards, old_logps=logps.detach()).loss.backward()
    assert group_advantage(rewards, group_size=2).isfinite().all()
    stems = [
        "grpo",
        "logprob",
        "policy_loss",
        "sequence_loss",
        "group_advantage",
        "reduction_weights",
        "scaling",
    ]
    assert {x for x in asked if "kernels" in x} >= {f"..torch_kernels.{x}" for x in stems}
    assert not [x for x in asked if ".kernels" in x]


def test_statistics_of_another_length():
    with pytest.raises(ValueError, match=re.escape("want (n, 16), got (3, 4)")):
        fold_statistics(torch.zeros(3, 4))
