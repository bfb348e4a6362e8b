"""The tasks of reasoning-gym: problems, examples and scores; a scorer that raises costs one reward alone."""

import collections
import json
import sys

import pytest
import torch
import yaml

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")
pytest.importorskip("reasoning_gym", reason="these tasks need reasoning-gym")

from grpo_fast.trainer import rewards, tasks
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.parsing import parse
from grpo_fast.trainer.tasks import reasoning_gym as gym
from tests.support.tiny_runs import arguments, given_model, metrics

LETTERS = "reasoning_gym:letter_counting"


def config(task: str = LETTERS, **options) -> TrainConfig:
    return TrainConfig(task=task, model="m", **{"problems": 40, "heldout": 6, **options})


def build(task: str = LETTERS, **options) -> tasks.Task:
    return tasks.build(config(task, **options))


def scores(task: tasks.Task, rows: list[dict], completions: list) -> rewards.Scores:
    columns = {name: [row[name] for row in rows] for name in ("answer", "entry")}
    prompts = [row["prompt"] for row in rows]
    return rewards.score(task.rewards, task.weights, prompts, completions, columns)


def questions(prompt: str | list) -> list[str]:
    if isinstance(prompt, list):
        return [message["content"] for message in prompt if message["role"] == "user"]
    return [part.split("\n")[0] for part in prompt.split("Question: ")[1:]]


def test_text_prompts_have_the_examples_and_end_before_the_answer():
    task = build(examples=2)
    examples = {
        "".join(row["prompt"].rpartition("Question: ")[:2]) for row in task.train + task.heldout
    }
    assert len(examples) == 1  # the same for all
    assert examples.pop().count("\nAnswer: ") == 2
    row = task.train[0]
    assert row["prompt"].endswith(f"Question: {questions(row['prompt'])[2]}\nAnswer:")
    assert set(row) == {"prompt", "answer", "entry"}
    json.dumps(row)
    question = questions(build(examples=0).train[0]["prompt"])[0]
    assert build(examples=0).train[0]["prompt"] == f"Question: {question}\nAnswer:"


def test_examples_are_solved_right():
    text, chat = (
        build(examples=3).train[0]["prompt"],
        build(examples=3, chat=True).train[0]["prompt"],
    )
    assert questions(text) == questions(chat)
    answers = [line.removeprefix("Answer: ") for line in text.split("\n") if line[:8] == "Answer: "]
    assert answers == [m["content"] for m in chat if m["role"] == "assistant"]
    for question, answer in zip(questions(text), answers, strict=False):
        letter, words = question.split('"')[1], question.split('"')[3]
        assert words.lower().count(letter) == int(answer)


def test_chats_have_the_examples_as_earlier_turns():
    prompt = build(examples=2, chat=True, system_prompt="Count.").train[0]["prompt"]
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message["role"] for message in prompt] == roles
    assert prompt[0]["content"] == "Count."
    alone = build(examples=0, chat=True).train[0]["prompt"]
    assert [message["role"] for message in alone] == ["user"]


def test_no_question_is_in_two_parts():
    # So few problems exist that questions repeat, and that examples are among them.
    few = {"task_options": "{min_words: 1, max_words: 1}", "problems": 2000, "examples": 20}
    task = build(**few)
    shown = set(questions(task.train[0]["prompt"])[:-1])
    train, heldout = (
        [questions(row["prompt"])[-1] for row in rows] for rows in (task.train, task.heldout)
    )
    assert max(collections.Counter(train).values()) > 1
    assert not set(train) & set(heldout)
    assert not shown & {*train, *heldout}
    _, entries = gym.generated("letter_counting", config(**few), "problems", 2000)
    assert shown & {entry["question"] for entry in entries}  # they were left out
    assert len(train) + len(heldout) < 2000


def test_the_seed_alone_decides():
    first, again, other = build(), build(), build(seed=1)
    assert (first.train, first.heldout) == (again.train, again.heldout)
    assert len(first.train) + len(first.heldout) == 40
    known = {questions(row["prompt"])[-1] for row in first.train + first.heldout}
    new = {questions(row["prompt"])[-1] for row in other.train + other.heldout}
    assert not known & new  # the package's own seeds 0 and 1 share all problems but one
    assert questions(first.train[0]["prompt"])[0] != questions(other.train[0]["prompt"])[0]


def test_scores_are_those_of_the_generator():
    task = build()
    rows = task.train[:4]
    right = [f" {row['answer']}\n\nQuestion: more" for row in rows]
    assert scores(task, rows, right).total.tolist() == [1, 1, 1, 1]
    wrong = ["13", f"{rows[1]['answer']} times", "", f"It is\n{rows[3]['answer']}"]
    length = len(rows[1]["answer"])
    expected = torch.tensor(
        [0, length / (length + 6), 0, 0]
    )  # of the package: a part for more text
    torch.testing.assert_close(scores(task, rows, wrong).total, expected)
    assert list(scores(task, rows, wrong).each) == ["score"]
    chat = build(chat=True)
    said = [[{"role": "assistant", "content": row["answer"]}] for row in chat.heldout]
    assert scores(chat, chat.heldout, said).total.mean() == 1


@pytest.mark.parametrize(
    "text, several_lines, answer",
    [
        (" 3\n\nQuestion: x", False, "3"),
        ("\n\n3 \n4", False, "3"),
        ("1 2\n3 4\n\nQuestion: x", True, "1 2\n3 4"),
        ("1 2\n3 4\n \nQuestion: x", True, "1 2\n3 4"),
        ("Let me see.\n<answer>1</answer> no\n<answer>\n2\n3 </answer>.", False, "2\n3"),
        ("<answer>7", False, "<answer>7"),
        ("", False, ""),
    ],
)
def test_where_the_answer_is_in_a_completion(text, several_lines, answer):
    assert gym.answer_in(text, several_lines) == answer
    assert gym.answer_in([{"role": "assistant", "content": text}], several_lines) == answer


def test_answers_of_several_lines_are_read_whole():
    task = build("reasoning_gym:rotate_matrix", problems=8, heldout=2, examples=1)
    answers = [row["answer"] for row in task.train]
    assert any("\n" in answer for answer in answers)
    assert scores(task, task.train, [f"{a}\n\nQuestion: 1" for a in answers]).total.mean() == 1


def test_a_scorer_that_raises_is_a_failure_of_its_completion_alone(capsys):
    task = build("reasoning_gym:prime_factorization")
    rows = task.train[:4]
    completions = [rows[0]["answer"], "none at all", "no idea", rows[3]["answer"]]
    found = scores(task, rows, completions)
    assert found.failures == 2
    assert found.total.isnan().tolist() == [False, True, True, False]
    assert found.total[[0, 3]].tolist() == [1, 1]
    shown = capsys.readouterr().err
    assert f"{'prime_factorization'}: the scorer raised ValueError" in shown
    assert "'none at all'" in shown
    assert "no idea" not in shown  # each kind of error once
    assert scores(task, rows, completions).failures == 2
    assert capsys.readouterr().err == ""


def test_a_batch_is_scored_once_although_a_scorer_raises(monkeypatch):
    task = build("reasoning_gym:prime_factorization")
    calls = []
    score = task.rewards[0]

    def counted(**given):
        calls.append(len(given["completions"]))
        return score(**given)

    rewards.score([counted], [1.0], ["p"] * 3, ["x", "y", "z"], {"entry": [0, 1, 2]})
    assert calls == [3]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"task": "reasoning_gym:letter_countin"},
            "no generator 'letter_countin'; did you mean 'letter_counting'",
        ),
        ({"task": "reasoning_gym:composite"}, "'reasoning_gym:composite', .*one dataset"),
        ({"task_options": "{min_wordz: 3}"}, "task_options='{min_wordz: 3}': .*min_wordz"),
        ({"task_options": "{min_words: 0}"}, "min_words must be positive"),
        ({"task_options": "[3]"}, "want a mapping such as '{min_words: 3}'"),
        ({"task_options": "3: 4"}, "want a mapping"),
        ({"task_options": "{"}, "task_options='{': not YAML"),
        ({"task_options": "{seed: 3}"}, "seed is set by --seed"),
        ({"task_options": "{size: 3}"}, "size is set by --problems"),
        ({"problems": 1}, "problems: want a finite number >= 2, got 1"),
        ({"examples": -1}, "examples: want a finite number >= 0, got -1"),
        ({"heldout": 40}, "heldout=40: want fewer than the 40 different prompts"),
        ({"task": "arithmetic", "task_options": "{}"}, "task='arithmetic' does not use it"),
        (
            {"task": "reasoning_gym:boxnet", "problems": 4, "heldout": 1},
            "examples=3: boxnet generates no answers .* set --examples 0",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_generator_that_raises_later_is_an_error_too(monkeypatch):
    from reasoning_gym.algorithmic.letter_counting import LetterCountingDataset

    def fails(self, number):
        raise RuntimeError("no such problem exists")

    monkeypatch.setattr(LetterCountingDataset, "__getitem__", fails)
    with pytest.raises(ValueError, match=r"letter_counting', task_options=None: no such problem"):
        build()


def test_generators_without_answers_are_scored_by_their_own_rules():
    task = build("reasoning_gym:boxnet", problems=4, heldout=1, examples=0)
    assert {row["answer"] for row in task.train} == {""}
    assert scores(task, task.train[:1], ["nothing"]).total.tolist() == [0]


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        build()


def test_options_of_the_generator_come_from_a_file_too(tmp_path):
    path = tmp_path / "c.yaml"
    content = {"task": LETTERS, "model": "m", "task_options": {"min_words": 2, "max_words": 2}}
    path.write_text(yaml.safe_dump(content))
    for row in tasks.build(parse([str(path), "--problems=20", "--heldout=2"])).train:
        assert len(questions(row["prompt"])[-1].split('"')[3].split()) == 2


def test_a_run_its_evaluation_and_its_continuation_have_the_same_problems(tmp_path, capsys):
    model = given_model(tmp_path, dataset=_letters(tmp_path), heldout=1)
    options = {
        "task": LETTERS, "model": model, "problems": 12, "heldout": 3, "examples": 1,
        "max_new_tokens": 3, "completions_steps": 1, "beta": 0,
    }  # fmt: skip
    assert main(["train", *arguments(tmp_path / "runs", **options)]) == 0
    run = tmp_path / "runs" / "reasoning_gym-letter_counting"
    row = metrics(run)[0]
    assert (row["reward_failures"], row["reward"]) == (0, row["reward/score"])
    lines = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    task = tasks.build(TrainConfig(**{**options, "model": str(model)}))
    known = {row["prompt"]: row["answer"] for row in task.train}
    assert {line["prompt"]: line["answer"] for line in lines}.items() <= known.items()
    assert main(["eval", str(run)]) == 0
    assert "(3 held-out problems)" in capsys.readouterr().out
    assert main(["train", f"--resume={run}", "--steps=4"]) == 0
    assert [row["step"] for row in metrics(run)] == [0, 1, 2, 3]


def _letters(folder) -> str:
    """A dataset whose characters are all that a tokenizer for letter_counting may need."""
    text = "".join(map(chr, range(32, 127))) + "\n"
    path = folder / "letters.jsonl"
    rows = [{"prompt": text, "answer": "1"}, {"prompt": text[::-1], "answer": "1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
