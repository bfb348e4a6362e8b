"""The predicted memory of a run: against measured updates and processes, published sizes, and arithmetic.

`pytest tests/trainer/test_sizing.py -k whole_process --slow -s` measures all processes, and prints a row for
each of them.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from transformers import AutoConfig, AutoModelForCausalLM

from grpo_fast import Objective, shared_prompt
from grpo_fast.integrations.transformers import causal_lm
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.trainer import fitting, sizing
from grpo_fast.trainer import workload as workloads
from grpo_fast.trainer.allocations import Allocations
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.known_models import KNOWN
from grpo_fast.trainer.model import character_tokenizer
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.sizing import GIB, START, Workload
from grpo_fast.trainer.update import micro_batches_of

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
    "llama, fork": (
        small("llama"),
        {"prompt_tokens": 256, "completion_tokens": 32, "route": "fork"},
    ),
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
    "llama, one micro-batch": (small("llama"), {"share_prompts": False, "prompts_per_step": 1}),
    "llama, one micro-batch, many weights": (
        small("llama", hidden_size=384, intermediate_size=1536),
        {"completion_tokens": 64, "prompts_per_step": 1},
    ),
    "llama, many weights": (
        small("llama", hidden_size=384, intermediate_size=1536),
        {"prompt_tokens": 8, "completion_tokens": 8},
    ),
}


def measured_peak(config, workload):
    """Take two optimizer steps on real tensors, and return the peak of the second.

    Each is of two micro-batches, unless the workload has one in a step.
    """
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
    ][: w.prompts_per_step]
    counted = Allocations()
    for x in (*model.parameters(), *model.buffers()):
        counted.hold(x)
    reference = counted.live if w.beta and not w.use_peft else 0
    route = w.route if w.share_prompts else "unshared"
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


def test_a_tied_head_has_two_gradients_at_once_and_no_third_one():
    # Autograd adds the second one to the first in place, though not within a dispatch mode.
    weight = torch.nn.Parameter(torch.randn(4096, 256))
    ids = torch.tensor([3, 5])
    with Allocations() as counted:
        counted.hold(weight)
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        loss = torch.nn.functional.linear(hidden, weight).logsumexp(-1).sum()
        counted.peak = before = counted.live
        loss.backward()
    gradient = weight.numel() * 4
    assert (counted.peak - before) / gradient == pytest.approx(2, abs=0.1)
    assert (counted.live - before) / gradient == pytest.approx(1, abs=0.1)


def test_a_gradient_that_goes_two_ways_is_not_overwritten():
    x = torch.randn(1024, 1024, requires_grad=True)
    with Allocations() as counted:
        loss = ((x + x) * 3).sum()
        counted.peak = before = counted.live
        loss.backward()
    # The gradient of the sum, which both operands have, and their own sum.
    assert (counted.peak - before) / (x.numel() * 4) == pytest.approx(2, abs=0.1)
    assert x.grad.eq(6).all()


LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = 1  # never sampled, so that all completions have their greatest length
MASK, FORK = {"share_prompts": "mask"}, {"share_prompts": "fork"}
# A model, the length of the prompts, and options of `train`; the phase with the peak differs.
PROCESSES = {
    "full, tied, 65,536 entries": (
        ("qwen2", {"vocab_size": 65_536, "hidden_size": 256, "num_hidden_layers": 2}, True),
        8,
        {"max_new_tokens": 8, "prompts_per_step": 2, "micro_batch_tokens": 40, **MASK},
    ),
    "full, untied, weights": (
        ("llama", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4}, False),
        16,
        {"max_new_tokens": 16, **MASK},
    ),
    "full, untied, activations": (
        ("llama", {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}, False),
        64,
        {"max_new_tokens": 64, "group_size": 8, "share_prompts": "off"},
    ),
    "full, recomputed, fork": (
        ("llama", {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}, False),
        256,
        {"max_new_tokens": 64, "group_size": 8, "gradient_checkpointing": True, **FORK},
    ),
    "full, several micro-batches": (
        ("llama", {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}, False),
        64,
        {"max_new_tokens": 32, "prompts_per_step": 2, "micro_batch_tokens": 200, **MASK},
    ),
    "full, bfloat16, float32 copies": (
        ("llama", {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 16_384}, False),
        32,
        {"max_new_tokens": 16, "dtype": "bfloat16", "weights": "bfloat16", **MASK},
    ),
    "full, KL": (
        ("qwen3", {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192}, False),
        32,
        {"max_new_tokens": 16, "beta": 0.04, **MASK},
    ),
    "LoRA, fork": (
        ("qwen3", {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}, False),
        256,
        {"max_new_tokens": 64, "use_peft": True, **FORK},
    ),
    "LoRA, tied, recomputed, 32,768 entries": (
        ("qwen2", {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 32_768}, True),
        256,
        {"max_new_tokens": 96, "use_peft": True, "gradient_checkpointing": True, **FORK},
    ),
    "LoRA, tied, 64 completions sampled": (
        ("qwen2", {"vocab_size": 65_536, "hidden_size": 64, "num_hidden_layers": 2}, True),
        8,
        {"max_new_tokens": 4, "group_size": 64, "use_peft": True, **FORK},
    ),
}
FEW = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TRAIN = """
import re, sys
from grpo_fast.trainer.cli import main
status = main(["train", *sys.argv[1:]])
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(status)
"""
REWARD = """
import itertools
count = itertools.count()
def noise(completions, **_):
    return [float(next(count) % 3) for _ in completions]
"""


def write_model(folder, model):
    """Write a model with random weights that never samples END, and its tokenizer."""
    kind, sizes, tied = model
    tokenizer = character_tokenizer(LETTERS)
    ends = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}
    config = small(kind, **sizes, tie_word_embeddings=tied, **ends)
    written = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        written.get_input_embeddings().weight[:, 0] = 10.0
        written.get_output_embeddings().weight[END] = 0.0
        written.get_output_embeddings().weight[END, 0] = -30.0
    written.generation_config.update(**ends)
    written.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return config


def trained(folder, model, P, options):
    """Run `train` for two steps in a process; return its peak of resident memory, and the prediction."""
    folder.mkdir()
    config = write_model(folder / "model", model)
    prompts = ["".join(LETTERS[(7 * i + j * j) % 26] for j in range(P)) for i in range(8)]
    rows = [json.dumps({"prompt": prompt, "answer": ""}) for prompt in prompts]
    (folder / "data.jsonl").write_text("\n".join(rows))
    (folder / "noise.py").write_text(REWARD)
    options = {
        "model": str(folder / "model"), "dataset": str(folder / "data.jsonl"), "steps": 2,
        "reward": ["noise:noise"], "reward_dir": str(folder), "output_dir": str(folder / "runs"),
        "name": "run", "device": "cpu", "dtype": "float32", "threads": 1, "beta": 0.0, "heldout": 1,
        "samples": 0, "completions_steps": 0, "prompts_per_step": 1, "group_size": 4, **options,
    }  # fmt: skip
    given = {name: x[0] if isinstance(x, list) else x for name, x in options.items()}
    arguments = [f"--{name}" if x is True else f"--{name}={x}" for name, x in given.items()]
    # Memory that is freed goes back to the system at once.
    exact = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_ARENA_MAX": "1",
    }
    env = {**os.environ, **exact, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(x) for x in (folder / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [row["completion_length"] for row in metrics] == [options["max_new_tokens"]] * 2
    found = sizing.predict(config, workloads.of(TrainConfig(**options), P), compared=False)
    return int(re.search(r"peak (\d+)", done.stdout)[1]) << 10, found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is of Linux")
@pytest.mark.parametrize("name", PROCESSES)
def test_a_prediction_is_the_peak_of_a_whole_process(name, tmp_path, request):
    if name != next(iter(PROCESSES)) and not request.config.getoption("--slow"):
        pytest.skip("one process of these stands for all without --slow")
    (kind, sizes, tied), P, options = PROCESSES[name]
    least, few = trained(tmp_path / "few", (kind, FEW, tied), 4, options | {"max_new_tokens": 4})
    most, many = trained(tmp_path / "many", (kind, sizes, tied), P, options)
    predicted, measured = many.peak - few.peak, most - least
    phase = max(many.phases, key=many.phases.get)
    share = 100 * (predicted / measured - 1)
    sizes = f"{predicted / 2**20:.0f} MiB | {measured / 2**20:.0f} MiB | {share:+.1f} %"
    print(f"\n| {name} | {phase}, {many.route} | {sizes} |")
    assert predicted == pytest.approx(measured, rel=0.10)


def test_many_layers_are_extrapolated_from_a_few(monkeypatch):
    config = small("qwen2", num_hidden_layers=9)
    workload = dataclasses.replace(SHORT, use_peft=True, gradient_checkpointing=True)
    found = sizing.predict(config, workload, compared=False)
    monkeypatch.setattr(sizing, "LAYERS", (9, 9))
    sizing._update.cache_clear()
    whole = sizing.predict(config, workload, compared=False)
    sizing._update.cache_clear()
    assert found.peak == pytest.approx(whole.peak, rel=0.01)


def test_an_instruct_model_may_have_fewer_positions_than_its_base():
    names = ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-0.6B")
    positions = [sizing.known_config(name).max_position_embeddings for name in names]
    assert positions == [131_072, 32_768, 40_960]


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


@pytest.mark.parametrize("layout", ["packed", "shared", "apart"])
@pytest.mark.parametrize("sizes", [(512, 256, 8), (64, 1024, 4), (600, 900, 2), (100, 40, 16)])
def test_micro_batches_have_as_many_completions_as_those_of_the_trainer(sizes, layout):
    P, R, G = sizes
    route = "fork" if layout == "shared" else "auto"
    planned = Workload(P, R, G, share_prompts=layout != "apart", route=route, prompts_per_step=8)
    prompts = torch.arange(8).repeat_interleave(G)[:, None].expand(-1, P)
    ones = torch.ones(8 * G, R, dtype=torch.bool)
    texts = [""] * len(ones)
    rollout = Rollout(
        prompts, torch.ones_like(prompts), ones.long(), ones, ones[:, 0], texts, texts
    )
    config = TrainConfig(model="none", group_size=G, micro_batch_tokens=planned.micro_batch_tokens)
    found = micro_batches_of(rollout, ones[:, 0], config, layout)
    assert max(map(len, found)) == planned.completions
    assert (len(found) == 1) == planned.at_once


def test_the_start_of_fsdp_takes_all_weights_of_each_process():
    config = small("llama", num_hidden_layers=24, vocab_size=64)
    plain = Workload(
        prompt_tokens=4, completion_tokens=4, world_size=64, fsdp=True, prompts_per_step=1,
        group_size=2, share_prompts=False,
    )  # fmt: skip
    found = sizing.predict(config, plain, compared=False)
    layer = (found.parameters - 2 * 64 * 128 - 128) // 24
    assert found.phases[START] == found.peak == 4 * found.parameters + 4 * layer // 64
    assert found.host == 64 * 4 * found.parameters
    more = dataclasses.replace(plain, beta=0.04)
    with_copy = sizing.predict(config, more, compared=False).phases[START]
    assert with_copy - found.phases[START] == 4 * found.parameters
    lora = dataclasses.replace(more, use_peft=True)
    adapted = sizing.predict(config, lora, compared=False)
    whole = 2 * found.parameters + 4 * adapted.trained
    assert adapted.phases[START] == pytest.approx(whole, rel=0.03)
    text = fitting.table(config, more, found.peak)
    assert "The peak is at the start" in text
    assert "--beta 0: saves" in text
    assert "At the start 64 processes have all weights in the machine's memory" in text


def test_without_fsdp_a_gpu_needs_least_at_the_start():
    found = sizing.predict(
        small("llama"), dataclasses.replace(SHORT, device="cuda", route="fork"), compared=False
    )
    assert START not in found.phases


def test_advice_names_another_route_than_fork():
    config = small("llama", hidden_size=512, intermediate_size=2048)
    fork = dataclasses.replace(SHORT, completion_tokens=16, group_size=2, route="fork")
    text = "\n".join(fitting.advice(config, fork, GIB))
    assert "--share_prompts mask: saves" in text
    assert "--share_prompts off: saves" in text

    def notes(work):
        return fitting.notes(sizing.predict(config, work, compared=False), work)

    assert "Route fork uses each weight twice" in notes(fork)[0]
    assert notes(dataclasses.replace(fork, route="mask")) == []
    assert notes(dataclasses.replace(fork, use_peft=True)) == []
    alone = dataclasses.replace(fork, route="mask", fsdp=True)
    assert "give the number of processes" in notes(alone)[0]
    assert "give the number" not in "".join(notes(dataclasses.replace(alone, world_size=2)))


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
    workload = dataclasses.replace(
        SHORT, device="cuda", sampling_tokens=None, prompts_per_step=1, completion_tokens=512,
        route="fork",
    )  # fmt: skip
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
