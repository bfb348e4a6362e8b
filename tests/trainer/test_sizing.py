"""The predicted memory of a run: against measured updates, published sizes, and arithmetic."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from transformers import AutoConfig, AutoModelForCausalLM

from grpo_fast import Objective, shared_prompt
from grpo_fast.integrations.transformers import causal_lm
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.trainer import fitting, sizing
from grpo_fast.trainer.allocations import Allocations
from grpo_fast.trainer.known_models import KNOWN
from grpo_fast.trainer.sizing import GIB, Workload

PUBLISHED = {  # numbers of weights
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}
SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
SHORT = Workload(
    prompt_tokens=64, completion_tokens=48, group_size=4, micro_batch_tokens=None, dtype="float32",
    sampling_tokens=0, device="cpu",
)  # fmt: skip


def small(kind, **sizes):
    return AutoConfig.for_model(kind, **SIZES | sizes)


# A configuration and a workload; the largest part differs from case to case.
CASES = {
    "llama": (small("llama"), {}),
    "llama, recomputed": (small("llama"), {"gradient_checkpointing": True}),
    "llama, fork": (small("llama"), {"prompt_tokens": 256, "completion_tokens": 32}),
    "qwen2, unshared, tied, large vocabulary": (
        small("qwen2", vocab_size=16_384, tie_word_embeddings=True),
        {"share_prompts": False},
    ),
    "qwen3, recomputed, long": (
        small("qwen3", head_dim=64),
        {"gradient_checkpointing": True, "completion_tokens": 128, "beta": 0.04},
    ),
    "qwen3, LoRA": (small("qwen3", head_dim=64), {"use_peft": True}),
    "qwen2, LoRA, recomputed": (
        small("qwen2", hidden_size=256, intermediate_size=1024),
        {"use_peft": True, "gradient_checkpointing": True},
    ),
    "qwen3, tied, the end of the backward": (
        small("qwen3", head_dim=64, hidden_size=256, vocab_size=16_384, tie_word_embeddings=True),
        {"prompt_tokens": 8, "completion_tokens": 8},
    ),
    "llama, many weights": (
        small("llama", hidden_size=384, intermediate_size=1536),
        {"prompt_tokens": 8, "completion_tokens": 8},
    ),
}


def measured_peak(config, workload):
    """Take two optimizer steps of two micro-batches on real tensors, and return the peak of the second."""
    torch.manual_seed(0)
    w = workload
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if w.use_peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=w.lora_r, target_modules="all-linear")).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    G, P, R = w.group_size, w.prompt_tokens, w.completion_tokens
    prompts, completions = torch.randint(512, (2, P)), torch.randint(512, (2, G, R))
    plans = [
        shared_prompt.plan(prompts[i].repeat(G, 1), completions[i], group_size=G) for i in (0, 1)
    ]
    counted = Allocations()
    for x in (*model.parameters(), *model.buffers()):
        counted.hold(x)
    reference = counted.live if w.beta and not w.use_peft else 0
    route = "auto" if w.share_prompts else "unshared"
    objective = Objective.preset("grpo", beta=w.beta)

    def loss(hidden, head, plan):
        return linear_grpo_loss(
            hidden, head.weight, plan.targets, **head.options, cu_seqlens=plan.cu_seqlens,
            advantages=torch.ones(G), objective=objective, return_entropy=True,
            ref_logps=torch.zeros(len(plan.targets)) if w.beta else None,
        ).loss  # fmt: skip

    def step():
        for p in trained:
            p.grad = None
        for plan in plans:
            out = shared_prompt.with_head(
                model,
                plan,
                lambda hidden, head, plan=plan: loss(hidden, head, plan),
                route=route,
                recompute=w.gradient_checkpointing,
            )
            out.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    with counted:
        step()
        counted.peak = counted.live
        step()
    return counted.peak + reference


@pytest.mark.parametrize("name", CASES)
def test_a_prediction_is_the_peak_of_a_real_update(name):
    config, changed = CASES[name]
    workload = dataclasses.replace(SHORT, **changed)
    found = sizing.predict(config, workload, compared=False)
    assert found.peak == pytest.approx(measured_peak(config, workload), rel=0.02)


def test_many_layers_are_extrapolated_from_a_few(monkeypatch):
    config = small("qwen2", num_hidden_layers=9)
    workload = dataclasses.replace(SHORT, use_peft=True, gradient_checkpointing=True)
    found = sizing.predict(config, workload, compared=False)
    monkeypatch.setattr(sizing, "LAYERS", (9, 9))
    sizing._update.cache_clear()
    whole = sizing.predict(config, workload, compared=False)
    sizing._update.cache_clear()
    assert found.peak == pytest.approx(whole.peak, rel=0.01)


def test_known_models_have_the_published_numbers_of_weights():
    assert PUBLISHED.keys() == KNOWN.keys()
    for name, count in PUBLISHED.items():
        config = sizing.known_config(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_a_name_with_owner_and_ending_is_known():
    assert sizing.known_config("Qwen/Qwen2.5-7B-Instruct").hidden_size == 3584
    assert sizing.known_config("meta-llama/Llama-3.1-8B").rope_parameters["rope_type"] == "llama3"
    assert sizing.known_config("somebody/Qwen2.5-70B") is None


@pytest.mark.parametrize("name", KNOWN)
def test_a_tiny_model_runs(name):
    config = sizing.tiny(sizing.known_config(name))
    model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert config.model_type == KNOWN[name]["model_type"]
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()


def test_describe_reads_a_folder_and_a_file_and_names_what_it_knows(tmp_path):
    small("llama").save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert sizing.describe(str(path)).hidden_size == 128
    with pytest.raises(ValueError, match=r"no/such/model.*known without it: Qwen2\.5-0\.5B"):
        sizing.describe("no/such/model")


def test_sizes_of_gpus():
    assert sizing.parse_size("24GB") == sizing.parse_size("24 GiB") == sizing.parse_size("24")
    assert sizing.parse_size("24GB") == int(24 * GIB * 0.96) - GIB
    for wrong in ("big", "0GB", "-1GB", "24TB"):
        with pytest.raises(ValueError, match="want a size like 24GB"):
            sizing.parse_size(wrong)


def test_what_is_held_follows_from_the_numbers_of_weights():
    config = small("llama", num_hidden_layers=1)
    count = sum(p.numel() for p in causal_lm(AutoModelForCausalLM.from_config(config)).parameters())
    half = dataclasses.replace(SHORT, dtype="bfloat16", beta=0.04)
    cases = {
        "float32": (4, 4, 8, 0, 4),
        "bfloat16": (2, 4, 8, 4, 2),
        "bfloat16_only": (2, 2, 2 * (1 + 4 / 256), 0, 2),
    }
    for weights, sizes in cases.items():
        optim = "adamw_torch_8bit" if weights == "bfloat16_only" else "adamw_torch"
        found = sizing.predict(
            config, dataclasses.replace(half, weights=weights, optim=optim), compared=False
        )
        held = (found.weights, found.gradients, found.optimizer, found.master, found.reference)
        assert held == tuple(int(size * count) for size in sizes), weights
    lora = dataclasses.replace(half, use_peft=True)
    found = sizing.predict(config, lora, compared=False)
    assert found.reference == 0
    assert found.gradients == 4 * found.trained < 4 * count
    assert found.weights == 2 * count + 4 * found.trained
    packed = sizing.predict(config, dataclasses.replace(lora, quantize="bnb-4bit"), compared=False)
    linear = count - 2 * 512 * 128 - 3 * 128  # without embeddings, head and norms
    assert found.weights - packed.weights == pytest.approx((2 - 0.516) * linear, rel=1e-3)


def test_shared_processes_divide_what_is_held():
    config = small("llama")
    full = dataclasses.replace(SHORT, weights="float32")
    alone = sizing.predict(config, full, compared=False)
    shared = dataclasses.replace(full, world_size=4, fsdp=True)
    assert sizing.predict(config, shared, compared=False).held == alone.held // 4


def test_a_batch_is_filled_up_to_its_tokens():
    workload = dataclasses.replace(SHORT, micro_batch_tokens=2 * (64 + 4 * 48) + 64 + 2 * 48)
    assert workload.completions == 10
    assert dataclasses.replace(workload, share_prompts=False).completions == 672 // 112
    assert dataclasses.replace(workload, micro_batch_tokens=1).completions == 1
    assert dataclasses.replace(workload, prompts_per_step=1).completions == 4
    assert dataclasses.replace(workload, sampling_tokens=112 * 3 + 5).sampled == 3


def test_longest_is_where_the_peak_meets_the_budget():
    config = small("llama", max_position_embeddings=2048)
    workload = dataclasses.replace(SHORT, prompts_per_step=1)
    at = {
        length: sizing.predict(
            config, dataclasses.replace(workload, completion_tokens=length), compared=False
        ).peak
        for length in (512, 640)
    }
    assert fitting.longest(config, workload, at[640] - 1) == 512
    assert fitting.longest(config, workload, 1) == 0
    assert fitting.longest(config, workload, 1 << 40) == 1920  # what its positions allow


def test_the_table_says_whether_it_fits_and_what_helps():
    config = small("llama", hidden_size=256, intermediate_size=1024)
    workload = dataclasses.replace(SHORT, device="cuda", sampling_tokens=None, prompts_per_step=1)
    peak = sizing.predict(config, workload, compared=False).peak
    text = fitting.table(config, workload, peak)
    assert "Fits: the predicted peak is" in text
    assert "--gradient_checkpointing: saves" in text
    text = fitting.table(config, workload, peak // 2)
    assert "Does not fit" in text
    assert "; fits" in text


def test_eager_logits_and_separate_prompts_take_more():
    config = small("llama", vocab_size=32_000)
    workload = dataclasses.replace(SHORT, device="cuda", prompt_tokens=512, completion_tokens=256)
    found = sizing.predict(config, workload)
    tokens = 4 * 256
    assert found.eager_loss > 3 * 4 * tokens * 32_000
    assert found.eager_loss > 2 * found.loss
    assert found.unshared > found.activations + found.working
