"""Heads that several processes share: each held against one process that has all of it."""

import importlib.util
import itertools

import pytest
import torch

from grpo_fast.integrations import transformers as adapter
from grpo_fast.integrations.transformers import check_head, head_of, hidden_states, with_head
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob
from tests.support import ranks
from tests.support.architectures import (
    T,
    batch,
    build,
    config_of,
    fused_loss,
    gradients,
    spread_out,
)

transformers = pytest.importorskip("transformers", reason="the models are Hugging Face's")


def train_on_a_rank(kind):
    """Wrapped, in two processes: loss and gradients are those of one process with the whole batch."""
    import torch.distributed as dist

    ranks.join()
    rank = dist.get_rank()
    torch.manual_seed(0)
    tied = kind.endswith("tied")
    config = config_of("Qwen2", {"tie_word_embeddings": tied})
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids, advantages = torch.randint(2, 61, (4, 9)), torch.randn(4)
    if kind.startswith("peft"):
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, init_lora_weights=False, modules_to_save=["lm_head"])
        )
    lm = adapter.causal_lm(model)

    def loss_of(model, rows):
        def loss(hidden, head):
            given = {"advantages": advantages[rows], **head.options}
            return linear_grpo_loss(hidden, head.weight, ids[rows, -3:], **given).loss

        return with_head(model, loss, ids[rows], last=3)

    loss_of(model, slice(0, 4)).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    mine = slice(2 * rank, 2 * rank + 2)
    if kind.startswith("fsdp1"):
        fsdp1_on_a_rank(kind, model, lambda model: loss_of(model, mine), want)
        return
    from torch.distributed.fsdp import fully_shard

    if kind == "compiled":
        lm.lm_head = torch.compile(lm.lm_head, backend="eager")
    for layer in lm.model.layers:
        fully_shard(layer)
    together = {"group": lm.model.norm, "group tied": lm.model.embed_tokens}.get(kind)
    fully_shard(lm.lm_head if together is None else [together, lm.lm_head])
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        loss_of(model, mine).backward()
        found = {
            name.replace("_orig_mod.", ""): p.grad.full_tensor()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        assert found.keys() == want.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-6, msg=name)
    if kind == "peft":
        with model.disable_adapter():
            check_head(model)
    check_head(model)
    with pytest.raises(ValueError, match=r"weight is sharded.*with with_head"):
        head_of(model)


def fsdp1_on_a_rank(kind, model, loss_of, want):
    """FSDP1 around the head and around the whole."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"device_id": torch.device("cpu"), "use_orig_params": "original" in kind}
    model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
    wrapped = FullyShardedDataParallel(model, **options)
    for _ in range(2):
        wrapped.zero_grad()
        loss_of(wrapped).backward()
        norm = sum(
            p.grad.double().square().sum() for p in wrapped.parameters() if p.grad is not None
        )
        dist.all_reduce(norm)
        exact = sum(grad.double().square().sum() for grad in want.values())
        torch.testing.assert_close(norm, exact, rtol=1e-5, atol=0)
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads="original" in kind):
        for name, p in wrapped.named_parameters():
            if "original" in kind:
                name = name.replace("_fsdp_wrapped_module.", "")
                torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6, msg=name)
    check_head(wrapped)


@ranks.needs_gloo
def test_a_unit_of_its_own_over_two_processes():
    kinds = ["compiled", "group", "group tied", "fsdp1", "fsdp1 original"]
    if importlib.util.find_spec("peft"):  # the trainable copy is PEFT's
        kinds.append("peft")
    function = "tests.integrations.test_transformers_sharded:train_on_a_rank"
    ranks.run_each(function, 2, [[kind] for kind in kinds])


def tensor_parallel_on_a_rank(path, V, tied, double):
    """transformers' plan: loss, log-probs and gradients of the model that is not spread."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    kind = torch.float64 if double else torch.float32
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=kind)
    assert isinstance(model.lm_head.weight, DTensor)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.manual_seed(0)
    ids, mask = torch.randint(2, V, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :2] = 0
    if double:
        with pytest.raises(TypeError, match="tp_group with float64"):
            fused_loss(model, ids, mask)
    else:
        groups = []

        def function(hidden, head):
            groups.append(head.tp_group)
            torch.testing.assert_close(
                linear_logprob(hidden[:, :-1], head.weight, ids[:, 1:], **head.options),
                head.logits(hidden)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0],
                rtol=1e-5,
                atol=1e-5,
            )
            return hidden.sum()

        with_head(model, function, ids, mask)
        assert groups[0].size() == 2
        loss, want = (fused_loss(x, ids, mask) for x in (model, plain))
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        assert_same_gradients(gradients(model, loss), gradients(plain, want))
        with torch.no_grad():
            torch.testing.assert_close(fused_loss(model, ids, mask), want.detach())

    def through_logits(model):
        upstream = torch.linspace(-1, 1, 3 * 9 * V, dtype=kind).view(3, 9, V)
        function = lambda hidden, head: (head.logits(hidden) * upstream).sum()  # noqa: E731
        return with_head(model, function, ids, mask)

    assert_same_gradients(*(gradients(x, through_logits(x)) for x in (model, plain)))
    check_head(model)
    head = head_of(model)
    assert head.tp_group is not None
    assert head.weight.shape[0] < V
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        mine = head.logits(hidden_states(model, ids, mask))
    torch.testing.assert_close(mine, logits, rtol=1e-5, atol=1e-5)
    dist.barrier()


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    for name, grad in want.items():
        mine = got[name].full_tensor() if hasattr(got[name], "full_tensor") else got[name]
        scale = max(grad.abs().max().item(), 1e-3)
        assert (mine - grad).abs().max() <= 2e-5 * scale, name


@ranks.needs_gloo
def test_tensor_parallelism_over_two_processes(tmp_path):
    """Shares of the vocabulary that are equal and not, tied and not, in single and double precision."""
    cases = []
    for V, tied in itertools.product((64, 61), (False, True)):
        config = config_of("Qwen2", {"tie_word_embeddings": tied, "vocab_size": V})
        model = transformers.AutoModelForCausalLM.from_config(config)
        spread_out(model)
        path = tmp_path / f"{V} {tied}"
        model.save_pretrained(path)
        cases += [[str(path), V, tied, double] for double in (False, True)]
    function = "tests.integrations.test_transformers_sharded:tensor_parallel_on_a_rank"
    ranks.run_each(function, 2, cases)


def parallelised_on_a_rank():
    """PyTorch's own `parallelize_module` on the head: refused, and the advice works."""
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(0)
    plain, model = (build("Qwen2") for _ in range(2))
    model.load_state_dict(plain.state_dict())
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    ids, mask = batch()
    with pytest.raises(TypeError, match=r"leave the head out of its plan.*tp_group=mesh.get_group"):
        fused_loss(model, ids, mask)
    hidden = hidden_states(model, ids, mask)[:, -T - 1 : -1]
    given = {"advantages": torch.tensor([1.0, -0.5, 2.0]), "mask": mask[:, -T:]}
    weight = model.lm_head.weight.to_local()
    out = linear_grpo_loss(hidden, weight, ids[:, -T:], tp_group=mesh.get_group(), **given)
    want = fused_loss(plain, ids, mask)
    assert_same_gradients(gradients(model, out.loss), gradients(plain, want))


def distributed_on_a_rank():
    """A weight that is spread for a reason nobody told: the error does not send the caller in circles."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = build("Qwen2")
    model.lm_head.weight = torch.nn.Parameter(
        distribute_tensor(model.lm_head.weight, mesh, [Shard(0)])
    )
    with pytest.raises(ValueError, match=r"no wrapper gathered it.*part of the unit of the whole"):
        fused_loss(model, *batch())


def spread_on_a_rank():
    ranks.join()
    parallelised_on_a_rank()
    distributed_on_a_rank()


@ranks.needs_gloo
def test_heads_that_pytorch_has_spread():
    ranks.run("tests.integrations.test_transformers_sharded:spread_on_a_rank", 2)
