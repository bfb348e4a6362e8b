"""`Workload`: what decides the memory of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grpo_fast.trainer.config import TrainConfig

# Tokens: a padded micro-batch that has so many takes no further prompt. Its products are large enough.
BUSY = 4096
UNPADDED = ("auto", "packed")  # routes whose micro-batches are filled up; "auto" tries this first


@dataclass(frozen=True)
class Workload:
    """The settings that decide the memory of a run, named as in `TrainConfig`; lengths are in tokens.

    Attributes:
        prompt_tokens, completion_tokens: the greatest lengths.
        group_size: completions of a prompt.
        micro_batch_tokens: most tokens of one forward, shared prompts counted once; None: no limit.
        share_prompts: whether completions may share the forward of their prompt.
        route: how they then do; "auto": as `shared_prompt.choose` finds best.
        weights: "float32", "bfloat16" (float32 copies in the optimizer) or "bfloat16_only"; "auto": `dtype`.
        dtype: of the activations, "float32" or "bfloat16".
        optim: the optimizer, by its name in transformers.
        lora_target_modules: names of layers; "all-linear" or none: all linear ones but the head.
        quantize: "bnb-4bit", "bnb-8bit", "torchao-int8" or None; of the weights under an adapter.
        beta: weight of the KL. Above 0 and without an adapter a copy of the weights is held.
        fsdp: whether `world_size` processes share weights, gradients and optimizer state.
        sampling_tokens: most tokens that are sampled together, prompts included; None: all; 0: a server
            samples.
        prompts_per_step: prompts of a process in a step; None: one where nothing else limits a batch.
        device: "cuda" or "cpu", which choose other attention and chunks.
    """

    prompt_tokens: int = 512
    completion_tokens: int = 1024
    group_size: int = 8
    micro_batch_tokens: int | None = 16_384
    gradient_checkpointing: bool = False
    share_prompts: bool = True
    weights: str = "auto"
    dtype: str = "bfloat16"
    optim: str = "adamw_torch"
    use_peft: bool = False
    lora_r: int = 16
    lora_target_modules: str | Sequence[str] = "all-linear"
    quantize: str | None = None
    beta: float = 0.0
    world_size: int = 1
    fsdp: bool = False
    sampling_tokens: int | None = 65_536
    prompts_per_step: int | None = None
    device: str = "cuda"
    route: str = "auto"

    @property
    def base(self) -> torch.dtype:
        """The dtype of the model's weights; FSDP gathers trained ones in the dtype of the activations."""
        name = self.dtype if self.weights == "auto" or self.fsdp else self.weights
        return torch.float32 if name == "float32" else torch.bfloat16

    @property
    def masters(self) -> bool:
        """Whether the optimizer has float32 copies of the trained weights."""
        half = self.base == torch.bfloat16 and self.weights != "bfloat16_only"
        return half and not self.use_peft and not self.fsdp

    @property
    def sharers(self) -> int:
        """Among how many processes weights, gradients and states are shared."""
        return self.world_size if self.fsdp else 1

    @property
    def completions(self) -> int:
        """How many completions pass through the model together; at least one."""
        P, R, most = self.prompt_tokens, self.completion_tokens, self.micro_batch_tokens
        count = self.group_size * (self.prompts_per_step or (1 if most is None else most))
        if most is None:
            return count
        if not self.share_prompts:
            return min(count, max(1, most // (P + R)), -(-BUSY // (P + R)))
        group = P + self.group_size * R
        full, left = divmod(most, group)
        fit = min(count, max(1, full * self.group_size + max(0, (left - P) // R)))
        return fit if self.route in UNPADDED else min(fit, -(-BUSY // group) * self.group_size)

    @property
    def at_once(self) -> bool:
        """Whether a step has one micro-batch: no gradient is there before its backward."""
        prompts = self.prompts_per_step
        return prompts is not None and self.completions == self.group_size * prompts

    @property
    def sampled(self) -> int:
        """How many completions are sampled together."""
        tokens, rows = self.sampling_tokens, self.group_size * (self.prompts_per_step or 1)
        if tokens is None or tokens == 0:
            return 0 if tokens == 0 else rows
        fit = max(1, tokens // (self.prompt_tokens + self.completion_tokens))
        return min(fit, rows) if self.prompts_per_step else fit


def of(config: TrainConfig, prompt_tokens: int, processes: int = 1) -> Workload:
    """Return the workload of a run on GPUs.

    Args:
        prompt_tokens: the longest prompt. processes: the number of GPUs.
    """
    size = config.micro_batch_size
    tokens = config.micro_batch_tokens
    if size is not None:  # completions of one prompt, or of as many as share it
        prompts = -(-size // config.group_size)
        most = prompts * prompt_tokens + size * config.max_new_tokens
        tokens = most if tokens is None else min(tokens, most)
    return Workload(
        prompt_tokens=prompt_tokens,
        completion_tokens=config.max_new_tokens,
        group_size=config.group_size,
        micro_batch_tokens=tokens,
        gradient_checkpointing=config.gradient_checkpointing,
        share_prompts=config.share_prompts != "off",
        weights=config.weights,
        dtype="bfloat16" if config.dtype == "auto" else config.dtype,
        optim=config.optim,
        use_peft=config.use_peft,
        lora_r=config.lora_r,
        lora_target_modules=tuple(config.lora_target_modules) or "all-linear",
        quantize=config.quantize,
        beta=config.to_objective().beta,
        world_size=processes,
        fsdp=config.fsdp,
        sampling_tokens=0 if config.server else config.sampling_tokens,
        prompts_per_step=max(1, config.prompts_per_step // processes),
        device="cpu" if config.device == "cpu" else "cuda",
        route="auto" if config.share_prompts == "off" else config.share_prompts,
    )
