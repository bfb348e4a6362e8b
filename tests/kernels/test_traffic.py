"""Bytes loaded and stored by each kernel, counted in Triton's interpreter: the formulas of kernels/*.py."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
if torch.cuda.is_available():
    pytest.skip("counts what the interpreter does", allow_module_level=True)

from benchmarks.measuring import traffic as formulas
from grpo_fast.kernels import (
    chunks,
    edges,
    group_advantage,
    grpo,
    logprob,
    on_chip,
    policy_loss,
    reduction_weights,
    scaling,
    schedules,
    sequence_loss,
)
from grpo_fast.objective import Objective
from grpo_fast.records import (
    Grouping,
    Incoming,
    Outgoing,
    Outputs,
    Rewards,
    Sequences,
    SoftCap,
    Standardization,
    Targets,
    Tokens,
    Weighing,
)
from tests.support.interpreted import counted

ID, FLAG, FLOAT = 8, 1, 4  # bytes of an id, of an entry of a mask, of anything else per token
# With edges, one tile; one program per row, several tiles; many programs per row.
SIZES = [101, 5000, 33_000]

by_size = pytest.mark.parametrize("V", SIZES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def batch(V, dtype, B=2, T=3):
    """Logits with a gap after each sequence, ids, and a mask that leaves N - 2 tokens."""
    logits = torch.randn(B, T + 1, V, dtype=dtype)[:, :-1]
    ids = torch.randint(V, (B * T,))
    mask = torch.ones(B * T, dtype=torch.bool)
    mask[[1, 4]] = False
    return logits, ids, mask


def meeting(V, live, w, together=False):
    """Bytes loaded, and stored, by the programs that share a row: 3 statistics a segment, a counter each.

    Programs that wait for each other arrive, look once, and leave: the interpreter runs one after the other.
    """
    plan = schedules.reading(V, w, together=together)
    visits = 1 + (3 if together else 1) * (plan.parts - 1)
    return live * (3 * plan.segments + visits) * FLOAT if plan.split else 0


def visits(index, shape, times):
    """How often each element of (B, T, V) is visited if `index` rows are, `times` each."""
    counts = torch.zeros(shape, dtype=torch.int64)
    counts.view(-1, shape[-1])[index] = times
    return counts


def written_visits(moving, ids, shape):
    """Every element once, the scored ones of rows with a gradient twice, but for those at the edges."""
    N, V = shape[0] * shape[1], shape[-1]
    counts = torch.ones(shape, dtype=torch.int64)
    head = -torch.arange(N) * V % edges.UNIT.value
    body = (V - head) // edges.UNIT.value * edges.UNIT.value
    twice = moving & (ids >= head) & (ids < head + body)
    counts.view(N, V)[twice, ids[twice]] = 2
    return counts


def assert_visits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@by_dtype
@by_size
@pytest.mark.parametrize("entropy", [False, True])
def test_logprob_forward(V, dtype, entropy):
    logits, ids, mask = batch(V, dtype)
    N, live, w = len(ids), int(mask.sum()), logits.element_size()
    with counted() as traffic:
        logp = logprob.logprob_fwd(logits, Targets(ids, mask), entropy).logp
    parts = schedules.reading(V, w).parts
    size, visited = traffic.read(logits)
    expected = visits(mask, logits.shape, 1)
    expected.view(N, V)[mask, ids[mask]] += 1
    documented = formulas.logprob_forward(live, V, w)
    assert size == documented.read + documented.reread
    assert_visits(visited, expected)
    met = meeting(V, live, w)
    assert traffic.total(traffic.loads) == size + parts * N * (FLAG + ID) + met
    assert traffic.total(traffic.stores) == N * (4 if entropy else 3) * FLOAT + met
    assert traffic.written(logp)[0] == N * FLOAT


@by_dtype
@by_size
@pytest.mark.parametrize("entropy", [False, True])
def test_logprob_backward(V, dtype, entropy):
    logits, ids, mask = batch(V, dtype)
    N, w = len(ids), logits.element_size()
    targets = Targets(ids, mask)
    statistics = logprob.logprob_fwd(logits, targets, entropy)
    dlogp = torch.ones(N)
    dlogp[0] = 0
    dentropy = torch.zeros(N) if entropy else None
    dlogits = torch.empty(logits.shape, dtype=dtype)
    with counted() as traffic:
        logprob.logprob_bwd(dlogp, dentropy, logits, targets, statistics, dlogits)
    live = mask & (dlogp != 0)
    parts, n = schedules.schedule(V).parts, int(live.sum())
    size, visited = traffic.read(logits)
    documented = formulas.logprob_backward(N, n, V, w)
    assert size == documented.read
    assert_visits(visited, visits(live, logits.shape, 1))
    vectors = N * FLAG + N * (3 if entropy else 1) * FLOAT + n * (ID + 3 * FLOAT)
    assert traffic.total(traffic.loads) == size + parts * vectors
    written, visited = traffic.written(dlogits)
    assert written == traffic.total(traffic.stores)
    assert documented.written <= written <= documented.written + documented.rewritten
    assert_visits(visited, written_visits(live, ids, logits.shape))


@by_dtype
@by_size
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_grpo(V, dtype, entropy, inplace):
    logits, ids, mask = batch(V, dtype)
    N, live, w = len(ids), int(mask.sum()), logits.element_size()
    old, ref = torch.randn(N), torch.randn(N)
    advantages, weight = torch.ones(N), torch.ones(N)
    weight[0] = 0  # c = e = 0
    dlogits = logits if inplace else torch.empty(logits.shape, dtype=dtype)
    objective = Objective(beta=0.1, entropy_coef=0.1 if entropy else 0.0)
    with counted() as traffic:
        tokens = Tokens(weight, advantages, old, ref)
        given = (logits, Targets(ids, mask), tokens, Rewards(), entropy, objective, dlogits)
        grpo.grpo_fwd_bwd(*given)
    parts = schedules.reading(V, w, together=True).parts
    moving = mask & (weight != 0)
    size, visited = traffic.read(logits)
    expected = visits(mask, logits.shape, 1) + visits(moving, logits.shape, 1)
    expected.view(N, V)[mask, ids[mask]] += parts
    documented = formulas.grpo(N, live, int(moving.sum()), V, w, parts)
    assert size == documented.read + documented.reread
    assert_visits(visited, expected)
    written, visited = traffic.written(dlogits)
    assert documented.written <= written <= documented.written + documented.rewritten
    assert_visits(visited, written_visits(moving, ids, logits.shape))
    met = meeting(V, live, w, together=True)
    # Per row: weight, advantage, old and reference log-prob; loss, log-prob, KL (and entropy), clip flags.
    vectors = parts * (N * (FLAG + ID) + live * 4 * FLOAT)
    assert traffic.total(traffic.loads) == size + vectors + met
    outputs = N * (4 if entropy else 3) * FLOAT + N
    assert traffic.total(traffic.stores) == written + outputs + met


@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("V", [1000, 5000])
def test_grpo_on_chip_reads_a_row_once(V, coef):
    logits, ids, mask = batch(V, torch.float16)
    N, live, w = len(ids), int(mask.sum()), 2
    old, ref, advantages, weight = (torch.ones(N) for _ in range(4))
    weight[0] = 0  # c = e = 0
    objective = Objective(beta=0.1, entropy_coef=coef)
    with counted() as traffic:
        tokens = Tokens(weight, advantages, old, ref)
        given = (logits, Targets(ids, mask), tokens, Rewards(), coef > 0, objective, logits)
        on_chip.grpo_fwd_bwd(*given)
    moving = mask & (weight != 0)
    expected = visits(mask, logits.shape, 1)
    expected.view(N, V)[mask, ids[mask]] += 1
    size, visited = traffic.read(logits)
    assert size == live * (V + 1) * w
    assert_visits(visited, expected)
    written, visited = traffic.written(logits)
    documented = formulas.grpo(N, live, int(moving.sum()), V, w)
    assert written == documented.written + documented.rewritten
    assert_visits(visited, written_visits(moving, ids, logits.shape))


@by_size
def test_grpo_with_rewards_reads_the_group_per_token(V):
    logits, ids, mask = batch(V, torch.float32)
    N, live, G = len(ids), int(mask.sum()), 2
    rewards = torch.tensor([0.0, 1.0])
    with counted() as traffic:
        given = (logits, Targets(ids, mask), Tokens(torch.ones(N)), Rewards(rewards, G))
        grpo.grpo_fwd_bwd(*given, False, Objective(), logits)
    assert traffic.read(rewards)[0] == live * (3 * G + 1) * FLOAT


@by_dtype
@by_size
def test_scale_rows(V, dtype):
    x, ids, _ = batch(V, dtype)
    N, w = len(ids), x.element_size()
    parts = schedules.schedule(V).parts
    one = torch.ones(()).expand(N)
    with counted() as traffic:
        scaling.scale_rows(one, x)
    assert traffic.total(traffic.loads) == N * parts * FLOAT
    assert traffic.total(traffic.stores) == 0
    factor = torch.ones(N)
    factor[[0, 5]] = 0.5
    with counted() as traffic:
        scaling.scale_rows(factor, x)
    size, visited = traffic.read(x)
    assert size == 2 * V * w
    assert_visits(visited, visits(factor != 1, x.shape, 1))
    assert traffic.total(traffic.loads) == size + N * parts * FLOAT
    assert traffic.total(traffic.stores) == traffic.written(x)[0] == size


def token_vectors(N):
    mask = torch.ones(N, dtype=torch.bool)
    mask[::3] = False
    return mask, int(mask.sum()), [torch.rand(N) for _ in range(7)]


@pytest.mark.parametrize("N", [5, 1024, 2500])
def test_policy_loss(N):
    mask, live, (logp, weight, advantages, old, ref, importance, _) = token_vectors(N)
    with counted() as traffic:
        tokens = Tokens(weight, advantages, old, ref)
        policy_loss.policy_loss_fwd(logp, mask | True, tokens, Objective(beta=0.1))
    documented = formulas.policy_loss(N)
    assert traffic.total(traffic.loads) == documented.read
    assert traffic.total(traffic.stores) == documented.written
    with counted() as traffic:
        tokens = Tokens(weight, advantages, old, ref, importance)
        policy_loss.policy_loss_fwd(logp, mask, tokens, Objective(beta=0.1))
    assert traffic.read(mask)[0] == N * FLAG
    for x in (logp, weight, advantages, old, ref, importance):
        assert_visits(traffic.read(x)[1], mask.long())
    assert traffic.total(traffic.loads) == N * FLAG + live * 6 * FLOAT
    assert traffic.total(traffic.stores) == N * (3 * FLOAT + 1)


@pytest.mark.parametrize("T", [7, 600, 1300])
def test_sequence_loss(T):
    N = 2 * T
    logp, weight, advantages, old, ref = (torch.rand(N) for _ in range(5))
    mask = torch.ones(N, dtype=torch.bool)
    objective = Objective.preset("gspo", beta=0.1)
    with counted() as traffic:
        tokens, sequences = Tokens(weight, advantages, old, ref), Sequences(T_len=T)
        sequence_loss.sequence_loss_fwd(logp, mask, tokens, sequences, objective)
    documented = formulas.sequence_loss(N)
    assert traffic.total(traffic.loads) == documented.read + documented.reread
    assert traffic.total(traffic.stores) == documented.written


@pytest.mark.parametrize("N", [5, 1024, 2500, 70_000])
def test_token_statistics(N):
    mask, live, (loss, logp, old, importance, kl, entropy, _) = token_vectors(N)
    clip = torch.ones(N, dtype=torch.int8)
    with counted() as traffic:
        outputs = Outputs(loss, logp, entropy, kl, clip)
        policy_loss.token_statistics_fwd(outputs, mask, None, old, importance)
    for x in (loss, logp, old, importance, kl, entropy, clip):
        assert_visits(traffic.read(x)[1], mask.long())
    programs = -(-N // policy_loss.BLOCK)
    partial = programs * policy_loss.NUM_STATISTICS * FLOAT
    counter = programs * FLOAT if programs > 1 else 0
    inputs = N * FLAG + live * (6 * FLOAT + 1)
    assert traffic.total(traffic.loads) == inputs + partial + counter
    outputs = (policy_loss.NUM_STATISTICS + policy_loss.NUM_METRICS + 1) * FLOAT
    assert traffic.total(traffic.stores) == outputs + partial + counter


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sequence_sum"])
@pytest.mark.parametrize("T", [7, 2500])
def test_reduction_weights(T, reduction):
    mask, live, (token_weights, *_) = token_vectors(2 * T)
    with counted() as traffic:
        weighing = Weighing(mask, None, token_weights, loss_scale=1.0)
        reduction_weights.reduction_weights_fwd(mask.view(2, T), weighing, reduction, 0, False)
    N, BLOCK = 2 * T, reduction_weights.BLOCK
    assert_visits(traffic.read(token_weights)[1], mask.long())
    blocks = {"sequence_mean": -(-T // BLOCK), "token_mean": -(-N // BLOCK), "sequence_sum": 0}
    assert traffic.read(mask)[0] == N * (1 + blocks[reduction]) * FLAG
    assert traffic.total(traffic.loads) == traffic.read(mask)[0] + live * FLOAT
    assert traffic.total(traffic.stores) == N * FLOAT


def test_reduction_weights_of_packed_sequences():
    """Each token is written once: of two programs on a GPU nobody knows which comes last."""
    mask, *_ = token_vectors(2500)
    boundaries = torch.tensor([0, 0, 7, 2200, 2500], dtype=torch.int32)
    with counted() as traffic:
        weighing = Weighing(mask, boundaries=boundaries, loss_scale=1.0)
        reduction_weights.reduction_weights_fwd(mask, weighing, "sequence_mean", 0, False)
    assert traffic.read(mask)[0] == 2 * 2500 * FLAG
    assert traffic.total(traffic.stores) == 2500 * (FLOAT + ID)


@pytest.mark.parametrize(
    "scale, labels, per_sequence",
    [
        ("group", False, lambda B, G: 3 * G + 1),
        ("none", False, lambda B, G: 3 * G + 1),
        ("batch", False, lambda B, G: 3 * G + 3 * B + 1),
        ("group", True, lambda B, G: 3 * B + 1),
    ],
)
@pytest.mark.parametrize("B, G", [(12, 4), (24, 12)], ids=["one block", "several"])
def test_group_advantage(B, G, scale, labels, per_sequence, monkeypatch):
    monkeypatch.setattr(group_advantage, "MAX_BLOCK", 8)
    rewards = torch.randn(B)
    ids = torch.arange(B) // G if labels else None
    with counted() as traffic:
        grouping, how = Grouping(G, ids), Standardization(scale, 1e-4)
        advantages = group_advantage.group_advantage_fwd(rewards, grouping, how)
    assert traffic.read(rewards)[0] == B * per_sequence(B, G) * FLOAT
    if labels:
        assert traffic.read(ids)[0] == B * per_sequence(B, G) * ID
    assert traffic.total(traffic.stores) == traffic.written(advantages)[0]
    assert traffic.written(advantages)[0] == formulas.group_advantage(B).written


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_combine_rewards(labels, normalize):
    B, K, G = 12, 3, 4
    rewards, weights = torch.randn(B, K), torch.ones(K, dtype=torch.float64)
    ids = torch.arange(B) // G if labels else None
    with counted() as traffic:
        given = (rewards, weights, Grouping(G, ids), normalize, Standardization("group", 1e-4))
        combined = group_advantage.combine_rewards_fwd(*given)
    members = 3 * (B if labels else G) if normalize else 0
    assert traffic.read(rewards)[0] == B * K * (members + 1) * FLOAT
    assert traffic.read(weights)[0] == B * K * 2 * FLOAT
    if labels:
        assert traffic.read(ids)[0] == (B * K * (members + 1) * ID if normalize else 0)
    assert traffic.total(traffic.stores) == traffic.written(combined)[0] == B * 2 * FLOAT


@by_size
def test_capped_rows_move_the_same_bytes(V):
    """A soft cap is arithmetic on what is loaded; gradients of unrounded logits are half their size."""
    logits, ids, _ = batch(V, torch.float32)
    N = len(ids)
    dlogits = torch.empty(logits.shape, dtype=torch.float16)
    ones = torch.ones(N)
    with counted() as traffic:
        given = (logits, Targets(ids), Tokens(ones, ones), Rewards(), False, Objective())
        grpo.grpo_fwd_bwd(*given, dlogits, SoftCap(5.0, 0.5))
    parts = schedules.reading(V, FLOAT, capped=True, together=True).parts
    assert traffic.read(logits)[0] == (2 * N * V + parts * N) * FLOAT
    assert traffic.written(dlogits)[0] == (N * V + N) * 2


@pytest.mark.parametrize("n", [5, 4096, 10_000])
def test_scale_of_the_linear_head(n):
    x, y = torch.randn(n), torch.empty(n, dtype=torch.float16)
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    programs = -(-n // scaling.ELEMENTS)
    with counted() as traffic:
        scaling.scale(x, one, x)
    assert traffic.total(traffic.loads) == programs * FLOAT
    assert traffic.total(traffic.stores) == 0
    for out, width in ((x, FLOAT), (y, 2)):
        with counted() as traffic:
            scaling.scale(x, two, out)
        assert traffic.total(traffic.loads) == n * FLOAT + programs * FLOAT
        assert traffic.total(traffic.stores) == traffic.written(out)[0] == n * width


@pytest.mark.parametrize("D", [7, 3000])
def test_move_rows(D):
    """Of hidden states only what is live is read; all of the chunk is written."""
    stage, hidden = torch.randn(5, D), torch.randn(9, D)
    dhidden, h, rows = hidden.half(), hidden[:5].clone(), torch.tensor([3, 0, 8, 1])
    live = torch.tensor([True, False, True, True])
    with counted() as traffic:
        outgoing, incoming = (
            Outgoing(stage, dhidden, rows[:3], 3),
            Incoming(hidden, rows, live, 4, h),
        )
        chunks.move_rows(outgoing, incoming)
    blocks = -(-D // chunks.BLOCK)
    assert traffic.read(stage)[0] == 3 * D * FLOAT
    assert traffic.read(hidden)[0] == 3 * D * FLOAT
    assert traffic.read(rows)[0] == blocks * (3 + 3) * ID
    assert traffic.read(live)[0] == blocks * 4 * FLAG
    assert traffic.total(traffic.loads) == (6 * D) * FLOAT + blocks * (6 * ID + 4 * FLAG)
    assert traffic.total(traffic.stores) == 3 * D * 2 + 5 * D * FLOAT


@pytest.mark.parametrize("D", [7, 2048, 3000])
def test_weigh_rows(D):
    x, c = torch.randn(5, D), torch.tensor([1.0, 0.0, 2.0, -1.0, 0.0])
    y = torch.empty_like(x)
    with counted() as traffic:
        scaling.weigh_rows(x, c, y)
    blocks = -(-D // scaling.COLUMNS)
    size, visited = traffic.read(x)
    assert size == 3 * D * FLOAT
    assert_visits(visited, (c != 0).long()[:, None].expand(5, D))
    assert traffic.total(traffic.loads) == size + 5 * blocks * FLOAT
    assert traffic.total(traffic.stores) == traffic.written(y)[0] == 5 * D * FLOAT
