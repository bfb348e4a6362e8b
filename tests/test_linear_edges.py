"""The fused head where it is used unusually: no tokens at all, under autocast, packed without padding."""

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob
from tests.test_linear_grpo import ways_taken

B, T, D, V = 3, 4, 8, 20
GSPO = Objective(ratio="sequence")


@pytest.mark.parametrize("shape", [(0, T), (B, 0), (0,)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("objective", [Objective(), GSPO], ids=["token", "sequence"])
def test_no_tokens_at_all(objective, frozen, shape, backend, device):
    hidden = torch.empty(*shape, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=not frozen)
    ids = torch.empty(shape, dtype=torch.int64, device=device)
    old = torch.empty(shape, device=device)
    advantages = torch.ones(shape[0] if len(shape) > 1 else 1, device=device)
    leaves = [hidden] if frozen else [hidden, weight]
    for compact in (True, False):
        given = {"old_logps": old, "objective": objective, "compact": compact}
        out = linear_grpo_loss(hidden, weight, ids, advantages=advantages, **given)
        assert out.loss == 0
        assert all(g.eq(0).all() for g in torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("objective", [Objective(), GSPO], ids=["token", "sequence"])
def test_autocast_changes_nothing(objective, backend, device):
    """The same bits, the adapter's products included: what is computed in which dtype is decided here."""
    ids = torch.randint(V, (B, T), device=device)
    old, advantages = torch.full((B, T), -3.0, device=device), torch.randn(B, device=device)
    tensors = {"hidden": (B, T, D), "weight": (V, D), "A": (2, D), "B": (V, 2)}
    leaves = [torch.randn(x, device=device, requires_grad=True) for x in tensors.values()]

    def computed():
        hidden, weight, *adapter = leaves
        lora = (*adapter, 0.7)
        logps = linear_logprob(hidden, weight, ids, lora=lora)
        given = {"advantages": advantages, "old_logps": old, "objective": objective}
        loss = linear_grpo_loss(hidden, weight, ids, lora=lora, **given).loss
        return [x for y in (logps, loss) for x in (y, *torch.autograd.grad(y.sum(), leaves))]

    want = computed()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        got = computed()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="asks CUDA itself whether anything synchronised"
)
@pytest.mark.parametrize("compact", [True, False])
def test_no_host_sync_where_the_host_knows_what_counts(compact):
    """Masks, advantages and token weights on the CPU decide what is left out, without a word of the GPU's."""
    # What PyTorch does for determinism looks at indices on the host.
    torch.use_deterministic_algorithms(False)
    hidden = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50_000, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(50_000, (B, T), device="cuda")
    given = {
        "mask": torch.arange(T) < torch.tensor([T, 0, 2])[:, None],
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "token_weights": torch.ones(B, T),
        "old_logps": torch.full((B, T), -10.0, device="cuda"),
        "ref_logps": torch.full((B, T), -10.0, device="cuda"),
        "objective": Objective(beta=0.1, entropy_coef=0.1, reduction="token_mean"),
    }
    for mode in ("default", "error"):  # the first call compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss = linear_grpo_loss(hidden, weight, ids, **given, compact=compact).loss
            (0.5 * loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_take_one_phase(masked, backend, device, monkeypatch):
    """Where the host may wait for their ends; with nothing to leave out, no rows are gathered."""
    hidden = torch.randn(B * T, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    ids, old = torch.randint(V, (B * T,), device=device), torch.full((B * T,), -3.0, device=device)
    given = {
        "advantages": torch.randn(3, device=device),
        "cu_seqlens": torch.tensor([0, 5, 6, B * T], device=device),
        "mask": torch.ones(B * T, device=device) if masked else None,
        "old_logps": old,
        "ref_logps": old,
        "objective": Objective(ratio="sequence", beta=0.1),
    }
    taken, found = ways_taken(monkeypatch), []
    for compact in (True, False):
        out = linear_grpo_loss(hidden, weight, ids, **given, compact=compact)
        found.append((out.loss, *torch.autograd.grad(out.loss, (hidden, weight))))
        assert out.metrics["skipped_fraction"] == 0
    assert taken == ["aligned", "two_phase"]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
