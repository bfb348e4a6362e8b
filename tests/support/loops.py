"""A ragged, left-padded batch for a small language model, and its results without padding."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from grpo_fast import reference

ROOT = Path(__file__).resolve().parents[2]
V, PAD, GROUP = 37, 0, 2
PROMPTS, COMPLETIONS = (2, 2, 5, 5), (4, 1, 3, 6)  # lengths; a prompt is shared by its group


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )
    )


def gpt2():
    """Learned positions: wrong wherever a loop leaves them to be counted from the padding on."""
    sizes = {"vocab_size": V, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=PAD))
    return model.eval()  # it has dropout


MODELS = {"llama": llama, "gpt2": gpt2}


def batch():
    """The tensors of a batch, by the names that the documents use."""
    prompts = torch.randint(1, V, (len(PROMPTS), max(PROMPTS)))
    prompts[1], prompts[3] = prompts[0], prompts[2]
    completions = torch.randint(1, V, (len(PROMPTS), max(COMPLETIONS)))
    left = torch.arange(max(PROMPTS)) >= max(PROMPTS) - torch.tensor(PROMPTS)[:, None]
    right = torch.arange(max(COMPLETIONS)) < torch.tensor(COMPLETIONS)[:, None]
    return {
        "prompt_ids": prompts.where(left, PAD),
        "prompt_mask": left.long(),
        "completion_ids": completions.where(right, PAD),
        "completion_mask": right.long(),
        "rewards": torch.tensor([0.0, 1.0, 0.3, 0.1]),
        "G": GROUP,
        "num_iterations": 1,
    }


def unpadded_logits(model, sequences, attention, mask):
    """(B, T, V): each sequence alone, without padding, through the whole model; 0 where `mask` is 0.

    Args:
        sequences, attention: (B, S), prompts and completions.
        mask: (B, T) of the completions.
    """
    rows = []
    for ids, live, count in zip(sequences, attention, mask.sum(1).tolist(), strict=True):
        logits = model(ids[live.bool()][None]).logits[0, -count - 1 : -1]
        rows.append(nn.functional.pad(logits, (0, 0, 0, mask.shape[1] - count)))
    return torch.stack(rows)


def expected(model, sequences, attention, completion_ids, mask, **arguments):
    """(loss, log-probs, gradients by name) of `reference.grpo_loss` on unpadded sequences."""
    model.zero_grad()
    logits = unpadded_logits(model, sequences, attention, mask)
    logps = reference.logprob(logits, completion_ids).detach()
    reference.grpo_loss(logits, completion_ids, mask=mask, **arguments).backward()
    return logps, gradients(model)


def gradients(model):
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max().clamp(min=1e-30)
        error = ((got[name] - want[name]).abs().max() / scale).item()
        assert error < tolerance, f"{name}: {error}"


class Recorder:
    """A replacement of an optimizer that keeps the gradients of each step and changes nothing."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def step(self):
        self.steps.append(gradients(self.model))

    def zero_grad(self):
        self.model.zero_grad()


def blocks(path):
    """The Python code in a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
