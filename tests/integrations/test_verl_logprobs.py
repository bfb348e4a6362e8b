"""verl's fused head with a vocabulary that ranks share, by the convention of verl's own kernel."""

import pytest
import torch

from grpo_fast.integrations import verl
from tests.support.ranks import needs_gloo, run

N, D, V = 7, 8, 26


def check_ranks():
    """Labels of the whole vocabulary, a shard of the weight each; dhidden is summed outside, as verl's is."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    hidden, weight = torch.randn(1, N, D), torch.randn(V, D)
    labels = torch.randint(V, (1, N))
    upstream = torch.randn(2, N).unbind()
    mine = slice(rank * V // ranks, (rank + 1) * V // ranks)

    whole = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = (whole[0] @ whole[1].T / 0.7).log_softmax(-1)
    want = logp.gather(-1, labels[..., None]).flatten(), -(logp.exp() * logp).sum(-1).flatten()
    dhidden, dweight = torch.autograd.grad(want, whole, [u.double() for u in upstream])

    leaves = hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()
    got = verl.linear_cross_entropy(*leaves, labels, 0.7, "none", group)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == (N,)
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(got, leaves, upstream)
    assert ours[0].shape == hidden.shape
    total = ours[0].clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, dhidden.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], dweight[mine].float(), rtol=1e-5, atol=1e-5)
    mean, _ = verl.linear_cross_entropy(*leaves, labels, 0.7, "mean", group)
    torch.testing.assert_close(mean, want[0].mean().float())

    alone = dist.new_group([rank], use_local_synchronization=True)  # Megatron's with one rank
    same, _ = verl.linear_cross_entropy(hidden, weight, labels, 0.7, "none", alone)
    torch.testing.assert_close(same, got[0].detach(), rtol=1e-5, atol=1e-6)


@needs_gloo
def test_ranks_share_the_vocabulary():
    run("tests.integrations.test_verl_logprobs:check_ranks", 2)


def test_a_group_that_is_none():
    x = torch.zeros(2, 4)
    with pytest.raises(TypeError, match="dist_process_group: want a ProcessGroup, got 'world'"):
        verl.linear_cross_entropy(x, x, torch.zeros(2, dtype=torch.long), 1.0, "none", "world")
