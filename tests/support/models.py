"""Whether `with_head` and shared prompts are exact on the causal language models of transformers.

Every class that `AutoModelForCausalLM` knows is built in a tiny size. Log-probs and gradients through
`with_head` and `linear_logprob` are compared with those of the model's own logits, in float32, on two
sequences of which one is padded on the left. Where they are exact, so are the routes of
`grpo_fast.shared_prompt` (`tests.support.shared_models`). `python -m tests.support.models` prints a line
for each class and route; `--save` writes docs/models.md and docs/shared_prompt_models.md.
"""

import argparse
import logging
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import machine
from tests.support import shared_models

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TOLERANCE = 1e-5  # of the largest entry
LARGEST = 20_000_000  # weights; what is larger has a size that SIZES does not name
# Every name for a size that configurations use; each takes those that it has.
SIZES = {
    64: "vocab_size max_position_embeddings n_positions n_ctx max_sequence_length intermediate_size "
    "ffn_dim n_inner ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size "
    "decoder_ffn_dim encoder_ffn_dim mlp_dim expert_intermediate_size intermediate_size_mlp "
    "dense_ffn_hidden_size moe_shared_expert_intermediate_size vocab_size_per_layer_input d_ff",
    32: "hidden_size d_model n_embd embed_dim dim word_embed_proj_dim",
    4: "num_attention_heads n_head num_heads n_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts encoder_attention_heads "
    "linear_num_value_heads num_global_layers",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers "
    "num_key_value_heads num_kv_heads num_experts_per_tok linear_num_key_heads moe_k "
    "num_experts_per_token moe_topk",
    1: "n_group topk_group first_k_dense_replace num_nextn_predict_layers",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim q_lora_rank hidden_size_per_layer_input "
    "mamba_n_heads kv_lora_rank mamba_d_head mamba_d_state rotary_dim linear_key_head_dim "
    "linear_value_head_dim attention_head_size mamba_head_dim state_size",
}
BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}


def tiny(configuration: Any, **sizes: Any) -> Any:
    """A configuration of this class with every size that it has made small.

    Args:
        sizes: other attributes to set, where the class has them.
    """
    default = configuration()

    def settable(name: str) -> bool:
        own = getattr(configuration, name, None)
        read_only = isinstance(own, property) and own.fset is None
        return name in vars(default) and not read_only

    chosen: dict[str, Any] = {name: size for name, size in BY_NAME.items() if settable(name)}
    chosen |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    chosen |= {name: 0.0 for name in vars(default) if name.endswith(("dropout", "_pdrop"))}
    if "kv_lora_rank" in chosen:  # latent attention has as many keys as queries
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    kinds = getattr(default, "layer_types", None)
    if kinds and settable("layer_types"):  # the first two kinds, so that a hybrid stays one
        chosen["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[:2]
    chosen |= {name: size for name, size in sizes.items() if settable(name)}
    return configuration(**chosen)


def build(name: str, **sizes: Any) -> Any:
    """The tiny model of a model type, with other `sizes` where its configuration has them.

    Raises:
        ValueError: some size of it is not small.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    chosen: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    model_class = getattr(transformers, chosen if isinstance(chosen, str) else chosen[0])
    config = tiny(model_class.config_class, **sizes)
    with torch.device("meta"):
        size = sum(x.numel() for x in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} weights in the smallest size that was tried")
    torch.manual_seed(0)
    return model_class(config).float().eval()


def compare(model: Any) -> float:
    """The largest error of log-probs and gradients, relative to the largest entry."""
    from grpo_fast import linear_logprob
    from grpo_fast.integrations.transformers import Head, with_head

    torch.manual_seed(1)
    ids = torch.randint(3, 64, (2, 8))
    attention = torch.ones_like(ids)
    attention[0, :2] = 0
    targets, weights = ids[:, -4:], torch.randn(2, 4)

    def score(hidden: Tensor, head: Head) -> Tensor:
        return linear_logprob(hidden, head.weight, targets, **head.options)

    logits = model(input_ids=ids, attention_mask=attention).logits[:, -5:-1]
    want = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    (want * weights).sum().backward()
    exact = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    got = with_head(model, score, ids, attention, last=4)
    (got * weights).sum().backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    other = sorted(found.keys() ^ exact.keys())
    assert not other, f"gradients of other parameters: {other}"
    top = max(x.abs().max().item() for x in exact.values())
    errors = [(found[name] - exact[name]).abs().max().item() / top for name in exact]
    error = (got - want).detach().abs().max() / want.detach().abs().max()
    return max(error.item(), *errors)


def one(name: str) -> tuple[str, str]:
    """(outcome, why) of a model type: "exact", "refused" (by an error), "wrong" or "not built"."""
    from grpo_fast.integrations.transformers import check_head

    try:
        model = build(name)
        model(input_ids=torch.randint(3, 64, (2, 8)), attention_mask=torch.ones(2, 8).long())
    except Exception as error:  # whatever its code raises for sizes that it did not expect
        return "not built", _short(error)
    try:
        check_head(model)
        largest = compare(model)
    except (TypeError, ValueError) as refusal:
        return "refused", _short(refusal)
    return "exact" if largest <= TOLERANCE else "wrong", f"{largest:.1e}"


HEADER = """\
# Which models `with_head` is exact on

This page lists the causal language models of transformers on which `with_head` is exact, those that
it refuses, and those that were not tried.

`python -m tests.support.models --save` wrote it on commit {commit}, with transformers {transformers}
and torch {torch}, on a CPU in float32. Each of the {total} classes that `AutoModelForCausalLM` of
this version knows was built in a tiny size with random weights. It was run on two sequences, one of
them padded on the left. The log-probs and the gradients of all parameters through `with_head` and
`linear_logprob` were compared with those of the model's own logits. "Exact" means that the largest
error is at most {tolerance} of the largest entry.

"""
SECTIONS = {
    "wrong": "## Wrong\n\nThe results differ, and no error says so.\n",
    "exact": "## Exact\n",
    "refused": "## Refused\n\nAn error names the reason, in TRL before training starts, else in "
    "`check_head`. Most of these\nmodels have layers between the last hidden states and the head.\n",
    "not built": "## Not tried\n\nA tiny model of these could not be built with the sizes that the "
    "program knows, or they need other\ninputs or packages.\n",
}


def page(found: dict[str, tuple[str, str]]) -> str:
    """docs/models.md.

    Args:
        found: of each model type, what `one` returned.
    """
    about = versions() | {"total": len(found), "tolerance": TOLERANCE}
    parts = [HEADER.format(**about)]
    for outcome, text in SECTIONS.items():
        names = [name for name, (came, _) in found.items() if came == outcome]
        if names:
            listed = f"{len(names)} model types: {', '.join(f'`{name}`' for name in names)}."
            parts.append(f"{text}\n{textwrap.fill(listed, 100, break_on_hyphens=False)}\n\n")
    return "".join(parts).rstrip() + "\n"


def versions() -> dict[str, Any]:
    """The commit, and the versions of the packages that a page names."""
    import transformers

    about = {"commit": machine.commit(), "transformers": transformers.__version__}
    return about | {"torch": torch.__version__.split("+")[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write both pages")
    options = parser.parse_args(arguments)
    quiet()
    found, shared = {}, {}
    for name in names():
        found[name] = one(name)
        print(f"{name}: {': '.join(found[name])}", flush=True)
        if found[name][0] == "exact":
            shared[name] = shared_models.one(name)
            for route, (outcome, why) in shared[name].items():
                print(f"    {route}: {outcome}: {why}", flush=True)
    if options.save:
        pages = page(found), shared_models.page(shared, versions())  # before the tree has changed
        PAGE.write_text(pages[0])
        shared_models.PAGE.write_text(pages[1])
    wrong = [name for name, x in shared.items() if shared_models.section_of(x) == "wrong"]
    return int(any(outcome == "wrong" for outcome, _ in found.values()) or bool(wrong))


def quiet() -> None:
    """Nothing that transformers says of sizes it would not have chosen."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:150]}"


def names() -> list[str]:
    """The model types that `AutoModelForCausalLM` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


if __name__ == "__main__":
    sys.exit(main())
