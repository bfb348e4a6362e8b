"""GRPO in an Accelerate loop, on one device or many: `accelerate launch examples/accelerate_loop.py`.

Whole groups stay on one process, so the z-scores need no communication; the normaliser and the metrics are
those of all processes. The model may be wrapped in any way Accelerate knows (DDP, FSDP, ...): the loss runs
inside its forward.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast import Objective
from grpo_fast.integrations.transformers import Head, with_head
from grpo_fast.loss import fold_statistics, linear_grpo_loss, metrics_from

PROMPTS, GROUP, LENGTH, STEPS, MICRO_BATCHES = 8, 8, 12, 20, 2  # PROMPTS: of each process
VOCABULARY, BOS, EOS, PAD = 64, 0, 1, 2
OBJECTIVE = Objective.preset("dapo")


def build() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


@torch.no_grad()
def sample(model: Any, accelerator: Accelerator) -> dict[str, Tensor]:
    """Completions, G of each prompt one after the other; a reward for even tokens."""
    prompts = torch.randint(3, VOCABULARY, (PROMPTS, 4), device=accelerator.device)
    prompts = prompts.repeat_interleave(GROUP, 0)
    ones = torch.ones_like(prompts)
    bare = accelerator.unwrap_model(model)
    sequences = bare.generate(prompts, attention_mask=ones, do_sample=True, max_new_tokens=LENGTH)
    completions = sequences[:, prompts.shape[1] :]
    ended = (completions == EOS).cumsum(1)
    mask = (ended == 0) | ((ended == 1) & (completions == EOS))
    return {
        "sequences": sequences,
        "attention": torch.cat([ones, mask.long()], 1),
        "completions": completions,
        "mask": mask,
        "rewards": ((completions % 2 == 0) & mask).sum(1) / mask.sum(1),
    }


def loss_of(model: Any, batch: dict[str, Tensor], num_items: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, statistics) of a micro-batch: tensors, for the hooks of DDP and FSDP."""

    def score(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        out = linear_grpo_loss(
            hidden,
            head.weight,
            batch["completions"],
            rewards=batch["rewards"],
            group_size=GROUP,
            mask=batch["mask"],
            num_items=num_items,
            objective=OBJECTIVE,
            **head.options,
        )
        return out.loss, out.statistics

    T = batch["completions"].shape[1]
    return with_head(model, score, batch["sequences"], batch["attention"], last=T)


def train(accelerator: Accelerator) -> list[float]:
    """The mean reward of each step, over all processes."""
    set_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(0, device_specific=True)  # every process samples something else
    # Gradients are averaged over processes, and `accelerator.backward` divides by the micro-batches; but the
    # loss is already normalised by the tokens of all of them.
    factor = accelerator.num_processes * MICRO_BATCHES
    history = []
    for step in range(STEPS):
        batch = sample(model, accelerator)
        num_items = accelerator.reduce(batch["mask"].sum(), "sum")
        statistics = []
        for i in range(MICRO_BATCHES):  # whole groups
            part = {name: x.chunk(MICRO_BATCHES)[i] for name, x in batch.items()}
            with accelerator.accumulate(model):
                loss, found = loss_of(model, part, num_items)
                accelerator.backward(factor * loss)
                optimizer.step()
                optimizer.zero_grad()
                statistics.append(found)
        gathered = accelerator.gather(torch.stack(statistics))  # one collective for all metrics
        metrics = metrics_from(fold_statistics(gathered))
        history.append(accelerator.reduce(batch["rewards"].mean(), "mean").item())
        tokens = metrics["tokens"].item()
        accelerator.print(f"step {step}: reward {history[-1]:.3f}, tokens {tokens:.0f}")
    return history


def main(cpu: bool = False) -> list[float]:
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=MICRO_BATCHES)
    history = train(accelerator)
    # DDP goes before the process group it holds: freed after it, a process could wait for its own threads.
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return history


if __name__ == "__main__":
    main()
