"""The README's part about measurements."""

import json
from pathlib import Path

import pytest

from benchmarks.report import document as report
from tests.support.results import entry, gpu_results, head_entry, write, write_result

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="gpu_results")
def made_results(tmp_path):
    return gpu_results(tmp_path)


def test_the_headline_says_which_machine_and_when(gpu_results):
    text = report.headline(gpu_results)
    assert "No GPU" not in text
    assert "NVIDIA H200, commit 19274bf, 2026-01-01" in " ".join(text.split())
    assert "| grpo_fast | 2.60 ms | 11.54x | 5,120 MiB |" in text


def test_the_headline_speaks_in_sentences(gpu_results):
    realistic = [
        entry(who, stem="linear_grpo", variant="realistic", roof="gemm", median=seconds)
        for who, seconds in (("grpo_fast", 0.03), ("eager", 0.12))
    ]
    write(gpu_results, "realistic", realistic, commit="bbbbbbb", date="2025-01-01")
    write(gpu_results, "again", realistic)
    text = report.headline(gpu_results)
    said, *tables_ = text.split("\n\n")
    said = " ".join(said.split())
    assert said.startswith(
        "On one NVIDIA H200, measured 2026-01-01 at commit 19274bf: loss and gradients from 16,384 x "
        "152,064 bfloat16 logits take 2.60 ms, 96 % of the rate of a plain copy; eager PyTorch takes "
        "30.00 ms, the fastest other library (liger) 4.00 ms. The same loss from hidden states"
    )
    assert "takes 75.00 ms, 1.07 times its three matrix multiplications alone" in said
    assert "On a realistic batch it takes 30.00 ms; eager PyTorch takes 120.00 ms." in said
    assert sum(part.startswith("| | time | faster") for part in tables_) == 3
    assert max(map(len, text.split("\n\n")[0].splitlines())) <= 100


def test_the_headline_names_another_commit(gpu_results):
    write(
        gpu_results,
        "heads",
        [head_entry("grpo_fast", 16_384, 0.07, "qwen2.5-7b-16k")],
        commit="bbbbbbb",
        date="2026-02-02",
    )
    said = " ".join(report.headline(gpu_results).split())
    assert "(measured 2026-02-02 at commit bbbbbbb)." in said


def test_without_a_gpu_the_headline_says_so(tmp_path):
    write_result(tmp_path)
    text = report.headline(tmp_path)
    assert text.startswith("**No GPU has run the benchmarks yet.**")
    assert "| |" not in text, "a table needs results of this project"


def cpu_results(folder, *entries_):
    info = {"device": "CPU X", "device_type": "cpu", "command": "c", "threads": 1, "absent": {}}
    info |= {"commit": "19274bf", "dirty": False, "bandwidth": {"copy": 1e9}}
    info |= dict.fromkeys(("driver", "torch", "triton", "python"))
    (folder / "cpu").mkdir()
    document = {"machine_info": info, "datetime": "2026-01-01T00:00:00", "benchmarks": entries_}
    (folder / "cpu" / "x.json").write_text(json.dumps(document))


def test_the_headline_has_the_rows_without_a_gain(tmp_path):
    about = {"stem": "policy_loss", "shape": "small", "N": 2048}
    slow = [entry(who, median=t, **about) for who, t in (("grpo_fast", 4e-3), ("eager", 1e-3))]
    for made in slow:
        made["extra_info"]["sizes"] |= {"V": 0}
    other = [entry("grpo_fast", "second", median=1e-3), entry("eager", "second", median=5e-3)]
    fast = [entry("grpo_fast", median=1e-3), entry("grpo_fast-inplace", median=0.5e-3)]
    fast += [entry("eager", median=2e-3), entry("compile", median=0.8e-3)]
    cpu_results(tmp_path, *slow, *fast, *other)
    said = " ".join(report.headline(tmp_path).split())
    assert (
        "3 cases were measured beside eager PyTorch, and grpo_fast is slower in 1 of them" in said
    )
    assert (
        "| loss from log-probs, and gradients | 2,048 tokens | 4.00 ms | 1.00 ms | 0.25x | | | "
        "CPU X, 19274bf |"
    ) in said
    assert (
        "| grpo, loss and gradients | 16,384 x 152,064 | 1.00 ms | 2.00 ms | 2.00x | "
        "0.80 ms (compile) | 0.80x | CPU X, 19274bf |"
    ) in said.replace("800.0 µs", "0.80 ms")
    assert "second" not in said
    assert "5.00x" not in said, "one row for an operation: that of its first shape"


def test_the_headline_compares_the_other_operations_and_the_step(gpu_results):
    logprob = [
        entry(who, stem="logprob", median=t) for who, t in (("grpo_fast", 2e-3), ("trl", 1e-3))
    ]
    write(gpu_results, "logprob", logprob)
    step = {"model": "qwen2.5-7b", "dtype": "bfloat16", "mode": "lora", "peak_bytes": 30 << 30}
    step |= {"kind": "batch", "B": 4, "P": 256, "T": 1024, "tokens_per_second": 1.0}
    heads = [
        step | {"provider": who, "seconds": t} for who, t in (("trl", 2.0), ("grpo_fast", 2.5))
    ]
    write(gpu_results, "step", [], step=heads)
    text = report.headline(gpu_results)
    row = "| 16,384 x 152,064 | 2.00 ms |  |  | 1.00 ms (trl) | 0.50x |"
    assert f"| log-probs from logits, and gradients {row}" in text
    assert "| trl | 2,000.00 ms | 30,720 MiB |\n| grpo_fast | 2,500.00 ms | 30,720 MiB |" in text
    assert "(qwen2.5-7b, bfloat16, lora) on 4 x (256 + 1024) tokens" in text


def test_the_readme_holds_the_generated_table():
    readme = (ROOT / "README.md").read_text()
    text = report.headline(report.FOLDER / "results")
    assert readme == report.with_headline(readme, text), "run python -m benchmarks.report"
