"""Nothing of unknown origin is published, and what is published is what the report writes."""

import json
from pathlib import Path

import pytest

from benchmarks.predictions import memory_model
from benchmarks.report import committed, experiments, tables
from benchmarks.report import document as report
from tests.support.results import entry, gpu_results, write, write_result

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="gpu_results")
def made_results(tmp_path):
    return gpu_results(tmp_path)


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
    write(gpu_results, "old", [entry("eager", median=9.0)], commit="aaaaaaa", date="2025-01-01")
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
    assert "predicted by the data sheet, ms | by the measured rates, ms" in text
    assert "eager" not in text


def test_history_is_not_held_against_predictions(gpu_results):
    write(gpu_results, "old", [entry("grpo_fast", median=9.0)], commit="aaaaaaa", date="2025-01-01")
    assert "| 9000.00 |" not in report.render(gpu_results)


def test_stems_of_one_file_are_chosen_apart(tmp_path):
    """logits-*.json has several stems; a newer one that lost a stem does not hide the older one's."""
    first = [entry("grpo_fast"), entry("grpo_fast", stem="logprob", median=1.7e-3)]
    write(tmp_path, "logits-19274bf", first)
    why = {"logprob bench_forward[x]": "out of time"}
    write(
        tmp_path, "logits-bbbbbbb", [entry("grpo_fast", median=2e-3)], why, "bbbbbbb", "2026-02-02"
    )
    runs = {run.stem: run for run in committed.load(tmp_path)}
    assert (runs["grpo"].info["commit"], len(runs["grpo"].entries)) == ("bbbbbbb", 1)
    assert runs["logprob"].info["commit"] == "19274bf"
    assert list(runs) == ["grpo", "logprob"], "what matters most comes first"


def test_other_libraries_alone_hide_nothing(gpu_results):
    write(
        gpu_results, "peer-new", [entry("liger", median=3e-3)], commit="bbbbbbb", date="2026-02-02"
    )
    (run,) = (r for r in committed.load(gpu_results) if r.stem == "grpo")
    assert run.info["commit"] == "19274bf"


def check(case, outcome="right", **more):
    return {"case": case, "outcome": outcome, "seconds": 0.1} | more


def smoke_groups(**tests):
    wrong = check("grpo 100", "wrong", message="AssertionError: dlogits | off\nmore")
    return {
        "bfloat16": {"ended": "right", "checks": [check("grpo 100"), check("x")], "running": None},
        "heads": {"ended": "not right", "checks": [check("y"), wrong], "running": None},
        "large": {"ended": "crashed: SIGSEGV", "checks": [], "running": "large, in place"},
        "float16": {"ended": "out of time", "checks": [], "running": None},
        "tests": {"ended": "right", "failed": []} | tests,
    }


def test_smoke_says_what_is_right_on_a_device(tmp_path):
    write(tmp_path, "smoke", None, smoke=smoke_groups(), roofs=False)
    text = report.render(tmp_path)
    assert report.NO_GPU not in text
    assert (
        "Right on this device: 3 of 4 checks in 4 groups (commit 19274bf, 2026-01-01, "
        "`c`). Not right: heads: grpo 100 (wrong: AssertionError: dlogits \\| off). "
        "Not run to the end: large (crashed: SIGSEGV in large, in place); float16 (out of time). "
        "Tests of the kernels: all passed."
    ) in text
    assert report.headline(tmp_path).startswith("3 of 4 checks of the kernels")
    good = {"bfloat16": smoke_groups()["bfloat16"]}
    write(tmp_path, "smoke-new", None, smoke=good, roofs=False, date="2026-02-02")
    assert "Right on this device: 2 of 2 checks in 1 groups" in report.render(tmp_path)
    assert report.headline(tmp_path).startswith("All 2 checks of the kernels")


@pytest.mark.parametrize(
    "tests, text",
    [
        ({"ended": "not right", "failed": ["a", "b"]}, "2 failed: `a`, `b`."),
        ({"ended": "out of time", "failed": list("abcdefg")}, "7 failed, then out of time: `a`, "),
        ({"ended": "out of time"}, "out of time; none is known to have failed."),
    ],
)
def test_how_the_tests_ended(tmp_path, tests, text):
    write(tmp_path, "smoke", None, smoke=smoke_groups(**tests), roofs=False)
    assert f"Tests of the kernels: {text}" in report.render(tmp_path)


def rows_of_variants():
    about = {"shape": [16, 1024, 152_064], "dtype": "torch.bfloat16"}
    times = {"error": 2e-3, "median": 4e-3, "iqr": 8e-6, "min": 4e-3, "rounds": 20}
    return [
        {"variant": "as it is", **about, **times, "bytes_per_second": 2e12, "gemms": 80e-3},
        {"variant": "K 8", **about, "failed": "ValueError: a | b"},
    ]


def test_an_experiment_has_a_table(tmp_path):
    write(tmp_path, "variants-old", None, experiment="grpo", rows=[], date="2025-01-01")
    write(tmp_path, "variants-grpo", None, experiment="grpo", rows=rows_of_variants())
    rows = [{"V": 50_257, "rows": 8192, "median": 1e-3, "iqr": 0.0}]
    write(tmp_path, "variants-vocabularies", None, experiment="vocabularies", rows=rows)
    text = report.render(tmp_path)
    assert "shape 16 x 1,024 x 152,064, dtype bfloat16 (commit 19274bf, 2026-01-01)" in text
    assert "| variant | time | ± | GB/s | of a copy | multiplications alone |" in text
    assert "| as it is | 4.00 ms | 0.1 % | 2,000.0 | 50 % | 80.00 ms |" in text
    assert "| K 8 | failed: ValueError: a \\| b |  |  |  |  |" in text
    assert "| 50,257 | 8,192 | 1.00 ms | 0.0 % |" in text
    assert text.count("**grpo**") == 1, "the newest of each experiment"
    header, rule, *rest = experiments.experiment_table(
        {"experiment": "x", "rows": rows_of_variants(), "datetime": ""}
        | {"machine_info": {"commit": "19274bf", "bandwidth": {}}}
    ).split("\n")[2:6]
    assert header.count("|") == rule.count("|") == rest[0].count("|")


def on_chip(**more):
    def time(ms):
        return {"ms": ms, "iqr_ms": 0.01, "bytes_per_s": 2e12, "of_copy": 0.66}

    good = {"name": "8x8-e", "registers": 128, "rows_in_flight": 30, "check": {"right": True}}
    good |= {"device": "NVIDIA H200", "time": {"on_chip": time(4.0), "grpo_fast": time(5.0)}}
    document = {"triton": "3.9.0", "ptxas": "12.9", "V": 152_064, "commit": "19274bf"}
    return document | {"variants": [good]} | more


def test_rows_kept_on_the_chip_have_a_table(tmp_path):
    path = tmp_path / "h200" / "on_chip-19274bf.json"
    path.parent.mkdir()
    path.write_text(json.dumps(on_chip()))
    text = report.render(tmp_path)
    assert "### NVIDIA H200" in text
    assert "ptxas 12.9, V 152,064 (commit 19274bf)" in text
    row = "| 8x8-e | 128 | 30 | yes | 4.00 ms | 0.1 % | 2,000.0 | 66 % | 5.00 ms | 1.25x |"
    assert row in text
    assert report.headline(tmp_path).startswith("Experiments have run on one NVIDIA H200")
    path.write_text(json.dumps(on_chip(commit="19274bf-dirty")))
    with pytest.raises(committed.ResultError, match="clean"):
        report.render(tmp_path)
    path.write_text(json.dumps(on_chip(variants=[{"name": "8x8-e", "error": "x"}])))
    with pytest.raises(committed.ResultError, match="names no device"):
        report.render(tmp_path)


def test_the_main_tables_come_first(gpu_results):
    write(gpu_results, "tokens", [entry("grpo_fast", "micro-batch", "group_advantage")])
    write(gpu_results, "variants-grpo", None, experiment="grpo", rows=rows_of_variants())
    write(gpu_results, "smoke", None, smoke=smoke_groups(), roofs=False)
    text = report.render(gpu_results)
    parts = [
        "### NVIDIA H200",
        "Right on",
        "#### grpo\n",
        "#### linear_grpo\n",
        "#### A GRPO update",
    ]
    parts += ["#### group_advantage\n", "#### Experiments", "#### Prediction and", "## CPU"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_a_readme_without_its_markers_is_refused():
    with pytest.raises(committed.ResultError, match=r"# x: want"):
        report.with_headline("# x\n", "text")
