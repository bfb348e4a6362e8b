"""Rollouts: completions that are sampled, rewarded, and scored with a model."""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from grpo_fast.trainer import rewards
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.parallel import Team, whole
from grpo_fast.trainer.prefill import prefilled
from grpo_fast.trainer.quoting import quoted
from grpo_fast.trainer.rewards import Text
from grpo_fast.trainer.server import Server
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
        sampling_logps: (B, T) log-probs by the engine that sampled, if it is another one; 0 where masked.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    ended: Tensor
    prompts: list[Text]
    completions: list[Text]
    sampling_logps: Tensor | None = None

    def __getitem__(self, rows: "slice | Tensor") -> "Rollout":
        chosen = range(len(self.prompts))[rows] if isinstance(rows, slice) else rows.tolist()

        def pick(value: Any) -> Any:
            return [value[i] for i in chosen] if isinstance(value, list) else value[rows]

        values: dict[str, Any] = {
            name: x if x is None else pick(x) for name, x in vars(self).items()
        }
        return Rollout(**values)

    def parts(self, size: int | None) -> "list[Rollout]":
        """Cut the rollout into parts of `size` completions; None: all in one."""
        count = len(self.prompts)
        return [self[i : i + (size or count)] for i in range(0, count, size or count)]


def joined(rollouts: Sequence[Rollout], pad: int) -> Rollout:
    """Return the completions of several rollouts as one; `pad` fills up its ids."""
    if len(rollouts) == 1:
        return rollouts[0]
    values: dict[str, Any] = {}
    for name, first in vars(rollouts[0]).items():
        found = [getattr(r, name) for r in rollouts]
        if first is None:
            values[name] = None
        elif isinstance(first, list):
            values[name] = [x for one in found for x in one]
        elif first.ndim == 1:
            values[name] = torch.cat(found)
        else:
            width, fill = max(x.shape[1] for x in found), pad if name.endswith("_ids") else 0
            left = name.startswith("prompt")
            missing = [width - x.shape[1] for x in found]
            sides = [(n, 0) if left else (0, n) for n in missing]
            padded = [
                torch.nn.functional.pad(x, side, value=fill)
                for x, side in zip(found, sides, strict=True)
            ]
            values[name] = torch.cat(padded)
    return Rollout(**values)


class Draw(LogitsProcessor):
    """Choose each next token with a random number of its own, by the inverse of the distribution function.

    The samples are those of the softmax. They depend on the numbers of their row alone, and so neither on the
    other rows of the batch nor on the number of processes.

    Args:
        numbers: (B, T), uniform in [0, 1); float64 for exact sums.
        start: the length of the prompts, with their padding.
    """

    def __init__(self, numbers: Tensor, start: int, temperature: float) -> None:
        self.numbers, self.start, self.temperature = numbers, start, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        number = self.numbers[:, input_ids.shape[1] - self.start, None]
        whole = (scores.float() / self.temperature).softmax(-1).to(number).cumsum(-1)
        total = whole[:, -1:]
        if not bool(total.isfinite().all()):
            raise FloatingPointError(
                "the model's probabilities are NaN or infinite: its weights have diverged"
            )
        # The first token whose sum is above the number: one of probability 0 is never chosen.
        chosen = torch.searchsorted(whole, number * total, right=True)
        chosen = chosen.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)


def seed_of(*parts: object) -> int:
    """Return a seed, in [0, 2^63), for the random numbers of what `parts` name."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Return `count` uniform random numbers in [0, 1) for each seed, (seeds, count) float64."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(count, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Text],
    max_new_tokens: int,
    temperature: float,
    batch_size: int | None = None,
    *,
    batch_tokens: int | None = None,
    seeds: Sequence[int] | None = None,
    share: bool = True,
) -> Rollout:
    """Sample one completion per prompt; a temperature of 0 is greedy.

    Args:
        prompts: B strings, or lists of chat messages for the tokenizer's chat template.
        batch_size: the largest number of completions that are generated together.
        batch_tokens: the largest number of tokens of these, prompts and padding included.
        seeds: one for each completion, which then depends on nothing else; None: drawn from PyTorch's
            generator.
        share: forward a prompt once for all its completions in a batch, where that is exact (`prefill`).
    """
    tokens = encode(policy.tokenizer, prompts).to(policy.device)
    ids, attention = tokens["input_ids"], tokens["attention_mask"]
    if seeds is None:
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
    policy.model.eval()
    lengths = attention.sum(1).tolist()
    found: list[list[int]] = [[] for _ in prompts]
    with whole(policy.model), policy.autocast():
        for rows in batches_by_length(lengths, max_new_tokens, batch_size, batch_tokens):
            P = max(lengths[b] for b in rows)
            settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
            if temperature > 0:
                numbers = uniforms([seeds[b] for b in rows], max_new_tokens)
                # Apple's GPUs have no float64.
                exact = torch.float32 if policy.device.type == "mps" else torch.float64
                numbers = numbers.to(policy.device, exact)
                draw = Draw(numbers, P, temperature)
                settings["logits_processor"] = LogitsProcessorList([draw])
            given = ids[rows, -P:], attention[rows, -P:]
            cache = prefilled(policy.model, *given) if share else None
            if cache is not None:
                settings["past_key_values"] = cache
            out = policy.model.generate(input_ids=given[0], attention_mask=given[1], **settings)
            for b, row in zip(rows, out[:, P:].tolist(), strict=True):
                found[b] = _until_end(row, policy.eos_ids)
    return packed(policy, prompts, found, (ids, attention))


def batches_by_length(
    lengths: Sequence[int], new_tokens: int, size: int | None, tokens: int | None
) -> list[list[int]]:
    """Put prompts of like length into batches: lists of their indices.

    Args:
        lengths: of the prompts, in tokens. new_tokens: the longest completion.
        size, tokens: the most prompts, and the most tokens with padding and completions, of a batch.
    """
    batches: list[list[int]] = []
    for b in sorted(range(len(lengths)), key=lambda b: lengths[b]):
        rows = len(batches[-1]) + 1 if batches else 0
        full = size is not None and rows > size
        full = full or (tokens is not None and rows * (lengths[b] + new_tokens) > tokens)
        if not batches or full:
            batches.append([])
        batches[-1].append(b)
    return batches


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    for t, token in enumerate(row):
        if token in ends:
            return row[: t + 1]
    return row


def packed(
    policy: Policy,
    prompts: Sequence[Text],
    found: Sequence[list[int]],
    tokens: tuple[Tensor, Tensor],
    logps: Sequence[list[float]] | None = None,
) -> Rollout:
    """Return completions as a rollout.

    Args:
        found: the tokens of each completion; one that has ended has an end-of-sequence token last.
        tokens: ids and mask of the prompts, (B, P).
        logps: of the tokens, if another engine sampled them.
    """
    T, pad, device = max(map(len, found)), policy.tokenizer.pad_token_id, policy.device
    texts = policy.tokenizer.batch_decode(list(found), skip_special_tokens=True)
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]

    def padded(rows: Sequence[list], fill: float) -> Tensor:
        return torch.tensor([[*row, *[fill] * (T - len(row))] for row in rows], device=device)

    return Rollout(
        prompt_ids=tokens[0],
        prompt_mask=tokens[1],
        completion_ids=padded(found, pad),
        mask=padded([[True] * len(row) for row in found], False),
        ended=torch.tensor([bool(row) and row[-1] in policy.eos_ids for row in found]),
        prompts=list(prompts),
        completions=completions,
        sampling_logps=None if logps is None else padded(logps, 0.0),
    )


class Sampler:
    """The source of the completions of a run: the policy itself, by `generate` with a KV cache."""

    engine_differs = False  # whether log-probs of the engine that samples come with the completions

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config

    def sample(self, prompts: Sequence[Text], seeds: Sequence[int]) -> Rollout:
        """Sample one completion per prompt, at the temperature of the run."""
        config = self.config
        return sample(
            self.policy,
            prompts,
            config.max_new_tokens,
            config.temperature,
            config.micro_batch_size,
            batch_tokens=config.sampling_tokens,
            seeds=seeds,
            share=config.share_prompts != "off",
        )

    def update(self, write: Callable[[Path], None], team: Team) -> None:
        """Take over the weights of the policy; `write(folder)` saves them. All processes call it."""


class ServerSampler(Sampler):
    """An OpenAI-compatible server that samples, and takes over the weights from a folder.

    Args:
        folder: where the weights are put; the server must be able to read it.
    """

    engine_differs = True

    def __init__(self, policy: Policy, config: TrainConfig, folder: Path) -> None:
        super().__init__(policy, config)
        self.server, self.folder = Server(config.server or ""), folder
        self.server.check()

    def sample(self, prompts: Sequence[Text], seeds: Sequence[int]) -> Rollout:
        policy, config = self.policy, self.config
        tokens = encode(policy.tokenizer, prompts).to(policy.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        given = [row[live.bool()].tolist() for row, live in zip(ids, mask, strict=True)]
        found = self.server.generate(
            given,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seeds=list(seeds),
            eos_ids=policy.eos_ids,
        )
        logps = [one.logps for one in found]
        return packed(policy, prompts, [one.ids for one in found], (ids, mask), logps)

    def update(self, write: Callable[[Path], None], team: Team) -> None:
        write(self.folder)

        def load() -> Any:
            self.server.update_weights(self.folder, self.policy.adapted)
            return self.server.loaded

        self.server.loaded = team.on_main(load)  # one process tells the server, all sample from it


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
            raise ValueError(f"prompt {quoted(prompt)}: no tokens are left of it")
        if max(ids) >= size:
            raise ValueError(
                f"prompt {quoted(prompt)}: token {max(ids)} of the tokenizer is not among the model's "
                f"{size}"
            )
        if places is not None and len(ids) + max_new_tokens > places:
            raise ValueError(
                f"prompt {quoted(prompt)}: {len(ids)} tokens and max_new_tokens={max_new_tokens} are "
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
                raise ValueError(f"prompt {quoted(some[0])}: {error}") from error
            for prompt in some:
                yield from _token_ids(tokenizer, [prompt])


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


def reward(
    task: Task, rollout: Rollout, rows: Sequence[Row], timeout: float = math.inf
) -> rewards.Scores:
    """Return the rewards of the answers to B `rows`; `timeout` is in seconds for each call."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    columns["completion_ids"] = [
        ids[live].tolist()
        for ids, live in zip(rollout.completion_ids.cpu(), rollout.mask.cpu(), strict=True)
    ]
    return rewards.score(
        task.rewards, task.weights, rollout.prompts, rollout.completions, columns, timeout
    )


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
