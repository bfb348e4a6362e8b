"""GRPO in plain PyTorch, on any Hugging Face causal LM: `python examples/plain_loop.py`.

A tiny random model on the CPU learns to answer with even tokens. For a real one, put yours in the place of `model`, and
your rewards in the place of `rewards_of`.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast import Objective
from grpo_fast.integrations.transformers import with_head
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob

PROMPTS, GROUP, LENGTH, STEPS, UPDATES = 8, 8, 12, 15, 2
BOS, EOS, PAD = 0, 1, 2


def rewards_of(completions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The share of even tokens in each completion."""
    return ((completions % 2 == 0) & mask).sum(1) / mask.sum(1)


def main() -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
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
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    objective = Objective.preset("dapo")
    history = []
    for step in range(STEPS):
        # Sample: G completions of each prompt, one after the other.
        prompts = torch.randint(3, 64, (PROMPTS, 4)).repeat_interleave(GROUP, 0)
        with torch.no_grad():
            sequences = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                max_new_tokens=LENGTH,
            )
        completions = sequences[:, prompts.shape[1] :]
        ended = (completions == EOS).cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (completions == EOS))
        rewards = rewards_of(completions, mask)
        attention = torch.cat([torch.ones_like(prompts), mask.long()], 1)

        def old_log_probs(hidden, head, ids=completions, mask=mask):
            return linear_logprob(hidden, head.weight, ids, mask=mask, **head.options)

        def loss(hidden, head, ids=completions, mask=mask, rewards=rewards):
            return linear_grpo_loss(
                hidden,
                head.weight,
                ids,
                rewards=rewards,
                group_size=GROUP,
                mask=mask,
                old_logps=old_logps,
                objective=objective,
                **head.options,
            )

        with torch.no_grad():
            old_logps = with_head(
                model, old_log_probs, sequences, attention, last=completions.shape[1]
            )
        for _ in range(UPDATES):
            out = with_head(model, loss, sequences, attention, last=completions.shape[1])
            out.loss.backward()  # the logits were never in memory; their gradient is already computed
            optimizer.step()
            optimizer.zero_grad()
        history.append(rewards.mean().item())
        clipped = out.metrics["clip_fraction_low"] + out.metrics["clip_fraction_high"]
        print(f"step {step}: reward {history[-1]:.3f}, clipped {clipped.item():.3f}")
    return history


if __name__ == "__main__":
    main()
