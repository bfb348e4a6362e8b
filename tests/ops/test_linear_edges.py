"""Unusual uses of the fused head: no tokens at all, autocast, packed sequences without padding."""

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob
from grpo_fast.ops.head.chunk_length import TILE_ROWS, chunk_rows
from tests.support.hidden_cases import batch, check, ways_taken

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


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("objective", [Objective(), GSPO], ids=["token", "sequence"])
def test_sequences_of_one_token(objective, masked, backend, device):
    tensors, options, ids, arguments = batch(5, 1, V, device)
    if not masked:
        arguments = {k: x.nan_to_num(-1.0) for k, x in arguments.items() if k != "mask"}
        tensors["hidden"], ids = tensors["hidden"].nan_to_num(0.5), ids.clamp(min=0)
    for size in (None, 1, 3):
        given = {**arguments, "objective": objective}
        check(tensors, options, ids, given, chunk_size=size, compact=masked)


def test_the_gradient_of_a_bias_is_summed_in_float32(backend, device):
    """Each of 257 rows, in chunks of halves, adds 1/4 or -3/4: bfloat16 could not add that up."""
    N = 257
    hidden = torch.zeros(1, N, D, device=device, dtype=torch.bfloat16)
    weight = torch.zeros(4, D, device=device, dtype=torch.bfloat16)
    bias = torch.zeros(4, device=device, requires_grad=True)
    ids = torch.zeros(1, N, dtype=torch.int64, device=device)
    for size in (None, 100):
        given = {"logits_dtype": "bf16", "chunk_size": size}
        loss = -linear_logprob(hidden, weight, ids, bias=bias, **given).sum()
        (grad,) = torch.autograd.grad(loss, bias)
        assert grad.tolist() == [-0.75 * N, 0.25 * N, 0.25 * N, 0.25 * N]


@pytest.mark.parametrize("processors", [None, 1, 132])
@pytest.mark.parametrize("most", [1, 7, 128, 300, 2048, 5000])
def test_chunks_hold_no_more_rows_than_there_is_memory_for(most, processors):
    for N in (1, 5, 127, 128, 1000, 1001, 4096, 40_000):
        for D in (64, 4096):
            rows = chunk_rows(N, D, most, processors)
            assert 1 <= rows <= most, (N, D)
            # Chunks of nearly equal size: the last one is not a remainder of a few rows.
            chunks = -(-N // rows)
            assert rows == min(most, N) or rows - -(-N // chunks) < (TILE_ROWS if processors else 8)


@pytest.mark.parametrize("objective", [Objective(), GSPO], ids=["token", "sequence"])
def test_autocast_changes_nothing(objective, backend, device):
    """The bits are the same, also of the adapter's products: autocast does not choose the dtypes here."""
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
    """The host may wait for their ends. If no row is left out, no rows are gathered."""
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
