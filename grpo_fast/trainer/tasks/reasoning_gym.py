"""The tasks of the package reasoning-gym, for a pretrained model: generated problems with their scorers.

The name of a task is `reasoning_gym:NAME`, with the name of a generator, such as letter_counting.
"""

import math
import random
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from grpo_fast.spelling import closest, did_you_mean
from grpo_fast.trainer import files
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.rewards import Reward, Text, text_of
from grpo_fast.trainer.tasks.task import Row, Task, alphabet, in_chat, split

Entry = dict[str, Any]  # question, answer and metadata, as the package makes them


def build(config: TrainConfig) -> Task:
    """Build a task of reasoning-gym: `config.problems` problems, each after the same solved examples.

    The rows have the columns `answer` and `entry`, the number of the problem. The reward is the score of the
    generator, from 0 to 1. Problems whose question is one of the examples are left out.

    Raises:
        ValueError: the package is not installed, has no such generator, or cannot generate the problems.
    """
    name = config.task.partition(":")[2]
    generator, entries = generated(name, config, "problems", config.problems)
    examples: list[Entry] = []
    if config.examples:
        _, examples = generated(name, config, "examples", config.examples)
    if any(e["answer"] is None for e in examples):
        raise ValueError(
            f"examples={config.examples}: {name} generates no answers that could be shown; set --examples 0"
        )
    shown = {e["question"] for e in examples}
    rows: list[Row] = [
        {
            "prompt": prompt(e["question"], examples, config),
            "answer": "" if e["answer"] is None else str(e["answer"]),
            "entry": i,
        }
        for i, e in enumerate(entries)
        if e["question"] not in shown
    ]
    train, heldout = split(rows, config)
    return Task(
        train, heldout, [scorer(config.task, generator, entries)], [1.0], None, alphabet(rows)
    )


def generated(name: str, config: TrainConfig, part: str, size: int) -> tuple[Any, list[Entry]]:
    """Return a generator, and `size` entries that it has generated.

    Args:
        part: what the entries are for. Each part has random numbers of its own, from `config.seed`.

    Raises:
        ValueError: the package is not installed, has no such generator, or cannot generate the problems.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ValueError(
            f"task='reasoning_gym:{name}': reasoning-gym is not installed: {error}; "
            "pip install reasoning-gym"
        ) from error
    if name not in DATASETS:
        raise ValueError(
            f"task='reasoning_gym:{name}': reasoning-gym has no generator {name!r}"
            f"{did_you_mean(closest(name, DATASETS))}"
        )
    # The package adds the number of a problem to the seed: seeds next to each other share problems.
    seed = random.Random(f"{config.seed}/{part}").randrange(2**31)
    try:
        generator = create_dataset(name, seed=seed, size=size, **options(config.task_options))
        return generator, list(generator)
    except Exception as error:  # whatever a generator raises where its options do not fit
        raise ValueError(
            f"task='reasoning_gym:{name}', task_options={config.task_options!r}: {error}"
        ) from error


def options(text: str | None) -> dict[str, Any]:
    """Read `task_options`, the options of a generator.

    Raises:
        ValueError: it is no mapping, or has one of the options that are set here.
    """
    try:
        found = files.read_yaml(text or "{}")
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError("want a mapping such as '{min_words: 3}'")
    for key, ours in {"seed": "seed", "size": "problems"}.items():
        if key in found:
            raise ValueError(f"{key} is set by --{ours}")
    return found


def prompt(question: str, examples: Sequence[Entry], config: TrainConfig) -> Text:
    """Return the prompt of a question: the examples, then the question; a chat if `config.chat` is set."""
    if not config.chat:
        solved = [f"Question: {e['question']}\nAnswer: {e['answer']}\n\n" for e in examples]
        return f"{''.join(solved)}Question: {question}\nAnswer:"
    messages = in_chat("", config.system_prompt)[:-1]
    for e in examples:
        messages += in_chat(e["question"], None)
        messages.append({"role": "assistant", "content": str(e["answer"])})
    return messages + in_chat(question, None)


def answer_in(completion: Text, several_lines: bool) -> str:
    """Return the answer in a completion.

    It is the text in the last `<answer>...</answer>`. Without these tags it is the first line, or, if the
    right answer has several lines, the text up to the first empty line.
    """
    text = text_of(completion).strip()
    if tagged := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        return str(tagged[-1]).strip()
    return re.split(r"\n\s*\n" if several_lines else r"\n", text)[0].strip()


def scorer(task: str, generator: Any, entries: Sequence[Entry]) -> Reward:
    """Return the reward function of a task, `score`.

    The package's scorers raise on some texts that they cannot read. Such a completion counts as a failure of
    the function, so it gets no reward. The first error of each kind is printed.
    """
    told: set[type] = set()

    def score(
        prompts: list[Text], completions: list[Text], entry: list[int], **kwargs: Any
    ) -> list[float | None]:
        values: list[float | None] = []
        for completion, number in zip(completions, entry, strict=True):
            problem = entries[number]
            answer = answer_in(completion, "\n" in str(problem["answer"]).strip())
            try:
                values.append(float(generator.score_answer(answer=answer, entry=problem)))
            except Exception as error:  # whatever a scorer raises on a text
                values.append(math.nan)  # counts as a failure
                if type(error) not in told:
                    told.add(type(error))
                    print(
                        f"{task}: the scorer raised {type(error).__name__}: {error} on the answer "
                        f"{answer[:100]!r}",
                        file=sys.stderr,
                    )
        return values

    return score
