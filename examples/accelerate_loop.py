"""GRPO in an Accelerate loop, on one device or many: `accelerate launch examples/accelerate_loop.py`.

Whole groups stay on one process, so the z-scores need no communication; the normaliser and the metrics are those of all
processes. The model may be wrapped in any way Accelerate knows (DDP, FSDP): the loss runs inside its forward.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast import Objective
from grpo_fast.integrations.transformers import with_head
from grpo_fast.loss import fold_statistics, linear_grpo_loss, metrics_from

PROMPTS, GROUP, LENGTH, STEPS, MICRO_BATCHES = 8, 8, 12, 25, 2  # PROMPTS: of each process
BOS, EOS, PAD = 0, 1, 2


def build() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
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


def main(cpu: bool = False) -> list[float]:
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=MICRO_BATCHES)
    set_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(0, device_specific=True)  # every process samples something else
    objective = Objective.preset("dapo")
    history = []
    for step in range(STEPS):
        prompts = torch.randint(3, 64, (PROMPTS, 4), device=accelerator.device)
        prompts = prompts.repeat_interleave(GROUP, 0)
        with torch.no_grad():
            sequences = accelerator.unwrap_model(model).generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                max_new_tokens=LENGTH,
            )
        completions = sequences[:, prompts.shape[1] :]
        ended = (completions == EOS).cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (completions == EOS))
        rewards = ((completions % 2 == 0) & mask).sum(1) / mask.sum(1)
        attention = torch.cat([torch.ones_like(prompts), mask.long()], 1)

        # The tokens of all micro-batches and processes. Gradients are averaged over processes, and the loss is
        # divided by the number of micro-batches in `accelerator.backward`: undo both.
        num_items = accelerator.reduce(mask.sum(), "sum")
        factor = accelerator.num_processes * MICRO_BATCHES
        statistics = []
        size = len(prompts) // MICRO_BATCHES  # whole groups
        for rows in torch.arange(len(prompts)).split(size):
            with accelerator.accumulate(model):

                def loss(hidden, head, rows=rows):
                    out = linear_grpo_loss(
                        hidden,
                        head.weight,
                        completions[rows],
                        rewards=rewards[rows],
                        group_size=GROUP,
                        mask=mask[rows],
                        num_items=num_items,
                        objective=objective,
                        **head.options,
                    )
                    return out.loss, out.statistics  # tensors, for the hooks of DDP and FSDP

                value, found = with_head(
                    model, loss, sequences[rows], attention[rows], last=completions.shape[1]
                )
                accelerator.backward(factor * value)
                optimizer.step()
                optimizer.zero_grad()
                statistics.append(found)
        gathered = accelerator.gather(torch.stack(statistics))  # one collective for all metrics
        metrics = metrics_from(fold_statistics(gathered))
        history.append(accelerator.reduce(rewards.mean(), "mean").item())
        accelerator.print(
            f"step {step}: reward {history[-1]:.3f}, tokens {metrics['tokens'].item():.0f}"
        )
    accelerator.end_training()
    return history


if __name__ == "__main__":
    main()
