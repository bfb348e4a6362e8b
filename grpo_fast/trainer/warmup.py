"""The warm-up of a new model: supervised steps on demonstrations, which end long before it is perfect."""

import math
import random
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_fast import ops
from grpo_fast.shared_prompt import layers_recomputed
from grpo_fast.trainer import tasks
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.evaluate import mean_rewards
from grpo_fast.trainer.interruption import undivided
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.parallel import Team
from grpo_fast.trainer.progress import Bar
from grpo_fast.trainer.rewards import Text
from grpo_fast.trainer.rollout import Rollout, completion_logits, encode
from grpo_fast.trainer.tasks import Task

CHECK_EVERY = 20
RAMP = 50  # steps until the full learning rate


def warm_up(
    policy: Policy,
    task: Task,
    config: TrainConfig,
    stopped: Callable[[], bool],
    team: Team | None = None,
) -> int:
    """Imitate demonstrations until sampled answers earn `config.warmup_reward`; return the number of steps.

    Args:
        stopped: called before each step; True ends the warm-up.
        team: the processes, each of which makes the same warm-up; the first one decides on its end.
    """
    assert task.demonstration is not None
    rng = random.Random(config.seed)
    batches = tasks.batches(task.train, config.warmup_batch_size, rng)
    probe = rng.sample(task.train, min(256, len(task.train)))
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.warmup_learning_rate, weight_decay=0.0
    )
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / RAMP))
    with Bar("warm-up", config.warmup_steps, shown=team is None or team.main) as bar:
        reward = math.nan
        for step in range(config.warmup_steps):
            if stopped():
                return step
            rows = next(batches)
            pairs = [(row["prompt"], task.demonstration(row, rng)) for row in rows]
            optimizer.zero_grad()
            loss = imitate(policy, demonstrations(policy, pairs), config)
            norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
            if not (math.isfinite(loss) and norm.isfinite()):
                raise FloatingPointError(f"warm-up, step {step}: loss {loss}, gradient norm {norm}")
            with undivided():
                optimizer.step()
                ramp.step()
            known = "" if math.isnan(reward) else f", reward {reward:.3f}"
            bar.advance(f"loss {loss:.3f}{known}")
            if (step + 1) % CHECK_EVERY == 0:
                reward = mean_rewards(policy, task, probe, config, config.temperature)["reward"]
                reward = team.objects(reward)[0] if team else reward
                if reward >= config.warmup_reward:
                    return step + 1
    return config.warmup_steps


def demonstrations(policy: Policy, shown: list[tuple[Text, str]]) -> Rollout:
    """Return (prompt, completion) pairs as a rollout, each with an end-of-sequence token."""
    prompts, completions = [p for p, _ in shown], [c for _, c in shown]
    tokens = encode(policy.tokenizer, prompts).to(policy.device)
    ids = policy.tokenizer(completions, add_special_tokens=False)["input_ids"]
    targets = [torch.tensor([*row, policy.eos_ids[0]]) for row in ids]
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in targets], True)
    return Rollout(
        prompt_ids=tokens["input_ids"],
        prompt_mask=tokens["attention_mask"],
        completion_ids=pad_sequence(targets, True).to(policy.device),
        mask=mask.to(policy.device),
        ended=torch.ones(len(shown), dtype=torch.bool),
        prompts=prompts,
        completions=list(completions),
    )


def imitate(policy: Policy, batch: Rollout, config: TrainConfig) -> float:
    """Compute the gradients of the mean negative log-prob of a batch's tokens; return this mean."""
    tokens = batch.mask.sum()
    total = 0.0
    recompute = config.gradient_checkpointing
    for part in batch.parts(config.micro_batch_size):
        with policy.autocast(), layers_recomputed(policy.model, recompute):
            logits = completion_logits(policy.model, part)
        logps = ops.logprob(logits, part.completion_ids, mask=part.mask)
        loss = -logps[part.mask].sum() / tokens
        loss.backward()
        total += loss.item()
    return total
