"""Train any Hugging Face causal language model with GRPO, and forward the prompt of each group once.

Run it with `python examples/shared_prompts.py`. It downloads nothing: a tiny random model learns to answer
with even tokens. It prints how many tokens the forward of a batch has, and how many it would have without
shared prompts.

To train a real model, replace `build`, `prompts_of` and `rewards_of`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast import LossOutput, Objective, linear_grpo_loss, linear_logprob, shared_prompt
from grpo_fast.integrations.transformers import Head
from grpo_fast.shared_prompt import Plan

# PROMPTS per step, with GROUP completions each, of at most LENGTH tokens; UPDATES optimizer steps per step
PROMPTS, GROUP, LENGTH, STEPS, UPDATES = 4, 16, 12, 15, 2
VOCABULARY, BOS, EOS, PAD = 64, 0, 1, 2
LONGEST = 40  # tokens of a prompt
OBJECTIVE = Objective.preset("dapo")

T = TypeVar("T")


class Batch(NamedTuple):
    """Sampled completions, as a plan, and their rewards, one for each."""

    plan: Plan
    rewards: Tensor


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
    """Make random prompts, padded on the left: ids and attention mask, both (number, LONGEST)."""
    lengths = torch.randint(LONGEST // 2, LONGEST + 1, (number, 1))
    mask = torch.arange(LONGEST) >= LONGEST - lengths
    return torch.randint(3, VOCABULARY, mask.shape).where(mask, PAD), mask.long()


@torch.no_grad()
def sample(model: LlamaForCausalLM) -> Batch:
    """Sample GROUP completions of each prompt, plan their forward, and compute their rewards."""
    ids, mask = prompts_of(PROMPTS)
    sequences = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=LENGTH,
        num_return_sequences=GROUP,
    )
    completions = sequences[:, LONGEST:]
    is_end = completions == EOS
    live = is_end.cumsum(1) - is_end.long() == 0  # True up to the first EOS, included
    plan = shared_prompt.plan(
        ids, completions, prompt_mask=mask, completion_mask=live, group_size=GROUP
    )
    return Batch(plan, rewards_of(completions, live))


def run(model: LlamaForCausalLM, plan: Plan, function: Callable[[Tensor, Head], T]) -> T:
    """Call `function(hidden, head)`; `hidden` has one row for each token of the completions."""
    return shared_prompt.with_head(model, plan, function)


@torch.no_grad()
def old_log_probs(model: LlamaForCausalLM, plan: Plan) -> Tensor:
    """Compute the log-probs of the completions before the model is updated, (tokens,)."""

    def score(hidden: Tensor, head: Head) -> Tensor:
        return linear_logprob(hidden, head.weight, plan.targets, **head.options)

    return run(model, plan, score)


def loss_of(model: LlamaForCausalLM, batch: Batch, old_logps: Tensor) -> LossOutput:
    """Compute the loss and its gradient, without the logits of the whole batch in memory."""

    def score(hidden: Tensor, head: Head) -> LossOutput:
        return linear_grpo_loss(
            hidden,
            head.weight,
            batch.plan.targets,
            cu_seqlens=batch.plan.cu_seqlens,
            rewards=batch.rewards,
            group_size=GROUP,
            old_logps=old_logps,
            objective=OBJECTIVE,
            **head.options,
        )

    return run(model, batch.plan, score)


def main() -> list[float]:
    """Run the training, and return the mean reward of each step."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(STEPS):
        batch = sample(model)
        if step == 0:
            choice = shared_prompt.choose(model, batch.plan)
            print(f"route {choice.route}: {choice.reason}")
            shared_prompt.check(model, batch.plan)  # against one row for each completion
        old_logps = old_log_probs(model, batch.plan)
        for _ in range(UPDATES):
            out = loss_of(model, batch, old_logps)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        history.append(batch.rewards.mean().item())
        print(f"step {step}: reward {history[-1]:.3f}")
    return history


if __name__ == "__main__":
    main()
