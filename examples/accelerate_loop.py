"""Train with GRPO in an Accelerate loop, on one device or many.

Run it with `accelerate launch examples/accelerate_loop.py`. It downloads nothing: a tiny random model learns
to answer with even tokens.

A group of completions stays on one process, so the advantages need no communication. The loss is normalised
by the tokens of all processes, and the metrics cover all processes. The model may be wrapped in any way that
Accelerate knows (DDP, FSDP, ...), because the loss runs inside the forward of the model.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast import Objective, fold_statistics, linear_grpo_loss, metrics_from
from grpo_fast.integrations.transformers import Head, with_head

# PROMPTS per process and step, with GROUP completions each, of at most LENGTH tokens
PROMPTS, GROUP, LENGTH, STEPS, MICRO_BATCHES = 8, 8, 12, 20, 2
VOCABULARY, BOS, EOS, PAD = 64, 0, 1, 2
OBJECTIVE = Objective.preset("dapo")


def build() -> LlamaForCausalLM:
    """Build a tiny model with random weights."""
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


def prompts_of(number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make random prompts of 2 to 6 tokens, padded on the left.

    Returns:
        Ids and attention mask, both (number, 6).
    """
    lengths = torch.randint(2, 7, (number, 1), device=device)
    mask = torch.arange(6, device=device) >= 6 - lengths
    ids = torch.randint(3, VOCABULARY, (number, 6), device=device)
    return ids.where(mask, PAD), mask.long()


@torch.no_grad()
def sample(model: Any, accelerator: Accelerator) -> dict[str, Tensor]:
    """Sample GROUP completions of each prompt, and reward even tokens.

    The completions of a prompt stand one after the other.
    """
    ids, mask = prompts_of(PROMPTS, accelerator.device)
    prompts, prompt_mask = ids.repeat_interleave(GROUP, 0), mask.repeat_interleave(GROUP, 0)
    sequences = accelerator.unwrap_model(model).generate(
        prompts,
        attention_mask=prompt_mask,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=LENGTH,
    )
    completions = sequences[:, prompts.shape[1] :]
    is_end = completions == EOS
    mask = is_end.cumsum(1) - is_end.long() == 0  # True up to the first EOS, included
    return {
        "sequences": sequences,
        "attention": torch.cat([prompt_mask, mask.long()], 1),
        "completions": completions,
        "mask": mask,
        "rewards": ((completions % 2 == 0) & mask).sum(1) / mask.sum(1),
    }


def loss_of(
    model: Any, batch: dict[str, Tensor], num_items: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss and the statistics of a micro-batch.

    Both are tensors, because the hooks of DDP and FSDP search the result for tensors.

    Args:
        num_items: number of tokens in all micro-batches of all processes.
        factor: multiplies the loss.
    """

    def score(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        out = linear_grpo_loss(
            hidden,
            head.weight,
            batch["completions"],
            rewards=batch["rewards"],
            group_size=GROUP,
            mask=batch["mask"],
            num_items=num_items,
            loss_scale=factor,
            objective=OBJECTIVE,
            **head.options,
        )
        return out.loss, out.statistics

    attention = batch["attention"]
    return with_head(
        model,
        score,
        batch["sequences"],
        attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),  # padding is not counted
        last=batch["completions"].shape[1],
    )


def train(accelerator: Accelerator) -> list[float]:
    """Train, and return the mean reward of each step over all processes."""
    set_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(0, device_specific=True)  # each process samples other prompts and completions
    # `num_items` already divides the loss by the tokens of all processes and micro-batches. But DDP and FSDP
    # also average over processes, and `accelerator.backward` over micro-batches. The factor corrects both.
    factor = accelerator.num_processes * MICRO_BATCHES
    history = []
    for step in range(STEPS):
        batch = sample(model, accelerator)
        num_items = accelerator.reduce(batch["mask"].sum(), "sum")
        statistics = []
        for i in range(MICRO_BATCHES):  # a micro-batch has whole groups
            part = {name: x.chunk(MICRO_BATCHES)[i] for name, x in batch.items()}
            with accelerator.accumulate(model):
                loss, found = loss_of(model, part, num_items, factor)
                accelerator.backward(loss)
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
    """Run the training, and return the mean reward of each step."""
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=MICRO_BATCHES)
    history = train(accelerator)
    # Free DDP before its process group. In the other order a process could wait for its own threads.
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return history


if __name__ == "__main__":
    main()
