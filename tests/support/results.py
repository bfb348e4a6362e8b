"""Invented benchmark results, for the tests of the pages that publish results."""

import json
import statistics
import time
from types import SimpleNamespace

S0 = {"B": 16, "T": 1024, "V": 152_064, "G": 4, "D": 3584}


def write_result(folder, commit="19274bf", median=1.0, day=1, **info):
    extra = {
        "stem": "grpo",
        "case": "forward",
        "provider": "eager",
        "shape": "s",
        "variant": "full",
    }
    extra |= {"sizes": {"B": 1, "T": 1, "V": 9}, "dtype": "float32", "bytes": 10, "roof": "copy"}
    stats = {"median": median, "iqr": 0.0}
    info = {"device": "D", "device_type": "cpu", "command": "c", "threads": 1, **info}
    info |= dict.fromkeys(("driver", "torch", "triton", "python"))
    info |= {"commit": commit, "dirty": False, "absent": {}, "bandwidth": {"copy": 1e9}}
    entry = {"extra_info": {**extra, "peak_extra_bytes": None}, "stats": stats}
    path = folder / "d" / f"{commit}-{day}.json"
    path.parent.mkdir(exist_ok=True)
    date = f"2026-01-{day:02}T00:00:00"
    path.write_text(json.dumps({"machine_info": info, "datetime": date, "benchmarks": [entry]}))
    return path


def entry(provider, shape="qwen2.5-7b-16k", stem="grpo", median=2.6e-3, **extra):
    N = extra.pop("N", 16_384)
    info = {
        "stem": stem,
        "case": "forward_backward",
        "provider": provider,
        "shape": shape,
        "variant": "full",
        "sizes": S0 | {"B": N // 1024},
        "dtype": "bfloat16",
        "live_tokens": N,
        "moving_tokens": N,
        "bytes": 10**10,
        "flops": 0,
        "roof": "copy",
        "peak_extra_bytes": 5 << 30,
        "errors": {"value": 1e-3},
    }
    stats = {"median": median, "iqr": 1e-5}
    return {"name": "x", "extra_info": info | extra, "stats": stats}


def head_entry(provider, N, median, shape):
    about = {"bare_gemms_seconds": 0.07, "inputs": {"blocks_kept": 0.3}}
    return entry(provider, shape, "linear_grpo", median, N=N, roof="gemm", flops=10**13, **about)


def write(
    folder, name, entries, absent=None, commit="19274bf", date="2026-01-01", roofs=True, **more
):
    info = {"device": "NVIDIA H200", "device_type": "cuda", "command": "c", "threads": 1}
    info |= dict.fromkeys(("driver", "torch", "triton", "python"), "1")
    info |= {"commit": commit, "dirty": False, "absent": absent or {}}
    if roofs:
        info |= {"bandwidth": {"copy": 4e12, "read": 4e12}, "gemm": {"bfloat16": 7e14}}
    document = {"machine_info": info, "datetime": f"{date}T00:00:00"}
    if entries is not None:
        document["benchmarks"] = entries
    (folder / "h200").mkdir(exist_ok=True)
    (folder / "h200" / f"{name}.json").write_text(json.dumps(document | more))


def gpu_results(folder):
    """Fills the folder with what a GPU could have measured, and returns it."""
    own = [entry("eager", median=30e-3), entry("grpo_fast")]
    write(folder, "grpo", own)
    peer = [entry("liger", median=4e-3), head_entry("liger-chunked", 16_384, 0.4, "qwen2.5-7b-16k")]
    absent = {
        "linear_grpo cce": "not installed: cut_cross_entropy",
        "grpo bench_forward_backward[gpt2-16k-full-liger]": "crashed: SIGSEGV",
    }
    write(folder, "peer", peer, absent)
    heads = [
        head_entry(who, N, seconds * N / 16_384, f"qwen2.5-7b-{N // 1024}k")
        for N in (16_384, 4096)
        for who, seconds in (("eager", 0.12), ("grpo_fast", 0.075))
    ]
    write(folder, "heads", heads)
    step = {"model": "qwen2.5-7b", "dtype": "bfloat16", "mode": "lora", "provider": "eager"}
    batch = {"kind": "batch", "B": 4, "P": 256, "T": 1024, "seconds": 2.0, "peak_bytes": 30 << 30}
    longest = {"kind": "longest", "cap_bytes": 24e9, "fits": 8192, "fails": None, "B": 1, "P": 256}
    rows = [step | batch | {"tokens_per_second": 2560.0}, step | longest]
    write(folder, "step", [], {"7B step, full, trl": "not installed: trl"}, step=rows)
    return folder


class Benchmark:
    """Stands in for pytest-benchmark's fixture, which does nothing beside pytest-xdist."""

    def __init__(self, name):
        self.name, self.group, self.extra_info, self.stats = name, None, {}, None

    def pedantic(self, target, setup, rounds, warmup_rounds):
        times = []
        for _ in range(warmup_rounds + rounds):
            arguments, keywords = setup()
            start = time.perf_counter()
            target(*arguments, **keywords)
            times.append(time.perf_counter() - start)
        times = times[warmup_rounds:]
        middle = statistics.median(times)
        stats = SimpleNamespace(min=min(times), max=max(times), mean=middle, stddev=0.0, iqr=0.0)
        stats.median, stats.rounds = middle, rounds
        self.stats = SimpleNamespace(stats=stats)
