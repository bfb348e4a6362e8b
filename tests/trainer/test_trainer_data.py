"""Datasets of the included trainer: JSON Lines are read unchanged, and errors name the line."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.trainer import config as configs
from grpo_fast.trainer import elsewhere, rewards, tasks
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.config import TrainConfig
from tests.support.tiny_runs import arguments, metrics, setup, tiny, write_rows

ROOT = Path(__file__).parents[2]
ROW = b'{"prompt": "p", "answer": "a"}'
CHAT = [{"role": "user", "content": "1+2"}]


def rows_of(path: Path, content: bytes, **options) -> list[dict]:
    path.write_bytes(content)
    task = tasks.build(TrainConfig(dataset=str(path), heldout=1, **options))
    return sorted(task.train + task.heldout, key=lambda row: json.dumps(row["prompt"]))


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_lines_end_at_line_feeds_alone(tmp_path, character):
    text = f"one{character}two"
    raw = json.dumps({"prompt": text, "answer": "1"}, ensure_ascii=ord(character) < 32)
    content = f'{raw}\r\n\r\n{{"prompt": "x", "answer": 2}}'.encode()
    found = rows_of(tmp_path / "rows.jsonl", content)
    assert [row["prompt"] for row in found] == [text, "x"]


def test_a_byte_order_mark_and_other_columns_are_fine(tmp_path):
    content = (
        b'\xef\xbb\xbf{"prompt": "a", "answer": "1", "c": NaN, "c": [1]}\n'
        b'{"prompt": "b", "answer": 1.5, "c": null}\n \n'
    )
    found = rows_of(tmp_path / "rows.jsonl", content)
    assert [row["c"] for row in found] == [[1], None]  # the last of two, as json does


@pytest.mark.parametrize(
    "line, message",
    [
        (b"\xff\xfe{}", "not UTF-8: .*0xff"),
        (b'{"prompt": "\xe9", "answer": "a"}', "not UTF-8: .*0xe9"),
        (b"{", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b'{"prompt": "p", "answer": ' + b"9" * 5000 + b"}", "not JSON: "),
        (b'["p", "a"]', "want an object like .*, got list"),
        (b'"text"', "want an object like .*, got str"),
        (b'{"question": "p", "answer": "a"}', "no column prompt; there are: question, answer"),
        (b'{"prompt": "p"}', "no column answer .without --reward"),
        (b'{"prompt": "p", "answer": null}', "answer: want text or a number, got null"),
        (b'{"prompt": "p", "answer": ["a"]}', r'answer: want text or a number, got \["a"\]'),
        (b'{"prompt": "", "answer": "a"}', 'prompt: empty: ""'),
        (b'{"prompt": [], "answer": "a"}', r"prompt: empty: \[\]"),
        (b'{"prompt": 5, "answer": "a"}', "prompt: want text or a list of messages, got 5"),
        (b'{"prompt": null, "answer": "a"}', "prompt: want text or a list of messages, got null"),
        (b'{"prompt": {"role": "user"}, "answer": "a"}', "prompt: want text or a list of messages"),
        (b'{"prompt": ["x"], "answer": "a"}', 'prompt: want messages like .*, got "x"'),
        (b'{"prompt": [{"role": "user"}], "answer": "a"}', "prompt: want messages like"),
        (
            b'{"prompt": [{"role": "user", "content": "x"}], "answer": "a"}',
            "prompt: text and chat messages are mixed, see line 3",
        ),
        (b'{"prompt": "p", "answer": "a", "more": 1}', "other columns than line 3: more"),
        (b'{"prompt": "\\ud800", "answer": "a"}', "half of a surrogate pair"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_lines_are_named_before_anything_is_written(tmp_path, capsys, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n\n" + ROW + b"\n" + line + b"\n" + ROW)
    assert main(["train", *arguments(tmp_path / "runs", dataset=path)]) == 2
    assert re.search(rf"{path}, line 4: {message}", capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_columns_that_every_reward_function_gets(tmp_path, name):
    content = json.dumps({"prompt": "p", "answer": "a", name: [1]}).encode()
    with pytest.raises(ValueError, match=f"line 1: a column cannot be called '{name}'"):
        rows_of(tmp_path / "rows.jsonl", content)


def test_too_few_rows_say_what_to_set(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
        rows_of(path, b"\n\n")
    with pytest.raises(ValueError, match="there must be two at least"):
        rows_of(path, ROW + b"\n" + ROW)
    write_rows(path, [{"prompt": f"{i}", "answer": "a"} for i in range(4)])
    with pytest.raises(ValueError, match=r"heldout=4: .* set --heldout to at most 3"):
        tasks.build(TrainConfig(dataset=str(path), heldout=4))


@pytest.mark.parametrize("rows, heldout", [(2, 1), (40, 4), (3000, 150)])
def test_a_tenth_of_a_dataset_is_held_out(tmp_path, rows, heldout):
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": f"{i}", "answer": ""} for i in range(rows)])
    assert len(tasks.build(TrainConfig(dataset=path)).heldout) == heldout
    assert len(tasks.build(TrainConfig(dataset=path, heldout=1)).heldout) == 1


def test_answers_are_required_only_where_they_are_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    reward = {"reward": ["math:hypot"]}
    content = b'{"prompt": "p"}\n{"prompt": "q"}'
    path = tmp_path / "rows.jsonl"
    assert rows_of(path, content, model="some/model", **reward)
    assert rows_of(path, content, warmup_steps=0, **reward)
    with pytest.raises(ValueError, match="warmed up on the answers; --warmup_steps 0 or --model"):
        rows_of(path, content, **reward)
    with pytest.raises(ValueError, match="without --reward"):
        rows_of(path, content, model="some/model")


def test_config_holds_what_was_resolved(tmp_path):
    path = write_rows(
        tmp_path / "r.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    )
    options = arguments(tmp_path, dataset=path, steps=1, name="run")
    assert main(["train", *[o for o in options if not o.startswith("--heldout")]]) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["heldout"] == 4
    assert written["learning_rate"] == 1e-3
    assert TrainConfig(model="x").learning_rate == 1e-6
    assert TrainConfig(model="x", learning_rate=1e-5).learning_rate == 1e-5
    for name, (new, given) in configs.DEFAULTS.items():
        assert getattr(TrainConfig(), name) == new
        assert getattr(TrainConfig(model="x"), name) == given


def test_help_shows_both_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "highest learning rate of the schedule (default: 0.001; with model 1e-06)" in shown
    assert "optimiser steps per batch of completions (default: 2; with model 1)" in shown
    assert "default: None" not in shown


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("num_generations", "group_size"),
        ("max-completion-length", "max_new_tokens"),
        ("num_train_epochs", "steps"),
        ("per_device_train_batch_size", "micro_batch_size"),
        ("gradient_accumulation_steps", "prompts_per_step"),
        ("loss_type", "objective"),
        ("lr", "learning_rate"),
        ("model_name_or_path", "model"),
        ("dataset_name", "dataset"),
        ("reward_funcs", "reward"),
        ("epsilon", "epsilon_low"),
        ("kl_coef", "beta"),
        ("run_name", "name"),
        ("bf16", "dtype"),
        ("save_total_limit", "keep_checkpoints"),
        ("warmup_ratio", "lr_warmup_steps"),
        ("logging_steps", "metrics.jsonl"),
    ],
)
def test_names_of_other_trainers_lead_to_ours(tmp_path, capsys, theirs, ours):
    assert main(["train", f"--{theirs}", "8"]) == 2
    assert ours in capsys.readouterr().err
    path = tmp_path / "c.yaml"
    path.write_text(f"{theirs.replace('-', '_')}: 8\n")
    assert main(["train", str(path)]) == 2
    assert ours in capsys.readouterr().err


def test_every_name_led_to_is_an_option_and_none_leads_away_from_one():
    options = {field.name for field in dataclasses.fields(TrainConfig)}
    assert options >= set(elsewhere.ELSEWHERE)
    theirs = {name for names in elsewhere.ELSEWHERE.values() for name in names.split()}
    assert not options & (theirs | set(elsewhere.NONE_HERE))
    assert set(elsewhere.NOTES) <= theirs


def test_the_documented_reward_and_dataset(tmp_path, monkeypatch):
    """docs/trainer.md: the example reward on its lines of data, which are text, and chat messages."""
    text = (ROOT / "docs" / "trainer.md").read_text()
    (code,) = re.findall(r"```python\n(# my_rewards.py\n.*?)```", text, re.DOTALL)
    plain, chat = (
        block.splitlines() for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    )
    sys.modules.pop("my_rewards", None)  # of another test
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    short = rewards.load("my_rewards:short")
    assert short(prompts=["", ""], completions=["ab", "abc"], answer=["xy", "xy"]) == [1.0, 0.0]
    messages = [[{"role": "assistant", "content": c}] for c in ("ab", "abc")]
    assert short(prompts=["", ""], completions=messages, answer=["xy", "xy"]) == [1.0, 0.0]

    for lines, is_text in ((plain, True), (chat, False)):
        Path("rows.jsonl").write_text("\n".join(lines))
        task = tasks.build(
            TrainConfig(dataset="rows.jsonl", heldout=1, reward=["my_rewards:short"])
        )
        assert isinstance(task.train[0]["prompt"], str) is is_text
    sys.modules.pop("my_rewards", None)


def test_chat_data_train_a_chat_model(tmp_path):
    _, policy = setup(tiny(tmp_path))
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    policy.model.save_pretrained(tmp_path / "given")
    policy.tokenizer.save_pretrained(tmp_path / "given")
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1"}], "answer": i + 1} for i in range(6)]
    options = arguments(
        tmp_path, name="run", model=tmp_path / "given", steps=1, heldout=2,
        dataset=write_rows(tmp_path / "rows.jsonl", rows),
    )  # fmt: skip
    assert main(["train", *options]) == 0
    assert len(metrics(tmp_path / "run")) == 1


def test_parquet_and_datasets_are_read_as_json_lines_are(tmp_path):
    """Of the same rows: with a list of chat messages, a missing value and other columns."""
    pytest.importorskip("datasets", reason="Parquet and named datasets need it, and its pyarrow")
    import pyarrow.parquet

    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i), "n": i}
        for i in range(6)
    ]
    rows[2]["n"] = None
    write_rows(tmp_path / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "named").mkdir()
    write_rows(tmp_path / "named" / "train.jsonl", rows)
    found = []
    for name in ("rows.jsonl", "rows.parquet", "named"):
        task = tasks.build(TrainConfig(dataset=str(tmp_path / name), heldout=2, model="m"))
        found.append((task.train, task.heldout))
    assert found[0] == found[1] == found[2]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"dataset='.*bad\.parquet'"):
        tasks.build(TrainConfig(dataset=str(tmp_path / "bad.parquet")))


def test_a_dataset_that_is_nowhere_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="dataset='nobody/none': no such file, and no dataset: "):
        tasks.build(TrainConfig(dataset="nobody/none"))
    for name in ("./none.jsonl", "none.parquet", "/none", "a/b/c"):
        with pytest.raises(ValueError, match=r"no such file$"):
            tasks.build(TrainConfig(dataset=name))


def test_columns_of_other_names_and_prompts_as_chats(tmp_path):
    rows = [{"problem": f"{i}?", "solution": i, "answer": "other"} for i in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = {"prompt_column": "problem", "answer_column": "solution", "heldout": 1, "model": "m"}
    task = tasks.build(TrainConfig(dataset=path, **options))
    assert sorted(task.train + task.heldout, key=lambda r: r["answer"])[1] == {
        "prompt": "1?",
        "answer": 1,
    }
    chat = tasks.build(TrainConfig(dataset=path, chat=True, system_prompt="Be brief.", **options))
    (row,) = chat.heldout
    assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert row["prompt"][1] == {"role": "user", "content": f"{row['answer']}?"}
    with pytest.raises(
        ValueError, match=r"no column prompt; there are: .*--prompt_column names another"
    ):
        tasks.build(TrainConfig(dataset=path, heldout=1))


def test_the_order_depends_on_seed_and_position_alone():
    rows = [{"prompt": str(i)} for i in range(10)]
    order = tasks.Order(rows, 3)
    whole = order.take(0, 35)
    for epoch in range(3):
        assert sorted(r["prompt"] for r in whole[10 * epoch : 10 * epoch + 10]) == list(
            "0123456789"
        )
    assert whole[:10] != whole[10:20]
    assert tasks.Order(rows, 3).take(17, 9) == whole[17:26]
    assert tasks.Order(rows, 4).take(0, 10) != whole[:10]
