"""A step of TRL's GRPO trainer, generation apart: forward, loss, backward of one micro-batch.

`eager` is TRL's trainer on plain logits (a subclass that takes its log-probs from `model(...).logits`),
`trl` is TRL's trainer as it is, `grpo_fast` the one of `grpo_fast.integrations.trl`. The model is small and
its vocabulary is not: what differs between the three is the head and the loss. No bytes are counted: much
of a step is the model's.
"""

import copy
import functools
import tempfile
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import measure, memory, shapes
from grpo_fast.testing import assert_as_accurate

PROVIDERS = ("eager", "trl", "grpo_fast")
SIZES = {
    "cpu": {"B": 4, "T": 128, "V": 32000, "D": 128},
    "cuda": {"B": 8, "T": 1024, "V": 151936, "D": 896},
}
LAYERS = {"cpu": 2, "cuda": 24}
PROMPT = 16
ROUNDS = 5


@pytest.mark.parametrize("variant", ["on-policy", "off-policy-kl"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_step(benchmark: Any, provider: str, variant: str) -> None:
    device = shapes.device()
    sizes = SIZES[device.type]
    try:
        trainer = _trainer(provider, variant, sizes, LAYERS[device.type])
    except ImportError as reason:
        measure._absent("trl_step", provider, str(reason))
    inputs = _inputs(sizes, device, variant)
    _check(trainer, inputs, provider)
    extra = memory.peak_extra_bytes(functools.partial(_step, trainer, inputs))
    benchmark.group = f"trl_step step {variant}"
    benchmark.extra_info |= {
        "stem": "trl_step",
        "case": "step",
        "provider": provider,
        "shape": "small-model",
        "variant": variant,
        "sizes": sizes,
        "dtype": "float32",
        "live_tokens": int(inputs["completion_mask"].sum()),
        "bytes": 0,
        "roof": "copy",
        "peak_extra_bytes": extra,
    }
    benchmark.pedantic(lambda: _discard(trainer, inputs), rounds=ROUNDS, warmup_rounds=1)


def _step(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the head)."""
    model = trainer.model
    model.zero_grad(set_to_none=True)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    loss = trainer._compute_loss(model, dict(inputs))
    loss.backward()
    return loss.detach(), model.get_output_embeddings().weight.grad


def _discard(trainer: Any, inputs: dict[str, Tensor]) -> None:
    _step(trainer, inputs)


def _check(trainer: Any, inputs: dict[str, Tensor], provider: str) -> None:
    """Loss and head gradient as near to plain logits in float64 as plain logits in float32 are."""
    got = _step(trainer, inputs)
    exact = copy.copy(trainer)
    plain = _plain_log_probs(trainer.temperature)
    results = []
    for dtype in (torch.float32, torch.float64):
        exact.model = copy.deepcopy(trainer.model).to(dtype)
        exact.model.forward = type(exact.model).forward.__get__(
            exact.model
        )  # TRL's patch is of another model
        exact._get_per_token_logps_and_entropies = plain
        as_dtype = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        results.append(_stock_step(exact, as_dtype))
    baseline, truth = results
    try:
        for name, a, b, t in zip(("loss", "gradient"), got, baseline, truth, strict=True):
            assert_as_accurate(a, b, t, name=name)
    except AssertionError as error:
        measure.ABSENT[f"trl_step {provider}"] = f"wrong result: {str(error).splitlines()[0]}"
        raise
    trainer.model.zero_grad(set_to_none=True)


def _stock_step(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    import trl

    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    loss = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return loss.detach(), trainer.model.get_output_embeddings().weight.grad


def _plain_log_probs(temperature: float) -> Any:
    """TRL's hook for log-probs, from logits."""

    def function(
        model: Any, ids: Tensor, mask: Tensor, T: int, **_: Any
    ) -> tuple[Tensor, Tensor, None]:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -T - 1 : -1] / temperature
        logps = logits.log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1).detach()
        return logps.gather(-1, ids[:, -T:, None]).squeeze(-1), entropy, None

    return function


def _trainer(provider: str, variant: str, sizes: dict[str, int], layers: int) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig
    from trl import GRPOTrainer as Stock

    from grpo_fast.integrations.trl import GRPOTrainer

    torch.manual_seed(0)
    D = sizes["D"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes["V"],
            hidden_size=D,
            intermediate_size=4 * D,
            num_hidden_layers=layers,
            num_attention_heads=max(D // 64, 1),
            num_key_value_heads=max(D // 64, 1),
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        num_generations=4,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = (GRPOTrainer if provider == "grpo_fast" else Stock)(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    if (
        variant == "off-policy-kl"
    ):  # TRL would load a reference model from the hub; here the log-probs are given
        trainer.args.beta = trainer.beta = 0.04
    if provider == "grpo_fast":
        from grpo_fast.integrations.trl import objective

        trainer.objective = objective(trainer.args)
    if provider == "eager":
        trainer._get_per_token_logps_and_entropies = _plain_log_probs(trainer.temperature)
    trainer.model.train()
    return trainer


def _inputs(sizes: dict[str, int], device: torch.device, variant: str) -> dict[str, Tensor]:
    """Completions that end at random, the first at the end."""
    generator = torch.Generator().manual_seed(0)
    B, T = sizes["B"], sizes["T"]
    ids = torch.randint(2, sizes["V"], (B, PROMPT + T), generator=generator)
    lengths = torch.randint(T // 3, T + 1, (B,), generator=generator)
    lengths[0] = T
    mask = (torch.arange(T) < lengths[:, None]).long()
    inputs = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones(B, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask,
        "advantages": torch.randn(B, generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    if variant == "off-policy-kl":
        near = -torch.tensor(float(sizes["V"])).log()  # a random model is nearly uniform
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            inputs[name] = near + 0.1 * torch.randn(B, T, generator=generator)
    return {name: x.to(device) for name, x in inputs.items()}
