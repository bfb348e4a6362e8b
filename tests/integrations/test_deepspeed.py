"""DeepSpeed's ZeRO on two processes: `with_head` on its engine, and `GRPOTrainer` beside TRL's own trainer.

Both are also compared with one process.

DeepSpeed is no requirement of this project: where it is not installed, the test is skipped.
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="it is a subclass of TRL's trainer")
pytest.importorskip("peft", reason="some cases train an adapter")
if not importlib.util.find_spec("deepspeed"):
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of TRL and its libraries
    pytest.mark.usefixtures("torch_backend"),
]

from trl import GRPOTrainer as Stock  # noqa: E402

from grpo_fast import Objective, linear_grpo_loss  # noqa: E402
from grpo_fast.integrations.transformers import with_head  # noqa: E402
from grpo_fast.integrations.trl import GRPOTrainer, trainer  # noqa: E402
from grpo_fast.shared_prompt import passes  # noqa: E402
from tests.support import ranks  # noqa: E402
from tests.support.trl_training import assert_same_logs, train  # noqa: E402

PROMPTS = ["abcdefgh" * 3 + end for end in ("a", "bc", "dd", "eab")]
OPTIONS = {"beta": 0.04, "num_iterations": 2, "max_steps": 3, "max_grad_norm": 0.5}
OPTIONS["gradient_accumulation_steps"] = 2


def zero(stage):
    """DeepSpeed's configuration of a stage; no weight is too small to be sharded."""
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def completes(trainer):
    """Complete prompts by a rule, so that one process and two have the same completions."""

    def generate(prompt_ids, *_, **__):
        group = trainer.num_generations
        return [
            [3 + (sum(ids) + i % group * (t + 2)) % 7 for t in range(2 + i % group)]
            for i, ids in enumerate(prompt_ids)
        ], None

    trainer._generate_single_turn = generate


def options_of(lora):
    if not lora:
        return OPTIONS
    from peft import LoraConfig

    torch.manual_seed(3)  # of the adapter's weights
    return OPTIONS | {"peft_config": LoraConfig(r=4, lora_alpha=64)}


def zero_on_a_rank(path, output, stage, lora):
    import deepspeed
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import AutoTokenizer

    # Accelerate starts DeepSpeed on accelerators alone: here it is told that gloo is a backend for it.
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    fused, calls, routes = trainer.linear_grpo_loss, [], []
    trainer.linear_grpo_loss = lambda *a, **k: calls.append(1) or fused(*a, **k)
    for name, route in dict(passes.ROUTES).items():
        passes.ROUTES[name] = lambda *a, n=name, f=route, **k: routes.append(n) or f(*a, **k)

    def run(cls):
        kept = []

        def prepare(trainer):
            kept.append(trainer)
            completes(trainer)

        _, logs = train(
            cls,
            path,
            AutoTokenizer.from_pretrained(path),
            Path(output),
            prepare=prepare,
            given={"prompts": PROMPTS},
            use_cpu=False,
            deepspeed=zero(stage),
            per_device_train_batch_size=4,
            **options_of(lora),
        )
        model = kept[0].model
        shards = [x for x in model.parameters() if hasattr(x, "ds_id")]
        assert bool(shards) == (stage == 3)
        assert all(x.numel() == 0 for x in shards), "each process has whole weights"
        with deepspeed.zero.GatheredParameters(shards):
            return {k: x.detach().clone() for k, x in model.named_parameters()}, logs

    want, their_logs = run(Stock)
    assert not calls
    got, logs = run(GRPOTrainer)
    assert len(calls) == 2 * OPTIONS["max_steps"], "TRL's own code has run"
    assert {"packed", "mask"} & set(routes), "no prompt was shared"
    alone = torch.load(Path(output) / "alone.pt")
    assert got.keys() == want.keys() == alone.keys()
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(x, alone[name], rtol=0, atol=1e-6)
    assert_same_logs(logs, their_logs)


@ranks.needs_gloo
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_zero(lora, model_path, tokenizer, tmp_path, monkeypatch):
    """ZeRO-2 and ZeRO-3: the parameters of TRL's trainer under them, and of ours in one process."""
    given = {"prompts": PROMPTS}
    alone, _ = train(
        GRPOTrainer, model_path, tokenizer, tmp_path, completes, given=given, **options_of(lora)
    )
    torch.save(alone, tmp_path / "alone.pt")
    cases = [[model_path, str(tmp_path), stage, lora] for stage in (2, 3)]
    where = "tests.integrations.test_deepspeed:zero_on_a_rank"
    ranks.run_each(where, 2, cases, DS_ACCELERATOR="cpu")


B, T, SEQUENCES = (
    2,
    5,
    8,
)  # of a micro-batch, of a completion, of the two micro-batches of two processes


def loss_of(model, rows, scale):
    """The loss of some of the sequences, from hidden states."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 9, (SEQUENCES, 9), generator=draw)
    advantages = torch.randn(SEQUENCES, generator=draw)
    old = -2 * torch.rand(SEQUENCES, T, generator=draw)
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 4, 5, 2, 5, 3])[:, None]

    def loss(hidden, head):
        return linear_grpo_loss(
            hidden,
            head.weight,
            ids[rows, -T:],
            advantages=advantages[rows],
            mask=mask[rows],
            old_logps=old[rows],
            objective=Objective(reduction="sequence_mean"),
            loss_scale=scale,
            **head.options,
        ).loss

    return with_head(model, loss, ids[rows], torch.ones_like(ids[rows]), last=T)


def engine_on_a_rank(path, stage):
    """The scale is that of docs/scaling.md."""
    import deepspeed
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    alone = copy.deepcopy(model)
    sizes = {"train_micro_batch_size_per_gpu": B, "gradient_accumulation_steps": 2}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config=zero(stage) | sizes | {"gradient_clipping": 0.0},
    )
    undo = engine.gradient_accumulation_steps() * dist.get_world_size()
    for micro_batch in range(2):
        first = B * (2 * dist.get_rank() + micro_batch)
        rows = slice(first, first + B)
        engine.backward(loss_of(engine, rows, undo * B / SEQUENCES))
        engine.step()
    loss_of(alone, slice(None), 1.0).backward()
    shards = [x for x in model.parameters() if hasattr(x, "ds_id")]
    assert bool(shards) == (stage == 3)
    with deepspeed.zero.GatheredParameters(shards):
        for (name, got), x in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert x.grad.abs().max() > 1e-3, name
            torch.testing.assert_close(got, x - 0.1 * x.grad, rtol=0, atol=1e-6)


@ranks.needs_gloo
def test_an_engine(model_path):
    """ZeRO-1, 2 and 3: a step of two micro-batches is that of the whole batch in one process."""
    where = "tests.integrations.test_deepspeed:engine_on_a_rank"
    ranks.run_each(where, 2, [[model_path, stage] for stage in (1, 2, 3)], DS_ACCELERATOR="cpu")
