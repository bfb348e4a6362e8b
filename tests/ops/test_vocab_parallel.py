"""A head whose vocabulary is spread over processes, against one process with the whole vocabulary."""

from types import SimpleNamespace

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob
from grpo_fast.ops.head.vocab_parallel import Shard, combine, read_shared_rows
from grpo_fast.records import Targets
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import in_double
from tests.support.heads import HEADS, call, graded
from tests.support.hidden_cases import batch
from tests.support.objectives import OBJECTIVES
from tests.support.ranks import join, needs_gloo, needs_interpreter, run_each

V = 101
OFF_POLICY = (
    *("default", "k3_unbiased", "entropy", "dppo_tv", "dro", "gspo", "gspo, unbiased KL"),
    *("gmpo", "vespo", "off-policy mask", "top entropy", "top entropy, gspo", "topr"),
)
ON_POLICY = ("default", "gspo", "vespo", "sapo of sequences", "gspo, unbiased KL")


def cases():
    """(name, head, objective, arguments of the call)."""
    for name, head in HEADS.items():
        yield f"head: {name}", head, Objective(beta=0.1, entropy_coef=0.05), {"chunk_size": 5}
    for name in OFF_POLICY:
        yield name, HEADS["everything"], OBJECTIVES[name], {"temperature": 0.8}
    for name in ON_POLICY:
        yield f"on policy: {name}", HEADS["bias"], OBJECTIVES[name], {"old_logps": None}
    temperature = torch.linspace(0.5, 1.5, 20).view(4, 5)
    given = {"temperature": temperature, "chunk_size": 7}
    yield "a temperature per token", HEADS["bias"], OBJECTIVES["entropy"], given
    for name in ("gspo", "gmpo"):  # two phases: no chunk holds a sequence
        yield f"{name}, short chunks", HEADS["plain"], OBJECTIVES[name], {"chunk_size": 3}
    for name in ("default", "gspo"):
        yield f"all rows: {name}", HEADS["plain"], OBJECTIVES[name], {"compact": False}
        yield f"frozen: {name}", HEADS["bias"], OBJECTIVES[name], {"frozen": ("weight", "bias")}


def bounds(ranks, vocab_size, uneven):
    """Rows of each process: even with the last one padded, or as they come, one of them all padding."""
    if not uneven:
        share = -(-V // ranks)
        return [share] * ranks
    first = 60
    rest = [17, 19][: ranks - 2]
    return (
        [first, *rest, V - first - sum(rest)] if vocab_size == V else [vocab_size, V - vocab_size]
    )


def split(tensors, sizes, rank):
    """This process's part of a head; rows beyond the whole vocabulary hold something else."""
    start, n = sum(sizes[:rank]), sizes[rank]
    mine = dict(tensors)
    for name in ("weight", "bias", "B"):
        if name in tensors:
            x = tensors[name]
            part = torch.full((n, *x.shape[1:]), 7.0)
            there = x[start : start + n]
            part[: len(there)] = there
            mine[name] = part
    return mine, slice(start, min(start + n, V)), n


def gradients(fn, tensors, options, ids, upstream, frozen=(), **arguments):
    leaves = graded(tensors, frozen=frozen)
    out = call(fn, leaves, options, ids, **arguments)
    if upstream is None:
        loss = getattr(out, "loss", out)
    else:
        loss = sum((u * x).sum() for u, x in zip(upstream, out, strict=True))
    wanted = {k: x for k, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    return out, dict(zip(wanted, grads, strict=True))


def close(a, b, name, tolerance=1e-6):
    """1e-6 of the norm: the sums are of another order. A loss is of the size of its terms, which cancel."""
    assert a.shape == b.shape, name
    if b.numel():
        error = (a - b).norm() / b.norm().clamp(min=0.1 if b.ndim else 1.0)
        assert error <= tolerance, (name, error)


def check_ranks(uneven, step=1):
    """Run every `step`-th case in one of the processes."""
    import torch.distributed as dist

    join()
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    for name, head, objective, given in list(cases())[::step]:
        torch.manual_seed(0)
        tensors, options, ids, arguments = batch(4, 5, V, "cpu", head)
        arguments |= {"objective": objective, **given}
        frozen = arguments.pop("frozen", ())
        vocab_size = options.get("vocab_size", V)
        sizes = bounds(ranks, vocab_size if ranks == 2 else V, uneven)
        mine, rows, n = split(tensors, sizes, rank)
        local = {"vocab_size": vocab_size} | options
        want = gradients(linear_grpo_loss, tensors, options, ids, None, frozen, **arguments)
        got = gradients(
            linear_grpo_loss, mine, local, ids, None, frozen, tp_group=group, **arguments
        )
        compare(name, want, got, rows, n, arguments["mask"])
        with torch.no_grad():
            values = call(linear_grpo_loss, mine, local, ids, tp_group=group, **arguments)
        close(values.loss, want[0].loss, name)
        upstream = torch.randn(2, 4, 5)
        same = {
            **{k: arguments[k] for k in ("mask", "temperature", "chunk_size") if k in arguments},
            "return_entropy": True,
        }
        there = arguments["mask"] & (torch.rand(ids.shape) < 0.5)
        ids[there] = sizes[0] % vocab_size  # some where a shard starts
        want = gradients(linear_logprob, tensors, options, ids, upstream, frozen, **same)
        got = gradients(linear_logprob, mine, local, ids, upstream, frozen, tp_group=group, **same)
        compare(f"log-probs, {name}", want, got, rows, n, arguments["mask"])
    check_saturated(group, rank, ranks)


def check_saturated(group, rank, ranks):
    """Tokens ahead of all others by dozens of nats, in any shard: as near to float64 as plain PyTorch."""
    torch.manual_seed(1)
    tensors, options, ids, arguments = batch(3, 5, V, "cpu")
    lead = tensors["weight"][ids.clamp(min=0)]
    tensors["hidden"] += 40 * lead / lead.square().sum(-1, keepdim=True)
    arguments |= {"advantages": torch.ones(3), "objective": Objective(beta=0.1, entropy_coef=0.1)}
    mine, rows, _ = split(tensors, bounds(ranks, V, uneven=False), rank)
    _, actual = gradients(
        linear_grpo_loss, mine, {"vocab_size": V}, ids, None, tp_group=group, **arguments
    )
    doubled = {k: x.double() for k, x in tensors.items()}
    plain = gradients(reference.linear_grpo, tensors, options, ids, None, **arguments)[1]
    truth = gradients(reference.linear_grpo, doubled, options, ids, None, **in_double(arguments))[1]
    assert truth["hidden"].nan_to_num().abs().max() > 0
    whole = actual["hidden"], plain["hidden"], truth["hidden"]
    assert_as_accurate(*whole, name="dhidden")
    n = rows.stop - rows.start
    part = actual["weight"][:n], plain["weight"][rows], truth["weight"][rows]
    assert_as_accurate(*part, name="dweight")


def compare(name, want, got, rows, n, mask):
    (out, grads), (out_mine, grads_mine) = want, got
    if hasattr(out, "loss"):
        close(out_mine.loss, out.loss, name)
        for metric, x in out.metrics.items():
            torch.testing.assert_close(
                out_mine.metrics[metric], x, rtol=1e-5, atol=1e-6, msg=f"{name}: {metric}"
            )
    else:
        for a, b in zip(out_mine, out, strict=True):
            close(a[mask], b[mask], name)
    assert grads.keys() == grads_mine.keys()
    for key, x in grads.items():
        mine = grads_mine[key]
        if key in ("weight", "bias", "B"):
            there = rows.stop - rows.start
            assert mine[max(there, 0) :].eq(0).all(), (name, key)
            x, mine = x[rows], mine[: max(there, 0)]
        # Of an adapter the gradients are small matrices, sums over all else that cancel.
        close(mine, x, f"{name}: d{key}", 2e-6 if key in ("A", "B") else 1e-6)


def check_without_rows(sizes):
    """Shares of these sizes, in one of the processes."""
    import torch.distributed as dist

    join()
    group, rank, few = dist.group.WORLD, dist.get_rank(), sum(sizes)
    for head in (HEADS["plain"], {"bias": True, "lora": 0.7, "softcap": 4.0}):
        for name, frozen in (("entropy", ()), ("gspo", ()), ("default", ("weight", "bias"))):
            torch.manual_seed(0)
            tensors, options, ids, arguments = batch(4, 5, few, "cpu", head)
            arguments["objective"] = OBJECTIVES[name]
            mine, rows, n = split(tensors, sizes, rank)
            want = gradients(linear_grpo_loss, tensors, options, ids, None, frozen, **arguments)
            got = gradients(
                linear_grpo_loss, mine, options, ids, None, frozen, tp_group=group, **arguments
            )
            compare(name, want, got, rows, n, arguments["mask"])
            same = {"mask": arguments["mask"], "return_entropy": True}
            upstream = torch.randn(2, 4, 5)
            want = gradients(linear_logprob, tensors, options, ids, upstream, frozen, **same)
            same["tp_group"] = group
            got = gradients(linear_logprob, mine, options, ids, upstream, frozen, **same)
            compare(f"log-probs, {name}", want, got, rows, n, arguments["mask"])
    mine = torch.zeros(0, 8)
    with pytest.raises(ValueError, match=r"linear_logprob: weight: want .*, got \(0, 8\)"):
        linear_logprob(torch.zeros(3, 8), mine, torch.zeros(3).long(), tp_group=group)


def check(name, *arguments):
    """One check in one of the processes: those of a test take seconds to start."""
    checks = {"ranks": check_ranks, "without rows": check_without_rows}
    checks[name](*arguments)


CHECK = "tests.ops.test_vocab_parallel:check"
AGREE = [["ranks", False], ["ranks", True]]


@needs_gloo
def test_two_processes_agree_with_one():
    run_each(CHECK, 2, AGREE, seconds=300)


@needs_gloo
def test_four_processes_agree_with_one_and_without_rows():
    """Few rows in equal shares leave none for the last; no rows at all are refused by everyone."""
    few = [["without rows", [2, 2, 1, 0]], ["without rows", [0, 3, 0, 2]]]
    run_each(CHECK, 4, [*AGREE, *few], seconds=600)


@needs_gloo
@needs_interpreter
def test_processes_agree_with_one_and_without_rows_in_the_kernels():
    switches = {"TRITON_INTERPRET": "1", "GRPO_FAST_BACKEND": "triton"}
    cases = [["ranks", True, 3], ["without rows", [0, 5]]]
    run_each(CHECK, 2, cases, seconds=900, **switches)


def test_combine_keeps_what_little_a_confident_token_leaves():
    """The shard of the scored token holds all but e^-60; 1 - p and the entropy survive."""
    far = [[0.0, 1.0, 0.0, 0.0], [-60.0, 1.0, 0.0, 1.0]]
    gathered = torch.tensor(far)[:, None]
    logp, entropy, top, total = combine(gathered, torch.ones(1), True)
    rest = torch.tensor(-60.0).exp()
    torch.testing.assert_close(logp, -rest[None])
    torch.testing.assert_close(entropy, (rest * 61)[None], rtol=1e-5, atol=0)
    assert (top, total) == (0, 1)
    # And the other way round: the scored token is far below the rest, in a shard that vanishes.
    logp, _, _, _ = combine(
        torch.tensor([[0.0, 2.0, 0.0, 1.0], [-120.0, 1.0, 0.0, 0.0]])[:, None], torch.ones(1), False
    )
    torch.testing.assert_close(logp, -120 - torch.tensor([2.0]).log())


def test_combine_leaves_out_who_has_no_columns():
    """A process whose sum is 0 changes nothing, whatever it sends as its maximum."""
    both = torch.tensor([[-3.0, 2.0, 0.5, -0.25], [-5.0, 1.5, 0.1, 1.0]])[:, None]
    want = combine(both, torch.ones(1), True)
    for top in (-3.0e38, 0.0, 7.0):
        nobody = torch.tensor([[[top, 0.0, 0.0, 1.0]]])
        for parts in ((both, nobody), (nobody, both)):
            found = combine(torch.cat(parts), torch.ones(1), True)
            for a, b in zip(found, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_who_has_no_columns_sends_float32(monkeypatch):
    """All processes must send the same dtype, also where the logits are bfloat16."""
    monkeypatch.setattr(
        "grpo_fast.ops.head.vocab_parallel.gather", lambda all_of, mine, group: all_of.copy_(mine)
    )
    shard = Shard(SimpleNamespace(size=lambda: 1), 10)
    logits = torch.empty(1, 3, 0, dtype=torch.bfloat16)
    targets = Targets(torch.zeros(3, dtype=torch.int64), None, None, torch.tensor(1.0))
    found = read_shared_rows(logits, targets, True, None, shard)
    assert all(x.dtype == torch.float32 for x in found)
    assert found[0].isnan().all()


def test_whose_column_an_id_is():
    shard = Shard(None, 10)
    ids = torch.tensor([0, 9, 10, 11, 14, 15, -100])
    assert shard.local(ids, 5).tolist() == [-1, -1, 0, 1, 4, -1, -1]
