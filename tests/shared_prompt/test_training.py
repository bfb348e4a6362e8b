"""A step with shared prompts is that of the padded batch: losses, dtypes, checkpointing, adapters."""

import pytest
import torch

from grpo_fast import Objective, linear_grpo_loss
from grpo_fast.shared_prompt import backward
from grpo_fast.testing import assert_as_accurate
from tests.support import shared_losses as losses
from tests.support.shared import assert_same, build, gradient_of
from tests.support.shared_losses import MICRO_BATCH, ROUTES

OBJECTIVES = {
    "grpo": losses.OBJECTIVE,
    "tokens": Objective(beta=0.1, entropy_coef=0.02, reduction="token_mean"),
    "sequences": Objective.preset("gspo"),
}
HYBRID = ("fork", "bounded")  # the routes of a model with recurrent layers


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    """The PyTorch path: other tests compare the two paths, and the models are tiny."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")


@pytest.fixture
def given():
    return losses.batch()


@pytest.fixture
def shared(given):
    return losses.planned(given)


@pytest.fixture
def more(given):
    return losses.extras(given)


@pytest.fixture
def model():
    return build("qwen3")


def without_reference(more, objective):
    return {name: x for name, x in more.items() if name != "ref_logps" or objective.beta}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("route", ROUTES)
def test_loss_metrics_and_gradients_are_those_of_the_padded_batch(
    route, objective, model, given, shared, more
):
    more = without_reference(more, objective)
    want = losses.padded_loss(model, given, more, objective=objective, return_entropy=True)
    expected = losses.gradient(model, want.loss)
    loss, out = losses.shared_loss(model, shared, more, route, objective=objective)
    assert_same(losses.gradient(model, loss), expected, 1e-5)
    assert out.metrics.keys() - want.metrics.keys() == {"skipped_fraction"}
    for name, x in want.metrics.items():
        torch.testing.assert_close(out.metrics[name], x, rtol=1e-4, atol=1e-5, msg=name)
    live = more["mask"]
    for got, whole in ((out.logps, want.logps), (out.entropy, want.entropy)):
        torch.testing.assert_close(shared.padded(got)[live], whole[live], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "lfm2"])
def test_other_kinds_of_layers_and_of_heads(name, given, shared, more):
    """Windows and a softcap; convolutions."""
    model = build(name)
    expected = losses.gradient(model, losses.padded_loss(model, given, more).loss)
    for route in HYBRID:
        loss, _ = losses.shared_loss(model, shared, more, route)
        assert_same(losses.gradient(model, loss), expected, 1e-5)


@pytest.mark.parametrize("recompute", [None, True])
def test_backward_with_the_denominator_of_the_whole_batch(recompute, model, given, shared, more):
    """`backward` adds the gradient of the sum of its parts' losses, with each part's own sequences."""
    objective = OBJECTIVES["tokens"]
    more["advantages"] = more.pop("rewards")
    items = more["mask"].sum()
    whole = losses.padded_loss(model, given, more, objective=objective, num_items=items).loss
    expected = losses.gradient(model, whole)

    def loss(hidden, head, part):
        own = {name: part.plan.packed(x) for name, x in more.items() if x.ndim == 2}
        own["advantages"] = more["advantages"][part.completions]
        return linear_grpo_loss(
            *(hidden, head.weight, part.plan.targets),
            cu_seqlens=part.plan.cu_seqlens,
            num_items=items,
            objective=objective,
            **own,
            **head.options,
        ).loss

    found = backward(model, shared, loss, micro_batch=1, recompute=recompute)
    assert len(found) == len(given["completion_ids"])
    assert not any(x.requires_grad for x in found)
    got = losses.Graded(torch.stack(found).sum(), gradient_of(model))
    assert_same(got, expected, 1e-5)
    backward(model, shared, loss, micro_batch=MICRO_BATCH)
    assert_same(losses.Graded(got.log_probs, gradient_of(model)), expected, 1e-5)


def test_padded_and_packed_are_inverse(given, shared, more):
    values = shared.packed(more["old_logps"])
    torch.testing.assert_close(shared.packed(shared.padded(values)), values, rtol=0, atol=0)
    again = shared.padded(values)
    torch.testing.assert_close(again, more["old_logps"] * given["completion_mask"], rtol=0, atol=0)
    wide = shared.packed(more["old_logps"][..., None].expand(-1, -1, 3))
    torch.testing.assert_close(shared.padded(wide)[..., 1], again, rtol=0, atol=0)


@pytest.mark.parametrize("route", [*ROUTES, "unshared", "auto"])
def test_old_log_probs_of_the_same_weights_give_a_ratio_of_one(route, model, given, shared, more):
    with torch.no_grad():
        old = losses.log_probs(model, shared, route)
        logits = losses.own_logits(model, given)
    assert not old.requires_grad
    ids = given["completion_ids"][..., None]
    want = shared.packed(logits.log_softmax(-1).gather(2, ids)[..., 0])
    torch.testing.assert_close(old, want, rtol=1e-5, atol=1e-5)
    more["old_logps"] = shared.padded(old)
    _, out = losses.shared_loss(model, shared, more, "mask" if route == "fork" else "fork")
    for name, value in (("ratio_min", 1), ("ratio_max", 1)):
        assert out.metrics[name].item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_is_as_accurate_as_the_unshared_forward(route, model, shared, more):
    """The errors are against float32."""

    def run(route, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, out = losses.shared_loss(model, shared, more, route)
        gradients = losses.gradient(model, loss).gradient
        flat = torch.cat([x.flatten() for x in gradients.values()])
        return {"loss": loss, "log-probs": out.logps, "gradient": flat}

    truth, plain, got = run("unshared", False), run("unshared", True), run(route, True)
    floor = 2**-8  # of bfloat16
    for name, x in truth.items():
        assert_as_accurate(got[name], plain[name], x, floor=floor, name=name)
    norms = [(x["gradient"] - truth["gradient"]).norm() for x in (got, plain)]
    assert norms[0] <= 2 * norms[1]
    assert norms[1] > 1e-4 * truth["gradient"].norm()  # the autocast is on


def counted(model):
    """How often layers run, counted where they begin: a recomputation stops where nothing is missing."""
    calls = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("route", ["unshared", *ROUTES])
@pytest.mark.parametrize("how", ["enabled", "reentrant", "recompute"])
def test_checkpointing_recomputes_and_changes_nothing(how, route, model, given, shared, more):
    expected = losses.gradient(model, losses.padded_loss(model, given, more).loss)
    if how != "recompute":
        options = {"use_reentrant": how == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()  # or PyTorch's other checkpoint has no gradient
        model.train()
    calls = counted(model)
    losses.log_probs(model, shared, route)  # tries the route out
    del calls[:]
    recompute = True if how == "recompute" else None
    loss, _ = losses.shared_loss(model, shared, more, route, recompute=recompute)
    forward = len(calls)
    assert_same(losses.gradient(model, loss), expected, 1e-5)
    assert len(calls) == 2 * forward


@pytest.mark.parametrize("route", ROUTES)
def test_an_adapter_and_its_reference(route, given, shared, more):
    """LoRA: the reference is the model without the adapter, and only the adapter has a gradient."""
    peft = pytest.importorskip("peft", reason="the adapter is PEFT's")
    bare = build("qwen3")
    with torch.no_grad():
        reference = shared.padded(losses.log_probs(bare, shared, "unshared"))
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(bare, config).eval()
    with torch.no_grad(), model.disable_adapter():
        found = losses.log_probs(model, shared, route)
    torch.testing.assert_close(shared.padded(found), reference, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (losses.log_probs(model, shared, route) - found).abs().max() > 1e-2
    more["ref_logps"] = reference
    expected = losses.gradient(model, losses.padded_loss(model, given, more).loss)
    loss, _ = losses.shared_loss(model, shared, more, route)
    got = losses.gradient(model, loss)
    assert_same(got, expected, 1e-5)
    assert got.gradient
    assert all("lora" in name for name in got.gradient)


@pytest.mark.parametrize("route", ROUTES)
def test_any_upstream_gradient(route, model, given, shared, more):
    """The factor of a gradient scaler, and one that depends on the loss."""
    for scaled in (lambda loss: 2.0**12 * loss, lambda loss: (3 * loss).exp()):
        want = scaled(losses.padded_loss(model, given, more).loss)
        expected = losses.gradient(model, want)
        loss, _ = losses.shared_loss(model, shared, more, route)
        assert_same(losses.gradient(model, scaled(loss)), expected, 2e-5 * want.abs().item())


@pytest.mark.parametrize("route", ROUTES)
def test_a_scaled_half_precision_step(route, model, given, shared, more):
    """`torch.amp.GradScaler` takes the step that it takes with the padded batch."""
    stepped = []
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for shares in (False, True):
        model.load_state_dict(before, strict=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        if shares:
            loss, _ = losses.shared_loss(model, shared, more, route)
        else:
            loss = losses.padded_loss(model, given, more).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        stepped.append([x.detach().clone() for x in model.parameters()])
    for x, y, start in zip(*stepped, before.values(), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)
        assert (x != start).any()


# Dynamo says this of each state in the cache.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("route, kind", [("mask", "aot_eager"), ("fork", "eager")])
def test_a_compiled_model(route, kind, model, given, shared, more):
    expected = losses.gradient(model, losses.padded_loss(model, given, more).loss)
    compiled = torch.compile(model, backend=kind)
    for _ in range(2):
        loss, _ = losses.shared_loss(compiled, shared, more, route)
        assert_same(losses.gradient(model, loss), expected, 1e-5)
