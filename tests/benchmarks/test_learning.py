"""What a real model learned: the means over seeds, the tables and the picture of docs/smollm2.md."""

import statistics

import pytest

pytest.importorskip("transformers", reason="the trainer needs it")

from benchmarks.real_model import learning as measuring
from benchmarks.report import document, learning
from tests.support.results import write

RISES = (0.30, 0.35, 0.25)


def result(model, temperature, mean, **values):
    low, high = mean - 0.1, mean + 0.1
    accuracy = {"mean": mean, "low": low, "high": high}
    return {"model": model, "temperature": temperature, "accuracy": accuracy, **values}


def run(seed, rise):
    results = [
        result(model, temperature, mean, ended=0.5, length=9.0)
        for temperature in (0.0, 0.7, 1.0)
        for model, mean in (("base", 0.2), ("trained", 0.2 + rise), ("trained-base", rise))
    ]
    names = [*measuring.STEPS, "reward/names_the_answer", "reward/one_sentence", "reward/short"]
    answer = {"question": "Which?", "answer": "A|B", "base": "x\n\ny", "trained": "A"}
    return {
        "row": "run",
        "seed": seed,
        "commit": "19274bf",
        "evaluated": "19274bf",
        "threads": 1,
        "clusters": 41,
        "kinds": [
            {
                "kind": "capital",
                "problems": 40,
                "base": 0.1,
                "trained": 0.1 + rise,
                "constant": 0.05,
            }
        ],
        "train_seconds": 300.0,
        "steps": {name: [0.1 * (i + seed) for i in range(12)] for name in names},
        "problems": 81,
        "results": results,
        "answers": [answer],
    }


@pytest.fixture
def results(tmp_path):
    rows = [run(seed, rise) for seed, rise in enumerate(RISES)]
    averaged = measuring.averaged(rows)
    write(tmp_path, "real_learning", None, versions={}, real_learning=rows + averaged)
    return tmp_path


def test_the_mean_over_the_seeds_and_its_interval():
    rows = measuring.averaged([run(seed, rise) for seed, rise in enumerate(RISES)])
    assert len(rows) == 9
    (rise,) = [r for r in rows if r["model"] == "trained-base" and r["temperature"] == 1]
    assert rise["each"] == pytest.approx(RISES)
    assert rise["mean"] == pytest.approx(0.3)
    half = 4.302653 * statistics.stdev(RISES) / 3**0.5  # the quantile for two degrees of freedom
    assert (rise["low"], rise["high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-6)
    (alone,) = [
        r for r in measuring.averaged([run(0, 0.3)])
        if r["model"] == "trained-base" and r["temperature"] == 1
    ]  # fmt: skip
    assert alone["low"] is None


def test_the_page_has_tables_of_means_runs_and_answers(results):
    text = learning.text(results)
    assert "| 1 | 0.200 | 0.500 | +0.300 | +0.176 to +0.424 | +0.300, +0.350, +0.250 |" in text
    assert "| 1 | +0.350 | +0.250 to +0.450 | 0.50, 0.50 | 9.0, 9.0 | 12 | 5.0 min |" in text
    assert "| Which? | A/B | x y | A |" in text
    assert "| capital | 0.100 | 0.400 | 0.050 |" in text
    assert "trained at commit 19274bf, evaluated at 19274bf" in " ".join(text.split())
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("|"))


def test_accuracy_by_kind_beside_the_best_constant():
    def problem(question, answer, base, trained):
        results = [
            {"model": model, "temperature": t, "accuracy": value if t else 0.5}
            for model, value in (("base", base), ("trained", trained))
            for t in (0.0, 1.0)
        ]
        return {"prompt": [{"content": question}], "answer": answer, "results": results}

    found = measuring.by_kind(
        [
            problem("Which continent is Peru in?", "South America", 0.25, 0.5),
            problem("What is the capital of Peru?", "Lima", 0.5, 1.0),
            problem("Which continent is Chad in?", "Africa", 0.5, 0.5),
            problem("Which continent is Mali in?", "Africa", 0.0, 0.5),
        ]
    )
    assert [row["kind"] for row in found] == ["capital", "continent"]
    assert found[0] == {
        "kind": "capital", "problems": 1, "constant": 1.0, "base": 0.5, "trained": 1.0
    }  # fmt: skip
    assert found[1]["constant"] == pytest.approx(2 / 3)
    assert (found[1]["base"], found[1]["trained"]) == (0.25, 0.5)


def test_a_run_is_made_once_and_not_taken_for_one_with_other_options(tmp_path, monkeypatch):
    made = []

    def process(words, **options):
        made.append(words[3])
        if words[3] == "eval":
            (tmp_path / "seed-0.eval.json").write_text("{}")

    monkeypatch.setattr(measuring.subprocess, "run", process)
    monkeypatch.setattr(measuring.machine, "commit", lambda: "19274bf")
    for _ in range(2):
        assert measuring.run(0, ["--steps", "1"], tmp_path) == tmp_path / "seed-0"
    assert made == ["train", "eval"]
    with pytest.raises(ValueError, match=r"seed-0: trained with \['--steps', '1'\]"):
        measuring.run(0, ["--steps", "2"], tmp_path)
    with pytest.raises(ValueError, match="give --seeds"):
        measuring.measure(["--seed=3"], None, tmp_path, [0])


def test_the_picture_is_the_same_each_time(results):
    picture = learning.picture(results)
    assert picture == learning.picture(results)
    assert b"groups without signal" in picture
    assert b"seed 2" in picture
    assert learning.smooth([0.0, 1.0, 2.0]) == [0.0, 0.5, 1.0]
    assert learning.smooth([0.0] * 10 + [1.0])[-1] == pytest.approx(0.1)


def test_without_results_there_is_nothing(tmp_path):
    assert learning.text(tmp_path) == ""
    assert learning.picture(tmp_path) == b""


def test_the_committed_page_is_the_generated_one():
    committed = document.FOLDER / "results"
    page = document.LEARNED.read_text()
    text = learning.text(committed)
    assert page == document.with_headline(page, text), "run python -m benchmarks.report"
    (rise,) = [
        row
        for row in learning.newest(committed, learning.KIND)[-1][learning.KIND]
        if (row["row"], row.get("model"), row.get("temperature")) == ("mean", "trained-base", 1)
    ]
    assert rise["mean"] >= 0.25
    assert rise["low"] > 0
    assert rise["seeds"] == 3
