"""Rollouts: completions that are sampled, rewarded, and scored with a model."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from grpo_fast.trainer import rewards
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.rewards import Text
from grpo_fast.trainer.tasks import Row, Task


@dataclass(frozen=True)
class Rollout:
    """B completions of at most T tokens, and their prompts of at most P tokens.

    Attributes:
        prompt_ids, prompt_mask: (B, P), padded on the left.
        completion_ids: (B, T).
        mask: (B, T) bool; True up to the first end-of-sequence token, and at this token.
        ended: (B,) bool; False if the length limit cut the completion off.
        prompts, completions: B texts each.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    ended: Tensor
    prompts: list[Text]
    completions: list[Text]

    def __getitem__(self, rows: slice) -> "Rollout":
        return Rollout(**{name: value[rows] for name, value in vars(self).items()})

    def parts(self, size: int | None) -> "list[Rollout]":
        """Cut the rollout into micro-batches of `size` completions; None: all in one."""
        count = len(self.prompts)
        return [self[i : i + (size or count)] for i in range(0, count, size or count)]


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Text],
    max_new_tokens: int,
    temperature: float,
    batch_size: int | None = None,
) -> Rollout:
    """Sample one completion per prompt; a temperature of 0 is greedy.

    Args:
        prompts: B strings, or lists of chat messages for the tokenizer's chat template.
        batch_size: the number of completions that are generated together.
    """
    tokens = encode(policy.tokenizer, prompts).to(policy.device)
    ids, attention = tokens["input_ids"], tokens["attention_mask"]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    policy.model.eval()
    size = batch_size or len(prompts)
    parts = []
    for i in range(0, len(prompts), size):
        with policy.autocast():
            try:
                out = policy.model.generate(
                    input_ids=ids[i : i + size],
                    attention_mask=attention[i : i + size],
                    generation_config=settings,
                )
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise FloatingPointError(
                    "the model's probabilities are NaN or infinite: its weights have diverged"
                ) from error
        parts.append(out[:, ids.shape[1] :])
    T = max(part.shape[1] for part in parts)
    pad = policy.tokenizer.pad_token_id
    completion_ids = torch.cat(
        [torch.nn.functional.pad(part, (0, T - part.shape[1]), value=pad) for part in parts]
    )
    is_eos = torch.isin(completion_ids, torch.tensor(policy.eos_ids, device=policy.device))
    mask = is_eos.cumsum(1) - is_eos.long() == 0
    texts = policy.tokenizer.batch_decode(
        [row[live].tolist() for row, live in zip(completion_ids, mask, strict=True)],
        skip_special_tokens=True,
    )
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return Rollout(ids, attention, completion_ids, mask, is_eos.any(1), list(prompts), completions)


def check_prompts(policy: Policy, rows: Sequence[Row], max_new_tokens: int) -> None:
    """Refuse prompts that the model cannot read.

    Raises:
        ValueError: the message names the prompt.
    """
    tokenizer, model = policy.tokenizer, policy.model
    size = model.get_input_embeddings().num_embeddings
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompts = [row["prompt"] for row in rows]
    if tokenizer.chat_template is None and any(not isinstance(p, str) for p in prompts):
        raise ValueError(
            "dataset: its prompts are chat messages, and the tokenizer has no chat template; give "
            "--model a chat model, or prompts that are text"
        )
    for prompt, ids in zip(prompts, _token_ids(tokenizer, prompts), strict=True):
        if not ids:
            raise ValueError(f"prompt {_short(prompt)}: no tokens are left of it")
        if max(ids) >= size:
            raise ValueError(
                f"prompt {_short(prompt)}: token {max(ids)} of the tokenizer is not among the model's "
                f"{size}"
            )
        if places is not None and len(ids) + max_new_tokens > places:
            raise ValueError(
                f"prompt {_short(prompt)}: {len(ids)} tokens and max_new_tokens={max_new_tokens} are "
                f"more than the model's {places} positions; set a smaller --max_new_tokens, or leave the "
                "prompt out"
            )


def _token_ids(tokenizer: Any, prompts: list[Text]) -> Iterator[list[int]]:
    """Yield the token ids of each prompt; a thousand prompts are encoded at a time."""
    for i in range(0, len(prompts), 1000):
        some = prompts[i : i + 1000]
        try:
            yield from encode(tokenizer, some, padding=False)["input_ids"]
        except Exception as error:  # of a chat template: it wants another role first, say
            if len(prompts) == 1:
                raise ValueError(f"prompt {_short(some[0])}: {error}") from error
            for prompt in some:
                yield from _token_ids(tokenizer, [prompt])


def _short(prompt: Text) -> str:
    text = repr(prompt)
    return text if len(text) <= 80 else text[:80] + "..."


def encode(tokenizer: Any, prompts: Sequence[Text], padding: bool = True) -> Any:
    """Return input ids and attention mask of prompts, (B, P), padded on the left; lists without `padding`."""
    chat = any(not isinstance(p, str) for p in prompts)
    texts = list(prompts)
    if chat:
        texts = tokenizer.apply_chat_template(texts, tokenize=False, add_generation_prompt=True)
    # A chat template has written the special tokens already.
    return tokenizer(
        texts,
        padding=padding,
        return_tensors="pt" if padding else None,
        add_special_tokens=not chat,
    )


def reward(task: Task, rollout: Rollout, rows: Sequence[Row]) -> tuple[Tensor, dict[str, float]]:
    """Return the total rewards (B,) of the answers to B `rows`, and the mean of each reward by name."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    columns["completion_ids"] = [
        ids[live].tolist()
        for ids, live in zip(rollout.completion_ids.cpu(), rollout.mask.cpu(), strict=True)
    ]
    return rewards.score(task.rewards, task.weights, rollout.prompts, rollout.completions, columns)


def completion_logits(model: Any, rollout: Rollout) -> Tensor:
    """Compute logits (B, T, V); those at [b, t] score `completion_ids[b, t]`."""
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    attention = torch.cat([rollout.prompt_mask, rollout.mask.to(rollout.prompt_mask)], 1)
    P, T = rollout.prompt_ids.shape[1], rollout.completion_ids.shape[1]
    extras = {
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),  # as `generate` counts them
        # The head is applied where a completion token is predicted, and the logits are contiguous.
        "logits_to_keep": torch.arange(P - 1, P + T - 1, device=ids.device),
        "use_cache": False,
    }
    accepted = inspect.signature(model.forward).parameters
    extras = {name: value for name, value in extras.items() if name in accepted}
    logits = model(input_ids=ids, attention_mask=attention, **extras).logits
    return logits if logits.shape[1] == T else logits[:, P - 1 : P + T - 1]
