"""Nothing of unknown origin is published, and what is published is what the report writes."""

import json
from pathlib import Path

import pytest

from benchmarks import committed, memory_model, pictures, report, tables

ROOT = Path(__file__).resolve().parents[1]
S0 = {"B": 16, "T": 1024, "V": 152_064, "G": 4, "D": 3584}


def write_result(folder, commit="19274bf", median=1.0, day=1, **info):
    extra = {
        "stem": "grpo",
        "case": "forward",
        "provider": "eager",
        "shape": "s",
        "variant": "full",
    }
    extra |= {"sizes": {"B": 1}, "dtype": "float32", "bytes": 10, "roof": "copy"}
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


@pytest.mark.parametrize("commit", ["19274bf-dirty", "unknown", ""])
def test_report_refuses_results_of_unknown_code(tmp_path, capsys, commit):
    path = write_result(tmp_path, commit)
    output = tmp_path / "RESULTS.md"
    assert report.main(["--results", str(tmp_path), "--output", str(output)]) == 1
    assert str(path) in capsys.readouterr().err
    assert not output.exists()


def test_report_shows_the_newest_and_tells_cpu_from_gpu(tmp_path):
    write_result(tmp_path, median=1.0, day=2)
    write_result(tmp_path, median=7.0, day=1)
    text = report.render(tmp_path)
    assert "1,000.00 ms" in text
    assert "7,000.00 ms" not in text
    gpu, cpu = text.split("## GPU")[1].split("## CPU")
    assert report.NO_GPU in gpu
    assert "grpo (CPU)" in cpu


def test_published_results_are_the_generated_ones():
    published = (report.FOLDER / "RESULTS.md").read_text()
    assert published == report.render(report.FOLDER / "results"), "run python -m benchmarks.report"


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


def write(folder, name, entries, absent=None, commit="19274bf", **more):
    info = {"device": "NVIDIA H200", "device_type": "cuda", "command": "c", "threads": 1}
    info |= dict.fromkeys(("driver", "torch", "triton", "python"), "1")
    info |= {"commit": commit, "dirty": False, "absent": absent or {}}
    info |= {"bandwidth": {"copy": 4e12, "read": 4e12}, "gemm": {"bfloat16": 7e14}}
    document = {"machine_info": info, "datetime": "2026-01-01T00:00:00", "benchmarks": entries}
    (folder / "h200").mkdir(exist_ok=True)
    (folder / "h200" / f"{name}.json").write_text(json.dumps(document | more))


@pytest.fixture
def gpu_results(tmp_path):
    own = [entry("eager", median=30e-3), entry("grpo_fast")]
    write(tmp_path, "grpo", own)
    peer = [entry("liger", median=4e-3), head_entry("liger-chunked", 16_384, 0.4, "qwen2.5-7b-16k")]
    absent = {
        "linear_grpo cce": "not installed: cut_cross_entropy",
        "grpo bench_forward_backward[gpt2-16k-full-liger]": "crashed: SIGSEGV",
    }
    write(tmp_path, "peer", peer, absent)
    heads = [
        head_entry(who, N, seconds * N / 16_384, f"qwen2.5-7b-{N // 1024}k")
        for N in (16_384, 4096)
        for who, seconds in (("eager", 0.12), ("grpo_fast", 0.075))
    ]
    write(tmp_path, "heads", heads)
    step = {"model": "qwen2.5-7b", "dtype": "bfloat16", "mode": "lora", "provider": "eager"}
    batch = {"kind": "batch", "B": 4, "P": 256, "T": 1024, "seconds": 2.0, "peak_bytes": 30 << 30}
    longest = {"kind": "longest", "cap_bytes": 24e9, "fits": 8192, "fails": None, "B": 1, "P": 256}
    rows = [step | batch | {"tokens_per_second": 2560.0}, step | longest]
    write(tmp_path, "step", [], {"7B step, full, trl": "not installed: trl"}, step=rows)
    return tmp_path


def test_processes_of_one_run_make_one_table(gpu_results):
    runs = {run.stem: run for run in committed.load(gpu_results)}
    assert [e["provider"] for e in runs["grpo"].entries] == ["eager", "grpo_fast", "liger"]
    assert list(runs["grpo"].absent) == ["grpo bench_forward_backward[gpt2-16k-full-liger]"]
    text = report.render(gpu_results)
    assert report.NO_GPU not in text
    assert "| liger | 4.00 ms | 0 % | 7.50x |" in text
    assert "- linear_grpo cce: not installed: cut_cross_entropy" in text
    assert "crashed: SIGSEGV" in text


def test_an_older_commit_is_history(gpu_results):
    write(gpu_results, "old", [entry("eager", median=9.0)], commit="aaaaaaa")
    path = gpu_results / "h200" / "old.json"
    path.write_text(path.read_text().replace("2026-01-01", "2025-01-01"))
    assert "9,000.00 ms" not in report.render(gpu_results)
    (run,) = (r for r in committed.load(gpu_results) if r.stem == "grpo")
    assert run.info["commit"] == "19274bf"


def test_heads_are_held_against_their_multiplications(gpu_results):
    text = report.render(gpu_results)
    assert "x bare GEMMs" in text
    assert "| grpo_fast | 75.00 ms | 0 % | 1.60x | 133.33 | 19 % | 1.07 |" in text
    assert "in 30 % of the 128 x 128 blocks" in text


def test_a_step_of_a_trainer_has_no_rate():
    made = entry("eager", roof=None, bytes=0)
    table = tables.case_table([made["extra_info"] | made["stats"]])
    assert "2.60 ms" in table
    assert "GB/s" not in table
    header, rule, row = table.splitlines()[2:5]
    assert header.count("|") == rule.count("|") == row.count("|")


def test_the_step_has_its_tables(gpu_results):
    text = report.render(gpu_results)
    batch, longest = memory_model.load()["step"][:2]
    assert (batch["mode"], batch["provider"], longest["cap_bytes"]) == ("lora", "eager", 24e9)
    peak = tables.memory_text(batch["peak_bytes"])
    row = "| lora | eager | 4 x (256 + 1024) | 2,000.00 ms | 2,560 | 30,720 MiB |"
    assert f"{row} {peak} |" in text
    assert f"| lora | 24 GB | eager | 8192 | not reached in time | {longest['fits']} |" in text
    assert "7B step, full, trl: not installed: trl" in text


def test_predictions_stand_next_to_measurements(gpu_results):
    text = report.render(gpu_results).split("### Prediction and measurement")[1].split("## CPU")[0]
    assert "| grpo, forward + backward | grpo_fast | `qwen2.5-7b-16k`, full |" in text
    assert "| measured |" in text
    assert "| data sheet |" in text
    assert "eager" not in text


def test_the_headline_says_which_machine_and_when(gpu_results):
    text = report.headline(gpu_results)
    assert "No GPU" not in text
    assert "NVIDIA H200, commit 19274bf, 2026-01-01" in text
    assert "| grpo_fast | 2.60 ms | 11.54x |" in text


def test_pictures_are_those_of_the_results(gpu_results):
    pytest.importorskip("matplotlib", reason="draws the pictures")
    output = gpu_results / "RESULTS.md"
    (gpu_results / "pictures").mkdir()
    (gpu_results / "pictures" / "gone.svg").write_text("")
    assert report.main(["--results", str(gpu_results), "--output", str(output)]) == 0
    drawn = {p.name: p.read_text() for p in (gpu_results / "pictures").iterdir()}
    assert drawn.keys() == {
        "nvidia-h200-grpo-roofline.svg",
        "nvidia-h200-linear-grpo-roofline.svg",
        "nvidia-h200-linear-grpo-qwen2-5-7b-over-n.svg",
    }
    for name in drawn:
        assert f"({pictures.FOLDER}/{name})" in output.read_text()
    assert report.main(["--results", str(gpu_results), "--output", str(output)]) == 0
    assert {p.name: p.read_text() for p in (gpu_results / "pictures").iterdir()} == drawn


def test_the_readme_holds_the_generated_table():
    readme = (ROOT / "README.md").read_text()
    text = report.headline(report.FOLDER / "results")
    assert readme == report.with_headline(readme, text), "run python -m benchmarks.report"


def test_published_pictures_are_those_of_the_results():
    wanted = {n for run in committed.load(report.FOLDER / "results") for n in pictures.names(run)}
    assert {path.name for path in (report.FOLDER / pictures.FOLDER).glob("*.svg")} == wanted


def test_a_readme_without_its_markers_is_refused():
    with pytest.raises(committed.ResultError, match=r"README.md: want"):
        report.with_headline("# x\n", "text")
