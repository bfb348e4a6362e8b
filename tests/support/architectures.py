"""Tiny models of real architectures, with random weights."""

import pytest
import torch

from grpo_fast.integrations.transformers import (
    with_head,
)
from grpo_fast.loss import linear_grpo_loss

transformers = pytest.importorskip("transformers", reason="the models are Hugging Face's")
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}

GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1}

# A cap and scales far from 1, so that leaving one out shows.
MODELS = {
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen2-tied": {"tie_word_embeddings": True},
    "Qwen3": {"tie_word_embeddings": False},
    "Qwen3-tied": {"tie_word_embeddings": True},
    "Llama": {"tie_word_embeddings": False},
    "Llama-tied": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 1.5},
    "Gemma3Text": {"final_logit_softcapping": 1.5},
    "Gemma3Text-uncapped": {"final_logit_softcapping": None},
    "Cohere": {"logit_scale": 0.0625},
    "Granite": {"logits_scaling": 6.0},
    "Granite-untied": {"logits_scaling": 6.0, "tie_word_embeddings": False},
    "Phi": {"tie_word_embeddings": False},  # a head with a bias
    "Mixtral": {"num_local_experts": 4},
    "GPT2": {},
}


def config_of(name, options):
    family = name.split("-")[0]
    config = getattr(transformers, f"{family}Config")
    return config(**((GPT2 if family == "GPT2" else COMMON) | options))


def build(name):
    """A tiny random model with its logits spread out, so that a wrong head shows."""
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, MODELS[name])).eval()
    spread_out(model)
    return model


def spread_out(model):
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.3)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()


def batch():
    """Prompts padded on the left, completions on the right."""
    ids = torch.randint(2, 61, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1, 7:] = 0
    return ids, mask


T = 4  # the last tokens, which count


def fused_loss(model, ids, mask, **options):
    """The loss of the last tokens through the hidden states and the head."""

    def function(hidden, head):
        given = {"advantages": torch.tensor([1.0, -0.5, 2.0]), "mask": mask[:, -T:]}
        return linear_grpo_loss(hidden, head.weight, ids[:, -T:], **given, **head.options).loss

    return with_head(model, function, ids, mask, last=T, **options)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
