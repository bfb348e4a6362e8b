"""GRPO in plain PyTorch, on any Hugging Face causal LM: `python examples/plain_loop.py`.

A tiny random model learns to answer with even tokens. For a real one, put yours in the place of `build`, and
your rewards in the place of `rewards_of`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast import Objective
from grpo_fast.integrations.transformers import Head, with_head
from grpo_fast.loss import LossOutput, linear_grpo_loss
from grpo_fast.ops import linear_logprob

PROMPTS, GROUP, LENGTH, STEPS, UPDATES = 8, 8, 12, 15, 2
VOCABULARY, BOS, EOS, PAD = 64, 0, 1, 2
OBJECTIVE = Objective.preset("dapo")


class Batch(NamedTuple):
    """Completions, G of each prompt one after the other."""

    sequences: Tensor  # (B, P + T)
    attention: Tensor  # (B, P + T)
    completions: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    rewards: Tensor  # (B,)


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


def rewards_of(completions: Tensor, mask: Tensor) -> Tensor:
    """The share of even tokens in each completion."""
    return ((completions % 2 == 0) & mask).sum(1) / mask.sum(1)


@torch.no_grad()
def sample(model: LlamaForCausalLM) -> Batch:
    prompts = torch.randint(3, VOCABULARY, (PROMPTS, 4)).repeat_interleave(GROUP, 0)
    ones = torch.ones_like(prompts)
    sequences = model.generate(prompts, attention_mask=ones, do_sample=True, max_new_tokens=LENGTH)
    completions = sequences[:, prompts.shape[1] :]
    ended = (completions == EOS).cumsum(1)
    mask = (ended == 0) | ((ended == 1) & (completions == EOS))
    attention = torch.cat([ones, mask.long()], 1)
    return Batch(sequences, attention, completions, mask, rewards_of(completions, mask))


@torch.no_grad()
def old_log_probs(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    def score(hidden: Tensor, head: Head) -> Tensor:
        ids, mask = batch.completions, batch.mask
        return linear_logprob(hidden, head.weight, ids, mask=mask, **head.options)

    return with_head(
        model, score, batch.sequences, batch.attention, last=batch.completions.shape[1]
    )


def loss_of(model: LlamaForCausalLM, batch: Batch, old_logps: Tensor) -> LossOutput:
    def score(hidden: Tensor, head: Head) -> LossOutput:
        return linear_grpo_loss(
            hidden,
            head.weight,
            batch.completions,
            rewards=batch.rewards,
            group_size=GROUP,
            mask=batch.mask,
            old_logps=old_logps,
            objective=OBJECTIVE,
            **head.options,
        )

    return with_head(
        model, score, batch.sequences, batch.attention, last=batch.completions.shape[1]
    )


def main() -> list[float]:
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(STEPS):
        batch = sample(model)
        old_logps = old_log_probs(model, batch)
        for _ in range(UPDATES):
            out = loss_of(model, batch, old_logps)
            out.loss.backward()  # the logits were never there as a whole; their gradient is computed
            optimizer.step()
            optimizer.zero_grad()
        history.append(batch.rewards.mean().item())
        clipped = out.metrics["clip_fraction_low"] + out.metrics["clip_fraction_high"]
        print(f"step {step}: reward {history[-1]:.3f}, clipped {clipped.item():.3f}")
    return history


if __name__ == "__main__":
    main()
