"""`grpo-fast eval`: its intervals, the comparison with the model before GRPO, its text and its file."""

import dataclasses
import gc
import json
import math
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.trainer import checkpoints, evaluate, parsing, rollout, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.intervals import Deviations, student
from grpo_fast.trainer.results import Evaluation, Results, Wanted
from grpo_fast.trainer.tasks import countries
from grpo_fast.trainer.train import train
from tests.support.tiny_runs import EVEN, given_model, setup, tiny

# Of tables: 97.5 % quantiles of Student's t by degrees of freedom.
QUANTILES = {
    1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 29: 2.0452,
    30: 2.0423, 120: 1.9799, 149: 1.9760, 1000: 1.9623,
}  # fmt: skip


def interval(values, clusters) -> tuple[float, float]:
    """Mean and half-width, written out: the ratio of the sums of clusters, linearised."""
    values, clusters = np.asarray(values, float), np.asarray(clusters)
    known = ~np.isnan(values)
    sums = np.array([values[known & (clusters == c)].sum() for c in np.unique(clusters[known])])
    counts = np.array([(known & (clusters == c)).sum() for c in np.unique(clusters[known])])
    K, mean = len(sums), sums.sum() / counts.sum()
    variance = K / (K - 1) * ((sums - mean * counts) ** 2).sum() / counts.sum() ** 2
    return mean, QUANTILES[K - 1] * math.sqrt(variance)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A run from a given model, whose weights it has changed."""
    folder = tmp_path_factory.mktemp("given")
    model = given_model(folder)
    options = {**EVEN, "model": str(model), "learning_rate": 0.02, "steps": 2}
    train(tiny(folder, name="run", **options))
    return folder / "run"


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> Path:
    """A run of a new model with a KL, which keeps the model before GRPO."""
    folder = tmp_path_factory.mktemp("new")
    train(tiny(folder, name="run", beta=0.01, learning_rate=0.02, steps=2, **EVEN))
    return folder / "run"


def evaluated(run_dir: Path, folder: Path, options: str = "") -> dict:
    path = folder / "evaluation.json"
    given = ["eval", str(run_dir), "--device", "cpu", "--json", str(path), *options.split()]
    assert main(given) == 0
    return json.loads(path.read_text())


def summary(content: dict, model: str, temperature: float) -> dict:
    found = [
        r for r in content["results"] if (r["model"], r["temperature"]) == (model, temperature)
    ]
    assert len(found) == 1
    return found[0]


def answers(content: dict, model: str) -> list[list[dict]]:
    """The completions of a model to each problem, at all temperatures."""
    return [
        [c for r in problem["results"] if r["model"] == model for c in r["completions"]]
        for problem in content["problems"]
    ]


def half(estimate: dict) -> float:
    return (estimate["high"] - estimate["low"]) / 2


# The interval


@pytest.mark.parametrize("freedom", QUANTILES)
def test_quantiles_are_those_of_the_tables(freedom):
    assert student(freedom) == pytest.approx(QUANTILES[freedom], abs=6e-5)


def test_the_interval_is_that_of_clusters_of_different_sizes():
    rng = np.random.default_rng(0)
    clusters = np.repeat(range(6), [1, 2, 3, 4, 5, 9])
    values = rng.random(24) + clusters / 3
    values[[3, 10, 11]] = math.nan
    values[0] = math.nan  # the first cluster has none at all
    found = Deviations.of(torch.tensor(values), torch.tensor(clusters)).estimate()
    assert (found.mean, found.half) == pytest.approx(interval(values, clusters), rel=1e-4)
    assert found.missing == 4


def test_copies_of_a_completion_say_nothing_new():
    values, clusters = torch.rand(10), torch.arange(10)
    once = Deviations.of(values, clusters).estimate()
    often = Deviations.of(values.repeat(50), clusters.repeat(50)).estimate()
    assert (often.mean, often.half) == pytest.approx((once.mean, once.half), rel=1e-5)


def test_intervals_cover_the_true_mean():
    """Completions of a problem are alike; intervals over completions would cover about 60 %."""
    rng = np.random.default_rng(1)
    clusters = torch.arange(10).repeat_interleave(8)
    covered = 0
    for _ in range(1000):
        values = np.repeat(rng.normal(size=10), 8) + 0.5 * rng.normal(size=80)
        found = Deviations.of(torch.tensor(values), clusters).estimate()
        covered += abs(found.mean) <= found.half
    assert 0.93 <= covered / 1000 <= 0.97


def test_a_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(2)
    clusters = np.repeat(range(11), 3)
    base = rng.normal(size=33) + 5 * clusters
    trained = base + 1 + 0.1 * rng.normal(size=33)
    parts = [Deviations.of(torch.tensor(x), torch.tensor(clusters)) for x in (trained, base)]
    found = parts[0].minus(parts[1]).estimate()
    assert (found.mean, found.half) == pytest.approx(interval(trained - base, clusters), rel=1e-4)
    assert found.half < parts[0].estimate().half / 50  # the problems' own differences cancel


@pytest.mark.parametrize("values", [[0.5, 1.0], [math.nan, 1.0], [math.nan, math.nan]])
def test_one_cluster_has_no_interval(values):
    clusters = [0, 0] if not math.isnan(values[0]) else [0, 1]
    found = Deviations.of(torch.tensor(values), torch.tensor(clusters)).estimate()
    assert math.isnan(found.half)
    assert found.mean == pytest.approx(
        np.nanmean(values) if values[1] == 1 else math.nan, nan_ok=True
    )


def test_a_difference_counts_the_clusters_that_one_of_its_models_has():
    nan, clusters = math.nan, torch.arange(4)
    x, y = torch.tensor([1.0, 3, nan, nan]), torch.tensor([nan, 2.0, 6, nan])
    found = Deviations.of(x, clusters).minus(Deviations.of(y, clusters)).estimate()
    parts = np.array([-1 / 2, 1 / 2 + 2 / 2, -2 / 2])
    assert found.mean == 2 - 4
    assert found.half == pytest.approx(4.3027 * math.sqrt(3 / 2 * (parts**2).sum()), rel=1e-4)
    assert found.missing == 4


# Which clusters there are


def test_rows_of_a_country_are_one_cluster(tmp_path):
    task = countries.build(tiny(tmp_path, task="countries", model="any"))
    evaluation = Evaluation(tmp_path, tiny(tmp_path), task, Wanted(), [])
    assert evaluation.names == [row["country"] for row in task.heldout]
    assert len(evaluation.clusters.unique()) < len(task.heldout)


def test_rows_of_a_prompt_are_one_cluster(tmp_path):
    task = tasks.build(tiny(tmp_path))
    rows = [{"prompt": p, "answer": "1"} for p in ("1+0=", "0+1=", "1+0=")]
    task = dataclasses.replace(task, heldout=rows)
    evaluation = Evaluation(tmp_path, tiny(tmp_path), task, Wanted(), [])
    assert evaluation.clusters.tolist() == [0, 1, 0]


# What is sampled


def test_the_line_of_the_training_has_the_numbers_of_eval(given, tmp_path, capsys):
    config = dataclasses.replace(parsing.parse([str(given / "config.yaml")]), device="cpu")
    task = tasks.build(config)
    policy = models.build(config, task.alphabet, checkpoints.latest(given))
    torch.manual_seed(7)  # it must not matter
    line = evaluate.report(policy, task, config)
    content = evaluated(given, tmp_path)
    means = [
        f"{summary(content, 'trained', t)[name]['mean']:.3f}"
        for name in ("accuracy", "reward")
        for t in (0.0, 1.0)
    ]
    assert line == (
        "accuracy {} greedy, {} sampled; reward {} greedy, {} sampled (10 held-out problems)"
    ).format(*means)
    shown = capsys.readouterr().out
    assert "10 held-out problems" in shown
    rows = [text.split() for text in shown.splitlines() if text.startswith("trained ")]
    assert [row[2] for row in rows] == means[:2]


def test_greedy_is_sampled_once_and_the_rest_for_each_seed(given, tmp_path, monkeypatch, capsys):
    calls = []
    sample = rollout.sample

    def counted(policy, prompts, tokens, temperature, *rest, **options):
        calls.append((temperature, len(prompts)))
        return sample(policy, prompts, tokens, temperature, *rest, **options)

    monkeypatch.setattr(rollout, "sample", counted)
    content = evaluated(given, tmp_path, "--seeds 3 4 --samples 2 --temperatures 0 0.5")
    assert calls == [(0.0, 10), (0.5, 20), (0.5, 20)]
    assert [r["completions"] for r in content["results"]] == [10, 40]
    found = answers(content, "trained")[0][1:]
    assert [(c["seed"], c["sample"]) for c in found] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert len({c["text"] for problem in answers(content, "trained") for c in problem[1:]}) > 10
    assert "one completion per problem is enough" in capsys.readouterr().out


def test_each_completion_has_a_seed_of_its_own():
    every = [x for seed in (0, 1) for x in evaluate.seeds_of(seed, 5, 3)]
    assert len(set(every)) == 30
    assert evaluate.seeds_of(0, 2) == evaluate.seeds_of(0, 2, 3)[::3]  # more samples change none


def test_a_seed_gives_the_same_answers_whatever_else_is_asked_for(given, tmp_path):
    alone = evaluated(given, tmp_path, "--seed 4 --temperatures 1")
    again = evaluated(given, tmp_path, "--seeds 4 --temperatures 1")
    more = evaluated(given, tmp_path, "--seeds 3 4 --temperatures 0 1 --base")
    assert alone["problems"] == again["problems"]
    texts = [[c["text"] for c in some if c["seed"] == 4] for some in answers(more, "trained")]
    assert texts == [[c["text"] for c in some] for some in answers(alone, "trained")]
    other = [
        [c["text"] for c in some][-1:] for some in answers(evaluated(given, tmp_path), "trained")
    ]
    assert other != texts


def test_means_are_those_of_the_completions(given, tmp_path):
    content = evaluated(given, tmp_path, "--seeds 0 1 --temperatures 1 --base")
    for model in ("base", "trained"):
        found = summary(content, model, 1.0)
        every = [c for some in answers(content, model) for c in some]
        assert all(c["ended"] or c["tokens"] == 6 for c in every)
        assert not all(c["ended"] for c in every)
        clusters = np.repeat(range(10), 2)
        for name in ("accuracy", "reward"):
            mean, width = interval([c[name] for c in every], clusters)
            assert found[name]["mean"] == pytest.approx(mean)
            assert half(found[name]) == pytest.approx(width, rel=1e-4)
        assert found["ended"] == pytest.approx(np.mean([c["ended"] for c in every]))
        assert found["length"] == pytest.approx(np.mean([c["tokens"] for c in every]))
        assert found["reward/even_digits"] == pytest.approx(found["accuracy"]["mean"])


# Base and trained


def untrained(run_dir: Path, source: Path | None) -> list[list[str]]:
    """The greedy answers of a model that the run did not train, and those of seed 0."""
    config = dataclasses.replace(parsing.parse([str(run_dir / "config.yaml")]), device="cpu")
    task = tasks.build(config)
    policy = models.build(dataclasses.replace(config, use_peft=False), task.alphabet, source)
    n = len(task.heldout)
    return [
        evaluate.answered(policy, task, task.heldout, config, t, evaluate.seeds_of(0, n))[
            0
        ].completions
        for t in (0.0, config.temperature)
    ]


def check_base(run_dir: Path, source: Path | None, folder: Path) -> None:
    """The base model is the untrained one, the trained one is another; the difference has its sign."""
    content = evaluated(run_dir, folder, "--base")
    columns = [list(x) for x in zip(*answers(content, "base"), strict=True)]
    texts = [[c["text"] for c in column] for column in columns]
    assert texts == untrained(run_dir, source)
    trained = evaluated(run_dir, folder)
    assert answers(content, "trained") == answers(trained, "trained")
    assert answers(content, "base") != answers(content, "trained")
    for t in (0.0, 1.0):
        base, after = (summary(content, name, t) for name in ("base", "trained"))
        difference = summary(content, "trained-base", t)
        pairs = [
            [r["reward"] for r in problem["results"] if r["temperature"] == t]
            for problem in content["problems"]
        ]
        mean, width = interval([b - a for a, b in pairs], range(10))
        assert difference["reward"]["mean"] == pytest.approx(mean, abs=1e-7)
        assert half(difference["reward"]) == pytest.approx(width, rel=1e-4, abs=1e-7)
        for name in ("ended", "length", "reward/even_digits"):
            assert difference[name] == pytest.approx(after[name] - base[name])


def test_the_base_of_a_given_model_is_that_model(given, tmp_path):
    check_base(given, None, tmp_path)


def test_the_base_of_a_new_model_is_its_reference(new, tmp_path):
    check_base(new, new / "reference", tmp_path)


def test_the_base_of_an_adapter_is_the_model_without_it(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    model = given_model(tmp_path)
    train(tiny(tmp_path, name="run", model=str(model), use_peft=True, learning_rate=0.5, **EVEN))
    built = []
    build = models.build
    with monkeypatch.context() as patch:
        patch.setattr(models, "build", lambda *given: built.append(given) or build(*given))
        evaluated(tmp_path / "run", tmp_path, "--base")
    assert len(built) == 1  # its weights are in memory once
    check_base(tmp_path / "run", None, tmp_path)


def test_two_models_are_never_in_memory_together(given, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    build = models.build

    def counted(*given):
        assert all(one() is None for one in alive)
        policy = build(*given)
        alive.append(weakref.ref(policy.model))
        return policy

    monkeypatch.setattr(models, "build", counted)
    evaluated(given, tmp_path, "--base")
    gc.collect()
    assert [one() for one in alive] == [None, None]


def test_a_run_without_its_first_model_has_no_base(new, tmp_path, capsys):
    shutil.copytree(new, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "reference")
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu", "--base"]) == 2
    shown = capsys.readouterr()
    assert re.search(r"base: .*reference does not exist.* --beta above 0", shown.err)
    assert shown.out == ""


# What is shown and written


def results(model: str, values: list[float], others: list[float]) -> Results:
    """Two completions of each problem, at temperature 1."""
    x, n = torch.tensor(values, dtype=torch.float64), len(values)
    scores = {"right": x, "short form": torch.tensor(others, dtype=torch.float64)}
    return Results(
        model=model,
        temperature=1.0,
        problems=[b // 2 for b in range(n)],
        seeds=[0] * n,
        samples=[b % 2 for b in range(n)],
        completions=[f"{model} {b}" for b in range(n)],
        scores=scores,
        total=2 * x,
        ended=torch.ones(n, dtype=torch.float64),
        lengths=torch.full((n,), 3.0, dtype=torch.float64),
        failures=1 if math.nan in values else 0,
    )


def evaluation(tmp_path: Path, problems: int, *found: Results, **options) -> Evaluation:
    config = tiny(tmp_path)
    rows = [{"prompt": f"{i}+\x1b1=", "answer": str(i + 1)} for i in range(problems)]
    task = dataclasses.replace(tasks.build(config), heldout=rows)
    return Evaluation(tmp_path, config, task, Wanted(**options), list(found))


def test_missing_rewards_are_left_out_and_counted(tmp_path):
    nan = math.nan
    one = evaluation(
        tmp_path,
        3,
        results("base", [0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]),
        results("trained", [1, nan, 1, 1, nan, nan], [1, 1, nan, 0, 0, 0]),
    )
    base, trained, difference = one.summaries()
    assert (trained["accuracy"].mean, trained["reward"].mean) == (1.0, 2.0)
    assert trained["accuracy"].missing == trained["reward"].missing == 3
    assert trained["reward/short form"] == pytest.approx(0.4)
    assert difference["accuracy"].mean == base["accuracy"].mean == 0.5
    text = one.text()
    assert (
        "trained, temperature 1: left out, without a value: reward/right 3, reward/short form 1, reward "
        "3 of 6 completions; failures of reward functions: 1"
    ) in text
    assert "base, temperature 1: left out" not in text
    assert "trained, temperature 1: ± 0 for accuracy and reward" in text
    content = one.to_dict("")
    found = next(r for r in content["problems"][2]["results"] if r["model"] == "trained")
    assert found["accuracy"] is None
    assert [c["reward"] for c in found["completions"]] == [None, None]
    json.dumps(content, allow_nan=False)


def test_one_problem_is_shown_without_an_interval(tmp_path):
    one = evaluation(tmp_path, 1, results("trained", [0, 1], [1, 1]))
    text = one.text()
    assert "1 held-out problem, 1 cluster\n" in text
    row = next(x for x in text.splitlines() if x.startswith("trained")).split()
    assert row[2:6] == ["0.500", "-", "1.000", "-"]
    assert "no interval: it needs two clusters at least" in text
    accuracy = one.to_dict("")["results"][0]["accuracy"]
    assert accuracy == {"mean": 0.5, "low": None, "high": None, "missing": 0}


def test_the_table_is_aligned_and_has_a_cell_for_each_column(tmp_path):
    both = [
        results("base", [0, 0, 1, 0], [1, 1, 1, 1]),
        results("trained", [1, 0, 1, 1], [0, 0, 0, 0]),
    ]
    lines = evaluation(tmp_path, 2, *both).text().splitlines()
    assert lines[0].startswith(f"{tmp_path}: 2 held-out problems, 2 clusters")
    assert "accuracy is the mean of right" in lines[1]
    table = lines[3:7]
    assert len({len(x) for x in table}) == 1
    head, base, trained, difference = (x.split() for x in table)
    names = "model temperature accuracy ±accuracy reward ±reward reward/short_form ended length completions"
    assert head == names.split()
    assert base[:3] == ["base", "1", "0.250"]
    assert trained[:3] == ["trained", "1", "0.750"]
    assert difference[:3] == ["trained-base", "1", "+0.500"]
    assert difference[6:] == ["-1.000", "+0.000", "+0.0", "4"]


def test_answers_stand_beside_each_other_and_command_no_terminal(tmp_path):
    both = [results(name, [0, 0, 1, 0], [1, 1, 1, 1]) for name in ("base", "trained")]
    both[1].completions[0] = "x" * 1000
    lines = evaluation(tmp_path, 2, *both, answers=1).text().splitlines()
    where = lines.index(r"problem 1: '0+\x1b1='  answer '1'")
    assert lines[where + 1] == (
        "  temperature 1, seed 0, base: 'base 0'  accuracy 0.000, reward 0.000"
    )
    assert lines[where + 2].startswith("  temperature 1, seed 0, trained: 'xxx")
    assert len(lines[where + 2]) < 400
    assert not any(x.startswith("problem 2") for x in lines)
    more = evaluation(tmp_path, 2, *both, answers=9).text()
    assert more.count("problem ") == 2


def test_the_file_says_how_it_was_made(given, tmp_path):
    content = evaluated(given, tmp_path, "--temperatures 0")
    path = tmp_path / "evaluation.json"
    assert (
        content["command"] == f"grpo-fast eval {given} --device cpu --json {path} --temperatures 0"
    )
    assert content["checkpoint"] == str(given / "checkpoints" / "step-000002")
    assert content["versions"]["torch"] == torch.__version__
    assert content["machine"]["cores"] >= content["machine"]["threads"] >= 1
    assert content["config"]["heldout"] == len(content["problems"]) == 10
    assert content["dtype"] == "float32"
    assert {"prompt", "answer", "results"} == content["problems"][0].keys()
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]  # nothing partial


def test_threads_are_those_of_the_run(given, tmp_path):
    shutil.copytree(given, tmp_path / "run")
    settings = tmp_path / "run" / "config.yaml"
    text = settings.read_text()
    assert "threads: 0\n" in text
    settings.write_text(text.replace("threads: 0\n", "threads: 2\n"))
    before = torch.get_num_threads()
    try:
        content = evaluated(tmp_path / "run", tmp_path, "--temperatures 0")
        assert content["machine"]["threads"] == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_new_model_has_one_thread_as_in_training(new, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert evaluated(new, tmp_path, "--temperatures 0")["machine"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_reward_functions_draw_the_same_numbers_for_both_models(given, tmp_path, monkeypatch):
    drawn = []
    reward = rollout.reward
    monkeypatch.setattr(
        rollout, "reward", lambda *given: drawn.append(torch.rand(()).item()) or reward(*given)
    )
    evaluated(given, tmp_path, "--temperatures 1 --base")
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--temperatures 0 -1", "temperatures: want finite numbers >= 0, got [0.0, -1.0]"),
        ("--temperatures nan", "temperatures: want finite numbers >= 0, got [nan]"),
        ("--temperatures 1 1.0", "temperatures: want each number once, got [1.0, 1.0]"),
        ("--seeds 1 -2", "seeds: want finite numbers >= 0, got [1, -2]"),
        ("--seeds 1 2 1", "seeds: want each number once, got [1, 2, 1]"),
        ("--samples 0", "samples: want a number >= 1, got 0"),
        ("--answers -1", "answers: want a number >= 0, got -1"),
        ("--json missing/x.json", "json='missing/x.json': cannot be written: No such file"),
        ("--json .", "json='.': cannot be written: Is a directory"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "no_run", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_try_to_write_leaves_nothing(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "no_run"), "--json", str(tmp_path / "x.json")]) != 0
    assert list(tmp_path.iterdir()) == []


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match=r"seeds: want finite numbers >= 0, got \[\]"):
        Wanted(seeds=())


def test_the_generator_of_a_run_is_left_alone(tmp_path):
    config = tiny(tmp_path)
    task, policy = setup(config)
    before = torch.get_rng_state()
    first = evaluate.mean_rewards(policy, task, task.heldout, config, 1.0)
    assert bool((torch.get_rng_state() == before).all())
    assert evaluate.mean_rewards(policy, task, task.heldout, config, 1.0) == first
