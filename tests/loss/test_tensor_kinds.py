"""Tensors that the operators have no rule for: each argument of each function refuses them by name."""

import inspect
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import grpo_fast.diagnostics
import grpo_fast.loss
import grpo_fast.ops
import grpo_fast.weights
from grpo_fast import Objective
from tests.support.ranks import needs_gloo

B, T, D, V = 2, 3, 4, 10


def tokens():
    return torch.rand(B, T) - 3


PER_TOKEN = ("old_logps", "ref_logps", "importance_weights", "token_weights", "mask")
TOPR = Objective(surrogate="topr", reduction="token_mean", beta=0.1, entropy_coef=0.1)


def of_tokens():
    return {name: tokens().exp() for name in PER_TOKEN} | {
        "advantages": torch.randn(B),
        "scores": torch.randn(B),
        "num_items": torch.tensor(5.0),
        "loss_scale": torch.tensor(0.5),
        "objective": TOPR,
    }


def of_packed_tokens():
    """Return the arguments for packed sequences, with `cu_seqlens`."""
    flat = {name: x.view(-1) for name, x in of_tokens().items() if name in PER_TOKEN}
    return of_tokens() | flat | {"cu_seqlens": torch.tensor([0, 2, B * T])}


def ids():
    return torch.randint(V, (B, T))


def of_head():
    return {
        "hidden": torch.randn(B, T, D),
        "weight": torch.randn(V, D, requires_grad=True),
        "bias": torch.randn(V),
        "lora": (torch.randn(2, D), torch.randn(V, 2), 1.0),
        "temperature": tokens().exp(),
    }


def rewards():
    return {"rewards": torch.rand(B), "advantages": None, "group_size": 2}


PACKED_LOGPS = {"logps": tokens().view(-1), "entropy": tokens().view(-1)}
LOSS = grpo_fast.loss
WEIGHTS = grpo_fast.weights
# (a function, arguments that it takes), together with every tensor argument that it has.
CALLS = {
    "grpo_loss": lambda: (
        LOSS.grpo_loss,
        {"logits": torch.randn(B, T, V), "completion_ids": ids(), "temperature": tokens().exp()}
        | of_tokens(),
    ),
    "grpo_loss with rewards": lambda: (
        LOSS.grpo_loss,
        {"logits": torch.randn(B, T, V), "completion_ids": ids(), "temperature": torch.tensor(0.7)}
        | of_tokens()
        | rewards(),
    ),
    "linear_grpo_loss": lambda: (
        LOSS.linear_grpo_loss,
        of_head() | of_tokens() | {"completion_ids": ids(), "dw_out": torch.zeros(V, D)},
    ),
    "linear_grpo_loss with rewards": lambda: (
        LOSS.linear_grpo_loss,
        of_head() | of_tokens() | rewards() | {"completion_ids": ids()},
    ),
    "grpo_loss packed": lambda: (
        LOSS.grpo_loss,
        of_packed_tokens() | {"logits": torch.randn(B * T, V), "completion_ids": ids().view(-1)},
    ),
    "linear_grpo_loss packed": lambda: (
        LOSS.linear_grpo_loss,
        of_packed_tokens()
        | {"hidden": torch.randn(B * T, D), "weight": torch.randn(V, D)}
        | {"completion_ids": ids().view(-1)},
    ),
    "policy_loss": lambda: (
        LOSS.policy_loss,
        of_tokens() | {"logps": tokens(), "entropy": tokens().exp()},
    ),
    "policy_loss packed": lambda: (LOSS.policy_loss, of_packed_tokens() | PACKED_LOGPS),
    "logprob": lambda: (
        grpo_fast.ops.logprob,
        {"logits": torch.randn(B, T, V), "ids": ids(), "mask": tokens().exp()}
        | {"temperature": tokens().exp()},
    ),
    "linear_logprob": lambda: (
        grpo_fast.ops.linear_logprob,
        of_head() | {"ids": ids(), "mask": tokens().exp()},
    ),
    "group_advantage": lambda: (
        grpo_fast.ops.group_advantage,
        {"rewards": torch.rand(B, 2), "group_ids": torch.zeros(B).long(), "weights": torch.rand(2)},
    ),
    "fold_statistics": lambda: (LOSS.fold_statistics, {"gathered": torch.rand(2, 16)}),
    "metrics_from": lambda: (LOSS.metrics_from, {"statistics": torch.rand(16)}),
    "token_diagnostics": lambda: (
        grpo_fast.diagnostics.token_diagnostics,
        {name: tokens().view(-1) for name in ("logps", "old_logps", "advantages", "ref_logps")}
        | {"mask": torch.ones(B * T), "cu_seqlens": torch.tensor([0, 2, B * T])},
    ),
    "kl_estimate": lambda: (
        grpo_fast.diagnostics.kl_estimate,
        {"logps": tokens(), "ref_logps": tokens()},
    ),
}
NUMBERS = {"cap": 2.0, "low": 0.5, "high": 2.0, "delta": 0.1, "threshold": 0.1, "fraction": 0.5}


def weight_call(name):
    """A function of `grpo_fast.weights` with every tensor argument, packed where it can be."""
    function = getattr(WEIGHTS, name)
    given = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if key == "cu_seqlens":
            given[key] = torch.tensor([0, 2, B * T])
        elif key == "rewards":
            given[key] = torch.rand(B)
        elif key == "group_ids":
            given[key] = torch.zeros(B, dtype=torch.int64)
        elif key in NUMBERS:
            given[key] = NUMBERS[key]
        elif "Tensor" in str(parameter.annotation):
            values = tokens().view(-1)
            given[key] = values.exp() if key == "mask" else values
    return function, given


CALLS |= {
    name: lambda name=name: weight_call(name)
    for name in WEIGHTS.__all__
    if callable(getattr(WEIGHTS, name))
}


def places():
    """(call, argument) for each tensor that is handed over; `lora` holds two."""
    for name, make in CALLS.items():
        for key, x in make()[1].items():
            if isinstance(x, Tensor):
                yield name, key
            elif isinstance(x, tuple):
                yield name, f"{key} A"
                yield name, f"{key} B"


def with_changed(given, key, change):
    if key.startswith("lora "):
        pair = list(given["lora"])
        pair["AB".index(key[-1])] = change(pair["AB".index(key[-1])])
        return given | {"lora": tuple(pair)}
    return given | {key: change(given[key])}


def nested(x):
    rows = [row.detach().reshape(-1) for row in (x if x.ndim else [x])]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def operator(function):
    """The name in its messages."""
    of_others = {"truncated_importance": "importance_weights", "icepop": "importance_weights"}
    return of_others.get(function.__name__, function.__name__)


KINDS = {
    "sparse": (lambda x: x.to_sparse(), r"is torch\.sparse_coo: want a dense.*to_dense\(\)"),
    "nested": (nested, r"is a nested tensor: .*cu_seqlens, or .*to_padded_tensor"),
}


@pytest.fixture(scope="module")
def mesh():
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group(
            "gloo", init_method=f"file://{store.name}-group", rank=0, world_size=1
        )
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_calls_hold_every_tensor_argument():
    """An argument that is added to a public function has to be added above."""
    handed = {}
    for make in CALLS.values():
        function, given = make()
        handed.setdefault(function, set()).update(given)
        function(**given)  # everything fits as it is
    names = [
        *(getattr(LOSS, name) for name in ("fold_statistics", "metrics_from")),
        *(getattr(LOSS, name) for name in ("grpo_loss", "linear_grpo_loss", "policy_loss")),
        *(getattr(grpo_fast.ops, name) for name in grpo_fast.ops.__all__),
        *(getattr(WEIGHTS, name) for name in WEIGHTS.__all__),
    ]
    for function in names:
        for key, parameter in inspect.signature(function).parameters.items():
            if "Tensor" in str(parameter.annotation):
                assert key in handed[function], f"{function.__name__}: {key}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "key"), places())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_tensors_are_named(name, key, kind):
    make, message = KINDS[kind]
    function, given = CALLS[name]()
    with pytest.raises(TypeError, match=f"^{operator(function)}: {key} {message}"):
        function(**with_changed(given, key, make))


@needs_gloo
@pytest.mark.parametrize("graded", [False, True], ids=["constant", "differentiable"])
@pytest.mark.parametrize(("name", "key"), places())
def test_distributed_tensors_are_named(name, key, graded, mesh):
    """Whole or in shards; the advice is one that the argument can follow."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    advice = f"{key}\\.full_tensor"
    if key in ("weight", "bias", "dw_out", "lora A", "lora B"):
        advice = "with_head.*tp_group"
    elif key == "logits":
        advice = "logits\\.full_tensor.*linear_grpo_loss.*tp_group"
    function, given = CALLS[name]()
    for placement in (Replicate(), Shard(0)):

        def change(x, placement=placement):
            if not x.ndim and placement.is_shard():
                placement = Replicate()
            x = distribute_tensor(x.detach(), mesh, [placement])
            return x.requires_grad_() if graded and x.is_floating_point() else x

        with pytest.raises(
            TypeError, match=f"^{operator(function)}: {key} is a DTensor: .*({advice})"
        ):
            function(**with_changed(given, key, change))
