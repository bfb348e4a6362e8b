"""`linear_grpo_loss` from hidden states: loss and gradients against the whole logits in float64."""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from grpo_fast.ops import linear_logprob
from grpo_fast.ops.head import chunk_length
from tests.support.cases import in_double
from tests.support.heads import HEADS, call, graded
from tests.support.hidden_cases import batch, check, loss_and_grads, packed, ways_taken
from tests.support.objectives import OBJECTIVES, by_objective
from tests.support.properties import given, settings, st

by_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


@by_objective
def test_every_objective(objective, backend, device):
    tensors, options, ids, arguments = batch(4, 5, 60, device)
    arguments["objective"] = objective
    check(tensors, options, ids, arguments, chunk_size=7)


@by_head
@pytest.mark.parametrize("compact, chunk_size", [(True, None), (True, 4), (False, 64)])
def test_every_head(head, compact, chunk_size, backend, device):
    tensors, options, ids, arguments = batch(4, 5, 101, device, head)
    arguments |= {"objective": Objective(beta=0.1, entropy_coef=0.02), "temperature": 0.8}
    check(tensors, options, ids, arguments, 3.0, compact=compact, chunk_size=chunk_size)


@by_head
@pytest.mark.parametrize(
    "frozen", [("weight",), ("hidden",), ("weight", "bias", "A", "B")], ids=str
)
def test_frozen_parts(head, frozen, backend, device):
    tensors, options, ids, arguments = batch(4, 5, 101, device, head)
    for objective in (Objective(beta=0.1), Objective(ratio="sequence", beta=0.1)):
        arguments["objective"] = objective
        check(tensors, options, ids, arguments, 2.0, frozen, chunk_size=7)


@pytest.mark.parametrize("V", [1500, 40_000])
def test_long_rows(V, backend, device):
    """Several tiles per row, and rows shared by several programs; rows of no aligned length."""
    for name in ("plain", "everything"):
        head = {k: x for k, x in HEADS[name].items() if k != "vocab_size"} | {"vocab_size": V}
        tensors, options, ids, arguments = batch(2, 3, V + 1, device, head)
        arguments["objective"] = Objective(beta=0.1, entropy_coef=0.02)
        arguments["temperature"] = 0.5 + torch.rand(2, 3, device=device)
        check(tensors, options, ids, arguments, chunk_size=2)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 300)),
    chunk_size=st.sampled_from([None, 1, 6, 32]),
    compact=st.booleans(),
    drift=st.floats(0, 2),
    temperature=st.floats(0.3, 3),
    objective=st.sampled_from(list(OBJECTIVES.values())),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    shape, chunk_size, compact, drift, temperature, objective, seed, backend, device
):
    torch.manual_seed(seed)
    tensors, options, ids, arguments = batch(*shape, device, drift=drift)
    arguments |= {"objective": objective, "temperature": temperature}
    check(tensors, options, ids, arguments, chunk_size=chunk_size, compact=compact)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("name", ["default", "k3_unbiased", "gspo", "gmpo", "vespo", "top entropy"])
def test_packed_is_padded(name, chunk_size, backend, device):
    objective = OBJECTIVES[name]
    tensors, options, ids, arguments = batch(5, 6, 60, device)
    arguments["objective"] = objective
    want = loss_and_grads(linear_grpo_loss, tensors, options, ids, arguments)
    mask = arguments["mask"]
    tensors, ids, flat = packed(tensors, ids, arguments)
    flat["objective"] = objective
    got = check(tensors, options, ids, flat, chunk_size=chunk_size)
    torch.testing.assert_close(got["dhidden"], want["dhidden"][mask], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got["dweight"], want["dweight"], rtol=1e-5, atol=1e-7)


def test_every_optional_argument(backend, device):
    tensors, options, ids, arguments = batch(4, 5, 60, device)
    arguments |= {
        "advantages": torch.randn(4, 5, device=device),
        "importance_weights": torch.rand(4, 5, device=device) * 2,
        "token_weights": torch.rand(4, 5, device=device),
        "temperature": torch.rand(4, 5, device=device) + 0.5,
        "num_items": 37,
        "objective": Objective(reduction="token_mean"),
    }
    arguments["advantages"][2, 1] = 0
    arguments["importance_weights"][3, 0] = 0
    arguments["token_weights"][3, 1:3] = 0
    check(tensors, options, ids, arguments, chunk_size=6)
    check(tensors, options, ids, {**arguments, "objective": OBJECTIVES["vespo"]}, chunk_size=6)
    for name in ("old_logps", "importance_weights", "token_weights", "num_items"):
        check(tensors, options, ids, {k: x for k, x in arguments.items() if k != name})


def test_rewards_are_scored(backend, device):
    tensors, options, ids, arguments = batch(6, 3, 60, device)
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.3, 0.3, 0.3], device=device)
    arguments |= {"rewards": rewards, "group_size": 3, "advantages": None}
    grads = check(tensors, options, ids, arguments)
    assert grads["dhidden"][3:].eq(0).all()  # nothing to learn from a group of equals
    tensors, ids, flat = packed(tensors, ids, arguments)
    check(tensors, options, ids, flat | {"rewards": rewards, "group_size": 3, "advantages": None})


COMPACTABLE = {
    "clip": Objective(),
    "token_mean": Objective(reduction="token_mean", dual_clip=2.0),
    "kl": Objective(beta=0.1),
    "entropy": Objective(entropy_coef=0.1),
    "dro": Objective(surrogate="dro", quadratic_coef=0.2),
    "gspo": Objective(ratio="sequence", epsilon_low=0.05),
    "vespo": Objective(surrogate="vespo"),
}


@pytest.mark.parametrize("objective", COMPACTABLE.values(), ids=COMPACTABLE)
@pytest.mark.parametrize("per_token", [False, True])
def test_compaction_changes_nothing(objective, per_token, backend, device):
    """Loss and gradients agree to 1e-6, and only rows that cannot have a gradient are left out."""
    tensors, options, ids, arguments = batch(8, 6, 80, device)
    arguments["advantages"][3:5] = 0
    if per_token:
        arguments["advantages"] = arguments["advantages"][:, None].repeat(1, 6)
        arguments["advantages"][6, ::2] = 0
    arguments["objective"] = objective
    both = [
        loss_and_grads(linear_grpo_loss, tensors, options, ids, arguments, compact=compact)
        for compact in (True, False)
    ]
    for name, x in both[0].items():
        scale = both[1][name].abs().max()
        if name == "loss":  # its terms are of the size of 1, and cancel
            scale = scale.clamp(min=1)
        assert (x - both[1][name]).abs().max() <= 1e-6 * scale, name
    out = call(linear_grpo_loss, graded(tensors), options, ids, **arguments)
    dead = both[1]["dhidden"].eq(0).all(-1)
    skipped = out.metrics["skipped_fraction"]
    live = arguments["mask"]
    if objective.beta or objective.entropy_coef or objective.quadratic_coef:
        want = ~live
    elif objective.needs_sequences:
        moved = (live & (arguments["advantages"].reshape(8, -1) != 0)).any(1)
        want = ~(live & moved[:, None])
    else:
        want = ~live | (arguments["advantages"].reshape(8, -1) == 0)
    assert dead[want].all()
    torch.testing.assert_close(skipped, want.float().mean())
    torch.testing.assert_close(out.metrics["tokens"], (~want).sum().float())
    off = call(linear_grpo_loss, graded(tensors), options, ids, **arguments, compact=False)
    assert off.metrics["skipped_fraction"] == 0
    assert off.metrics["tokens"] == live.sum()
    for output in (out, off):
        assert output.logps.isfinite().all()
        assert all(x.isfinite() for x in output.metrics.values())
    torch.testing.assert_close(out.logps[~want], off.logps[~want], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", COMPACTABLE.values(), ids=COMPACTABLE)
def test_a_batch_with_nothing_live(objective, backend, device):
    tensors, options, ids, arguments = batch(3, 4, 101, device, HEADS["everything"])
    arguments |= {"mask": torch.zeros(3, 4, device=device), "objective": objective}
    for compact in (True, False):
        leaves = graded({**tensors, "hidden": torch.full_like(tensors["hidden"], torch.nan)})
        out = call(linear_grpo_loss, leaves, options, ids * 0, **arguments, compact=compact)
        assert out.loss.requires_grad
        assert out.loss == 0
        out.loss.backward()
        assert all(x.grad.eq(0).all() for x in leaves.values())
        assert all(x.isfinite() for x in out.metrics.values())


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", [k for k, x in OBJECTIVES.items() if not x.by_token])
def test_the_ways_of_sequence_objectives_agree(name, compact, backend, device, monkeypatch):
    """One phase with aligned chunks, two phases, rows of a frozen head scaled late: the same gradients."""
    tensors, options, ids, arguments = batch(5, 6, 60, device)
    arguments["objective"] = objective = OBJECTIVES[name]
    taken = ways_taken(monkeypatch)
    found = [
        loss_and_grads(
            linear_grpo_loss,
            *(tensors, options, ids, arguments),
            frozen=frozen,
            compact=compact,
            chunk_size=size,
        )
        for size, frozen in ((None, ()), (12, ()), (3, ()), (5, ("weight",)))
    ]
    late = "two_phase" if objective.entropy_coef else "late"
    one = "two_phase" if objective.top_entropy_quantile < 1 else "aligned"
    assert taken == [one, one, "two_phase", late]
    for other in found[1:]:
        for key, x in other.items():
            scale = found[0][key].abs().max()
            assert (x - found[0][key]).abs().max() <= 2e-6 * scale, key


@pytest.mark.parametrize("T", [3, 9])
def test_whole_sequences_in_the_chunks_that_memory_allows(T, device, monkeypatch):
    """Without a chunk size: nine rows, three sequences of three or a longest one of nine."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    monkeypatch.setitem(chunk_length.WORKSPACE_BYTES, "cpu", 9 * 64 * 4)
    monkeypatch.setattr(chunk_length, "CPU_WORKSPACE_SHARE", 0)
    tensors, options, ids, arguments = batch(6, T, 60, "cpu")
    arguments = {k: x.nan_to_num(-4.0) for k, x in arguments.items() if k != "mask"}
    tensors["hidden"], ids = tensors["hidden"].nan_to_num(0.5), ids.clamp(min=0)
    arguments["objective"] = OBJECTIVES["gspo"]
    taken = ways_taken(monkeypatch)
    check(tensors, options, ids, arguments)
    assert set(taken) == {"aligned"}


ON_POLICY = [k for k, x in OBJECTIVES.items() if not x.by_token and x.off_policy_threshold is None]


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_one_phase_is_enough(name, backend, device, monkeypatch):
    """Without old log-probs coefficients are known up front, also in chunks below a sequence's length."""
    tensors, options, ids, arguments = batch(5, 6, 60, device)
    objective = OBJECTIVES[name]
    arguments |= {"objective": objective, "importance_weights": torch.rand(5, 6, device=device)}
    del arguments["old_logps"]
    taken = ways_taken(monkeypatch)
    check(tensors, options, ids, arguments, chunk_size=3)
    through_mean = objective.ratio == "sequence" or objective.surrogate == "gmpo"
    coupled = objective.beta and objective.kl == "k3_unbiased" and through_mean
    coupled = coupled or objective.top_entropy_quantile < 1
    assert taken == ["two_phase" if coupled else "known"]


def test_the_same_log_probs_as_linear_logprob(backend, device):
    """The bits are the same at equal rows and chunk length, so on policy the ratio is exactly 1."""
    tensors, options, ids, arguments = batch(5, 6, 400, device, HEADS["everything"])
    arguments["objective"] = Objective(entropy_coef=0.1)
    for size in (None, 7):
        same = {"mask": arguments["mask"], "temperature": 0.7, "chunk_size": size}
        logp, entropy = call(linear_logprob, tensors, options, ids, return_entropy=True, **same)
        arguments["old_logps"] = logp
        for leaves in (graded(tensors), tensors):  # with and without a gradient
            out = call(linear_grpo_loss, leaves, options, ids, **arguments | same)
            torch.testing.assert_close(out.logps, logp, rtol=0, atol=0)
            torch.testing.assert_close(out.entropy, entropy, rtol=0, atol=0)
            assert out.metrics["ratio_min"] == out.metrics["ratio_max"] == 1


def test_the_same_as_grpo_loss_on_the_logits(backend, device):
    tensors, options, ids, arguments = batch(4, 5, 300, device)
    arguments["objective"] = Objective(beta=0.1, entropy_coef=0.02)
    out = call(linear_grpo_loss, tensors, options, ids, **arguments)
    want = grpo_loss(tensors["hidden"] @ tensors["weight"].T, ids, **arguments)
    torch.testing.assert_close(out.loss, want.loss)
    assert out.metrics.keys() == {*want.metrics, "skipped_fraction"}
    for name, x in want.metrics.items():
        torch.testing.assert_close(out.metrics[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("graded", [True, False])
def test_entropy_on_request_covers_what_compaction_left_out(graded, backend, device):
    """Log-probs, entropy and metrics of every live token, though only some have a gradient."""
    tensors, options, ids, arguments = batch(4, 5, 300, device)
    arguments["advantages"] = torch.tensor([0.5, 0.0, 0.0, -1.0], device=device)
    if graded:
        tensors = {k: x.clone().requires_grad_() for k, x in tensors.items()}
    out = call(linear_grpo_loss, tensors, options, ids, return_entropy=True, **arguments)
    logits = (tensors["hidden"] @ tensors["weight"].T).detach()
    want = grpo_loss(logits, ids, return_entropy=True, **arguments)
    torch.testing.assert_close(out.loss, want.loss)
    assert out.metrics["skipped_fraction"] >= 0.25
    mask = arguments["mask"]
    for a, b in ((out.logps, want.logps), (out.entropy, want.entropy)):
        torch.testing.assert_close(a[mask], b[mask], rtol=1e-5, atol=1e-5)
    for name, x in want.metrics.items():
        torch.testing.assert_close(out.metrics[name], x, rtol=1e-5, atol=1e-6)


def test_run_to_run_the_same_bits(backend, device):
    for objective in (Objective(beta=0.1), OBJECTIVES["gspo"]):
        tensors, options, ids, arguments = batch(5, 6, 400, device, HEADS["everything"])
        arguments["objective"] = objective
        one, two = (
            loss_and_grads(linear_grpo_loss, tensors, options, ids, arguments, chunk_size=8)
            for _ in range(2)
        )
        for name, x in one.items():
            torch.testing.assert_close(x, two[name], rtol=0, atol=0)


def test_the_error_of_dweight_does_not_grow_with_chunks(device):
    """float32 accumulation: 1 chunk or 64, the same distance from float64."""
    tensors, options, ids, arguments = batch(16, 32, 90, device, drift=0.05)
    truth = loss_and_grads(
        *(reference.linear_grpo, {k: x.double() for k, x in tensors.items()}, options, ids),
        in_double(arguments),
    )["dweight"]
    for size in (512, 64, 8):
        got = loss_and_grads(
            linear_grpo_loss, tensors, options, ids, arguments, chunk_size=size, compact=False
        )["dweight"]
        assert (got - truth).abs().max() <= 1e-6 * truth.abs().max(), size


def test_half_operands_accumulate_dweight_in_float32(backend, device):
    """float16, many chunks: only the final rounding shows, not one per chunk."""
    tensors, options, ids, arguments = batch(8, 16, 90, device, dtype=torch.float16)
    for logits_dtype in ("fp32", "bf16"):
        check(tensors, options, ids, arguments, 2.0**10, chunk_size=4, logits_dtype=logits_dtype)


def test_the_same_weight_twice_in_one_step_accumulates(backend, device):
    """Tied embeddings and several micro-batches need this."""
    tensors, options, ids, arguments = batch(4, 5, 60, device)
    want = loss_and_grads(linear_grpo_loss, tensors, options, ids, arguments)
    leaves = graded(tensors)
    for factor in (1.0, 2.0):
        out = call(linear_grpo_loss, leaves, options, ids, **arguments)
        (factor * out.loss + leaves["weight"].sum()).backward()
    torch.testing.assert_close(leaves["weight"].grad, 3 * want["dweight"] + 2)
    leaves = graded(tensors)
    embedded = torch.nn.functional.embedding(ids.clamp(min=0), leaves["weight"])
    live = torch.where(arguments["mask"][..., None], leaves["hidden"], 0)
    loss = linear_grpo_loss(live + embedded, leaves["weight"], ids, **arguments).loss
    (grad,) = torch.autograd.grad(loss, leaves["weight"])
    h, W = live.detach().double(), leaves["weight"].detach().double().requires_grad_()
    h = h + torch.nn.functional.embedding(ids.clamp(min=0), W)
    (truth,) = torch.autograd.grad(reference.linear_grpo(h, W, ids, **in_double(arguments)), W)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6)
