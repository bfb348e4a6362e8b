"""Time a step of TRL's GRPO trainer, generation apart: forward, loss, backward of one micro-batch.

`eager` is TRL's trainer on plain logits (its log-probs come from `model(...).logits`). `trl` is
TRL's trainer as it is. `grpo_fast` is the one of `grpo_fast.integrations.trl`, with a row for each
completion. They differ in the head and the loss. `grpo_fast-shared` shares prompts, too: it takes
part in the variant where all completions have one prompt, and a long one. The model is a Qwen2 with
random weights: in bfloat16 and checkpointed on a GPU; on a CPU it is small, and its vocabulary is
not. No bytes are counted: much of a step is the model's.
"""

import copy
import dataclasses
import functools
import itertools
import tempfile
from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.inputs import shapes
from benchmarks.measuring import gate, measure, memory
from grpo_fast.testing import assert_as_accurate

PROVIDERS = ("eager", "trl", "grpo_fast", "grpo_fast-shared")
ONE_PROMPT = "one-prompt"
VARIANTS = ("on-policy", "off-policy-kl", ONE_PROMPT)
PROMPT, LONG_PROMPT = 16, 512  # tokens
ROUNDS = 7
CHECKED_TOKENS = 128  # of a completion that is held against the truth
CHECKED_ROWS = 4096  # of the head
# Tokens at a time: a metric without a gradient needs no second copy of the logits.
ENTROPY_ROWS = 256


class Model(NamedTuple):
    """A Qwen2's shape, and that of the micro-batch it takes a step with."""

    V: int
    D: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    B: int
    T: int  # of the completions


MODELS = {
    "cpu": {"small-model": Model(32_000, 128, 2, 2, 2, 512, B=4, T=128)},
    "cuda": {
        "qwen2.5-0.5b": Model(151_936, 896, 24, 14, 2, 4864, B=8, T=1024),
        "qwen2.5-7b": Model(152_064, 3584, 28, 28, 4, 18_944, B=4, T=1024),
    },
}
# What a trainer has on the device, and what its results are held against: float64 logits of a 7B
# model, or its weights, fit no GPU.
DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.bfloat16, torch.float32)}


CASES = [
    measure.Case("trl_step", *where)
    for where in itertools.product(MODELS[shapes.device().type], VARIANTS, PROVIDERS)
    if where[1] == ONE_PROMPT or where[2] != "grpo_fast-shared"
]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_step(benchmark: Any, case: measure.Case) -> None:
    memory.release()  # a trainer is in cycles with its callbacks
    device = shapes.device()
    model, (dtype, exact) = MODELS[device.type][case.shape], DTYPES[device.type]
    try:
        trainer = _trainer(case.provider, case.variant, model, dtype)
        checked = _inputs(model._replace(T=CHECKED_TOKENS), case.variant)
        errors = _check(trainer, checked, case.provider, exact)
        inputs = _inputs(model, case.variant)
        discard = functools.partial(_discard, trainer)
        extra = memory.peak_extra_bytes(functools.partial(discard, inputs))
        benchmark.extra_info |= {
            **dataclasses.asdict(case),
            "sizes": {key: getattr(model, key) for key in ("B", "T", "V", "D", "layers")},
            "dtype": str(dtype).removeprefix("torch."),
            "live_tokens": int(inputs["completion_mask"].sum()),
            **{"bytes": 0, "flops": 0, "roof": None},
            "errors": errors,
        }
        measure.take(benchmark, discard, lambda: inputs, extra, (ROUNDS, 1))
        measure.record(benchmark)
    except ImportError as reason:
        measure.absent("trl_step", case.provider, str(reason))
    except torch.OutOfMemoryError:
        measure.absent("trl_step", f"{case.provider} {case.shape} {case.variant}", "out of memory")


def _step(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Take one step; return the loss and the gradient of the head."""
    model = trainer.model
    model.zero_grad(set_to_none=True)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    loss = trainer._compute_loss(model, dict(inputs))
    loss.backward()
    return loss.detach(), model.get_output_embeddings().weight.grad


def _discard(trainer: Any, inputs: dict[str, Tensor]) -> None:
    """Take a step and drop its gradients, as an optimiser would."""
    _step(trainer, inputs)
    trainer.model.zero_grad(set_to_none=True)


def _check(
    trainer: Any, inputs: dict[str, Tensor], provider: str, exact: torch.dtype
) -> dict[str, float]:
    """Hold loss and head gradient against plain logits in `exact`, as near as the model's dtype is.

    Returns:
        The errors, in units of the largest true entry; of the loss, of the mean size of an
            advantage.
    """
    rows = _some_rows(inputs, trainer.model.config.vocab_size)
    loss, gradient = _step(trainer, inputs)
    got = loss, gradient[rows]
    del gradient
    trainer.model.zero_grad(set_to_none=True)
    baseline, truth = (
        _plain_step(trainer, inputs, dtype, rows) for dtype in (trainer.model.dtype, exact)
    )
    size = inputs["advantages"].abs().mean()
    # A single number may be right by luck: plain PyTorch's error in the loss is no yardstick in
    # bfloat16.
    floor = max(1e-5, torch.finfo(trainer.model.dtype).eps)
    errors = {}
    try:
        for name, *results in zip(("loss", "gradient"), got, baseline, truth, strict=True):
            a, b, t = (gate.with_scale(x, size) for x in results)
            assert_as_accurate(a, b, t, gate.factor_of(provider), floor, name=name)
            errors[name] = gate.relative_error(a, t)
    except AssertionError as error:
        measure.note("trl_step", provider, f"wrong result: {str(error).splitlines()[0]}")
        raise
    return errors


def _some_rows(inputs: dict[str, Tensor], V: int) -> Tensor:
    """Choose rows of the head: the scored ones, where the gradient is largest, and some of all."""
    ids = inputs["completion_ids"].flatten()
    spread = torch.linspace(0, V - 1, min(V, CHECKED_ROWS), device=ids.device).long()
    return torch.cat([spread, ids]).unique()


def _plain_step(
    trainer: Any, inputs: dict[str, Tensor], dtype: torch.dtype, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute loss and some rows of the head's gradient with TRL on plain logits in `dtype`."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    memory.release()
    other = copy.copy(trainer)
    other.model = copy.deepcopy(trainer.model).to(dtype).requires_grad_(False)
    # TRL's is of its own model. The class's instead, not a bound one: a cycle would keep the copy.
    vars(other.model).pop("forward", None)
    head = other.model.get_output_embeddings().weight.requires_grad_()
    other._get_per_token_logps_and_entropies = _plain_log_probs(trainer.temperature)
    other._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    if dtype == torch.float64:
        inputs = gate.in_dtype(inputs, dtype)
    loss = GRPOTrainer._compute_loss(other, other.model, inputs)
    (grad,) = torch.autograd.grad(loss, head)
    return loss.detach(), grad[rows]


def _plain_log_probs(temperature: float) -> Any:
    """Make TRL's hook for log-probs from logits, as lean as `eager` is elsewhere."""

    def function(
        model: Any, ids: Tensor, mask: Tensor, T: int, **_: Any
    ) -> tuple[Tensor, Tensor, None]:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        logits = out.logits[:, -T - 1 : -1]
        if temperature != 1:
            logits = logits / temperature
        # Log-probs of float64 logits, the truth, stay float64.
        wider = torch.promote_types(logits.dtype, torch.float32)
        logps = logits.log_softmax(-1, dtype=wider)
        with torch.no_grad():
            parts = logps.flatten(0, 1).split(ENTROPY_ROWS)
            entropy = torch.cat([-(x.exp() * x).sum(-1) for x in parts]).view(logps.shape[:-1])
        return logps.gather(-1, ids[:, -T:, None]).squeeze(-1), entropy, None

    return function


def _trainer(provider: str, variant: str, shape: Model, dtype: torch.dtype) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    # Not from `trl` itself, which makes a RuntimeError of what a module of its own cannot import.
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer as Stock

    from grpo_fast.integrations.trl import GRPOTrainer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.V,
        hidden_size=shape.D,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype=dtype,
    )
    device = shapes.device()
    with device:
        model: Any = Qwen2ForCausalLM(config)
    model = model.to(dtype)
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        num_generations=4,
        report_to="none",
        bf16=False,  # no autocast: the model has the dtype
        gradient_checkpointing=device.type == "cuda",
    )
    own = provider.startswith("grpo_fast")
    shared = {"share_prompts": "auto" if provider == "grpo_fast-shared" else "off"} if own else {}
    trainer: Any = (GRPOTrainer if own else Stock)(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
        **shared,
    )
    trainer.current_gradient_accumulation_steps = 1
    if variant == "off-policy-kl":  # the log-probs are given: TRL would load a reference model
        trainer.args.beta = trainer.beta = 0.04
    if provider == "eager":
        trainer._get_per_token_logps_and_entropies = _plain_log_probs(trainer.temperature)
    trainer.model.train()
    if device.type == "cuda":  # the trainer does it when training starts
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    return trainer


def _inputs(shape: Model, variant: str) -> dict[str, Tensor]:
    """Make completions that end at random places, the first at its last token."""
    generator = torch.Generator().manual_seed(0)
    B, T, P = shape.B, shape.T, LONG_PROMPT if variant == ONE_PROMPT else PROMPT
    ids = torch.randint(2, shape.V, (B, P + T), generator=generator)
    if variant == ONE_PROMPT:
        ids[:, :P] = ids[0, :P].clone()
    lengths = torch.randint(T // 3, T + 1, (B,), generator=generator)
    lengths[0] = T
    mask = (torch.arange(T) < lengths[:, None]).long()
    inputs = {
        "prompt_ids": ids[:, :P],
        "prompt_mask": torch.ones(B, P, dtype=torch.long),
        "completion_ids": ids[:, P:],
        "completion_mask": mask,
        "advantages": torch.randn(B, generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    if variant == "off-policy-kl":
        near = -torch.tensor(float(shape.V)).log()  # a random model is nearly uniform
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            inputs[name] = near + 0.1 * torch.randn(B, T, generator=generator)
    return {name: x.to(shapes.device()) for name, x in inputs.items()}
