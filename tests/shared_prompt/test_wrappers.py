"""Shared prompts inside DDP, FSDP and accelerate: the gradients of one process, and nothing hangs."""

import importlib.util

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.shared_prompt import backward, choose
from grpo_fast.shared_prompt.routes import ROUTES
from tests.support import ranks
from tests.support import shared_losses as losses
from tests.support.shared import Graded, assert_same, build, gradient_of

TOKENS = Objective(reduction="token_mean", entropy_coef=0.02)
ITEMS = 16
# Of each kind one batch for each of two processes.
BATCHES = {
    # One part of completions, and three.
    "parts": ({"groups": 1}, {"groups": 4, "seed": 2}),
    # Each process alone would choose another route: both run "packed", or "fork" where that cannot be.
    "choices": ({"short": True, "longest": 9}, {"groups": 2}),
    # Nothing of the second goes on from the cache.
    "no second token": ({"groups": 3}, {"groups": 2, "longest": 1}),
    # Other choices, and the second cannot fork: both run "packed", or "unshared".
    "no fork": ({"short": True, "longest": 9}, {"groups": 2, "longest": 12}),
}
# Positions that change where a sequence has more than 12 tokens.
LONG = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 12,
    }
}


def loss_on(model, given, route, recompute=None):
    """The loss of one process, divided by a number of the whole batch; twice, as DDP and FSDP average."""
    more = losses.extras(given)
    more = {"advantages": more["rewards"], "mask": more["mask"], "old_logps": more["old_logps"]}
    options = {"objective": TOKENS, "num_items": ITEMS}
    if route == "padded":
        return losses.padded_loss(model, given, more, **options).loss
    shared = losses.planned(given)
    return losses.shared_loss(model, shared, more, route, recompute=recompute, **options)[0]


def truth(batches, name="qwen3", **options):
    """A model, and the gradients of one process with the batches of all: their mean, as they are reduced."""
    model = build(name, **options)
    loss = sum(loss_on(model, given, "padded") for given in batches) / len(batches)
    return model, losses.gradient(model, loss)


def batches_of(kind):
    """The batches of two processes."""
    return [losses.batch(**options) for options in BATCHES[kind]]


def whole_gradients(model):
    """The gradients of a wrapped model, gathered, by the names of the bare one."""
    wrapping = ("module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
    found = {}
    for name, x in gradient_of(model).items():
        for part in wrapping:
            name = name.replace(part, "")
        found[name] = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def step(model, expected, loss):
    """One backward of a process whose gradients are those of all."""
    loss.backward()
    got = Graded(expected.log_probs, whole_gradients(model))
    assert_same(got, expected, 1e-5)


def ddp_on_a_rank():
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if importlib.util.find_spec("accelerate"):
        accelerated("parts")  # makes the group
    else:
        dist.init_process_group("gloo")
    for kind in ("parts", "no second token"):
        batches = batches_of(kind)
        model, expected = truth(batches)
        mine = batches[dist.get_rank()]
        wrapped = DistributedDataParallel(model)
        for route in ("packed", "mask", "fork", "bounded", "auto"):
            step(wrapped, expected, loss_on(wrapped, mine, route))
    wrapped.train()
    model.gradient_checkpointing_enable()
    step(wrapped, expected, loss_on(wrapped, mine, "fork"))
    with pytest.raises(TypeError, match=r"DistributedDataParallel needs one.*route='bounded'"):
        backward(wrapped, losses.planned(mine), lambda *_: None)


def fsdp_on_a_rank():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    taken = []
    for route, function in ROUTES.items():

        def noted(*arguments, route=route, function=function, **given):
            taken.append(route)
            return function(*arguments, **given)

        ROUTES[route] = noted
    fsdp1("parts")
    for kind in BATCHES:
        fsdp2(kind, taken)
        fsdp2(kind, taken, attention="eager")
    fsdp2("parts", taken, checkpointing=True)
    fsdp2("parts", taken, name="lfm2")


def fsdp2(kind, taken, name="qwen3", checkpointing=False, attention="sdpa"):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    batches = batches_of(kind)
    options = LONG if kind == "no fork" else {}
    model, expected = truth(batches, name, attn_implementation=attention, **options)
    mine = batches[dist.get_rank()]
    if kind in ("choices", "no fork"):
        routes = [choose(model, losses.planned(given)).route for given in batches]
        assert routes[0] == "unshared"
        assert routes[1] in ("packed", "mask")
    model.train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    step(model, expected, loss_on(model, mine, "auto"))
    packs = attention == "sdpa" and name == "qwen3"
    if kind == "no fork":
        assert taken[-1] == ("packed" if packs else "unshared")
        return
    if kind == "choices":
        assert taken[-1] == ("packed" if packs else "fork")
    masked = ["mask"] if name == "qwen3" else []
    for route in ("fork", "bounded", *masked, *(["packed"] if packs else [])):
        with torch.no_grad():
            loss_on(model, mine, route)
        assert taken[-1] == route
        step(model, expected, loss_on(model, mine, route))
    step(model, expected, loss_on(model, mine, "fork", recompute=True))
    with pytest.raises(TypeError, match=r"parameters are sharded.*route='bounded'"):
        backward(model, losses.planned(mine), lambda *_: None)


def fsdp1(kind):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    batches = batches_of(kind)
    model, expected = truth(batches)
    mine = batches[dist.get_rank()]
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    for route in ("packed", "mask", "fork", "auto", "bounded"):
        loss_on(wrapped, mine, route).backward()
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            got = Graded(expected.log_probs, whole_gradients(wrapped))
        assert_same(got, expected, 1e-5)
        wrapped.zero_grad()
    with pytest.raises(TypeError, match=r"FullyShardedDataParallel needs one.*route='bounded'"):
        backward(wrapped, losses.planned(mine), lambda *_: None)


def accelerated(kind):
    import accelerate
    from torch.nn.parallel import DistributedDataParallel

    accelerator = accelerate.Accelerator(cpu=True)
    number = accelerator.num_processes
    batches = batches_of(kind)[:number]
    model, expected = truth(batches)
    mine = batches[accelerator.process_index]
    wrapped = accelerator.prepare(model)
    assert isinstance(wrapped, DistributedDataParallel) == (number > 1)
    for route in ("packed", "mask", "fork", "bounded"):
        accelerator.backward(loss_on(wrapped, mine, route))
        assert_same(Graded(expected.log_probs, whole_gradients(wrapped)), expected, 1e-5)


@ranks.needs_gloo
def test_ddp_and_accelerate():
    ranks.run("tests.shared_prompt.test_wrappers:ddp_on_a_rank", 2)


@ranks.needs_gloo
def test_fsdp():
    """FSDP1, and FSDP2 with plans of any kind: all processes run the same layers."""
    ranks.run("tests.shared_prompt.test_wrappers:fsdp_on_a_rank", 2)


def test_accelerate_in_one_process(monkeypatch):
    accelerate = pytest.importorskip("accelerate", reason="the wrapper is its own")
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    try:
        accelerated("parts")
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
