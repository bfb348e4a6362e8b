"""Train any Hugging Face causal language model with GRPO in plain PyTorch.

Run it with `python examples/plain_loop.py`. It downloads nothing: a tiny random model learns to answer with
even tokens.

To train a real model, replace `build` (your model), `prompts_of` (your prompts, padded on the left by your
tokenizer) and `rewards_of` (your rewards).
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast import LossOutput, Objective, linear_grpo_loss, linear_logprob
from grpo_fast.integrations.transformers import Head, with_head

# PROMPTS per step, with GROUP completions each, of at most LENGTH tokens; UPDATES optimizer steps per step
PROMPTS, GROUP, LENGTH, STEPS, UPDATES = 8, 8, 12, 15, 2
VOCABULARY, BOS, EOS, PAD = 64, 0, 1, 2
OBJECTIVE = Objective.preset("dapo")

T = TypeVar("T")


class Batch(NamedTuple):
    """Sampled completions with their prompts and rewards.

    B = PROMPTS * GROUP sequences. The completions of a prompt stand one after the other.
    """

    sequences: Tensor  # (B, P + T): prompts padded on the left, then completions
    attention: Tensor  # (B, P + T): 0 at padding, on the left and on the right
    completions: Tensor  # (B, T)
    mask: Tensor  # (B, T): True at completion tokens that count
    rewards: Tensor  # (B,)


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


def rewards_of(completions: Tensor, mask: Tensor) -> Tensor:
    """Return the share of even tokens in each completion."""
    return ((completions % 2 == 0) & mask).sum(1) / mask.sum(1)


def prompts_of(number: int) -> tuple[Tensor, Tensor]:
    """Make random prompts of 2 to 6 tokens, padded on the left.

    Returns:
        Ids and attention mask, both (number, 6).
    """
    lengths = torch.randint(2, 7, (number, 1))
    mask = torch.arange(6) >= 6 - lengths
    return torch.randint(3, VOCABULARY, (number, 6)).where(mask, PAD), mask.long()


@torch.no_grad()
def sample(model: LlamaForCausalLM) -> Batch:
    """Sample GROUP completions of each prompt, and compute their rewards."""
    ids, mask = prompts_of(PROMPTS)
    prompts, prompt_mask = ids.repeat_interleave(GROUP, 0), mask.repeat_interleave(GROUP, 0)
    sequences = model.generate(
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
    attention = torch.cat([prompt_mask, mask.long()], 1)
    return Batch(sequences, attention, completions, mask, rewards_of(completions, mask))


def run(model: LlamaForCausalLM, function: Callable[[Tensor, Head], T], batch: Batch) -> T:
    """Call `function(hidden, head)` inside the forward of the model.

    `hidden` are the hidden states that score the completions.
    """
    return with_head(
        model,
        function,
        batch.sequences,
        batch.attention,
        position_ids=(batch.attention.cumsum(1) - 1).clamp(min=0),  # padding is not counted
        last=batch.completions.shape[1],
    )


@torch.no_grad()
def old_log_probs(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Compute the log-probs of the completions before the model is updated."""

    def score(hidden: Tensor, head: Head) -> Tensor:
        ids, mask = batch.completions, batch.mask
        return linear_logprob(hidden, head.weight, ids, mask=mask, **head.options)

    return run(model, score, batch)


def loss_of(model: LlamaForCausalLM, batch: Batch, old_logps: Tensor) -> LossOutput:
    """Compute the loss and its gradient, without the logits of the whole batch in memory."""

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

    return run(model, score, batch)


def main() -> list[float]:
    """Run the training, and return the mean reward of each step."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(STEPS):
        batch = sample(model)
        old_logps = old_log_probs(model, batch)
        for _ in range(UPDATES):
            out = loss_of(model, batch, old_logps)
            out.loss.backward()  # the loss has computed the gradient; backward only passes it on
            optimizer.step()
            optimizer.zero_grad()
        history.append(batch.rewards.mean().item())
        clipped = out.metrics["clip_fraction_low"] + out.metrics["clip_fraction_high"]
        print(f"step {step}: reward {history[-1]:.3f}, clipped {clipped.item():.3f}")
    return history


if __name__ == "__main__":
    main()
