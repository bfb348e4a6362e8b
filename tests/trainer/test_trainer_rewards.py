"""Reward functions of the included trainer: the values they may return, and what happens when they fail."""

import contextlib
import math
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.trainer import checkpoints, evaluate, interruption, rewards
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.config import TrainConfig
from tests.support.tiny_runs import arguments, metrics, start

ROOT = Path(__file__).parents[2]


def score(returned):
    """The rewards of two completions, for a function that returns this."""

    def mine(prompts, completions, **kwargs):
        return returned

    return rewards.score([mine], [1.0], ["", ""], ["", ""], {})


@pytest.mark.parametrize(
    "returned",
    [
        None, 1.0, "ab", b"ab", {0: 1.0, 1: 2.0}, [1.0, 2.0, 3.0], [1.0, math.inf], ["1", "2"],
        [[1.0], [2.0]], torch.zeros(2, 1), torch.tensor(1.0), np.zeros(3), [1j, 1.0], [object(), 1.0],
    ],
    ids=lambda returned: type(returned).__name__,
)  # fmt: skip
def test_what_is_no_list_of_rewards_is_a_failure_that_is_named(returned, capsys, untold):
    scores = score(returned)
    assert scores.total.isnan().all()
    assert scores.failures == 2
    message = capsys.readouterr().err
    assert message.startswith(
        "reward tests.trainer.test_trainer_rewards:score.<locals>.mine: want a"
    )
    assert f"got {type(returned).__name__}" in message
    assert repr(returned)[:100] in message


@pytest.mark.parametrize(
    "returned", [[math.nan, 1.0], np.array([np.nan, 1.0])], ids=["list", "array"]
)
def test_nan_is_a_failure_of_its_completion_alone(returned, capsys, untold):
    scores = score(returned)
    torch.testing.assert_close(scores.total, torch.tensor([math.nan, 1.0]), equal_nan=True)
    assert scores.failures == 1
    assert "mine returned NaN; its rewards are missing" in capsys.readouterr().err


def test_a_completion_that_breaks_a_function_does_not_cost_the_others(capsys, untold):
    def parses(completions, **_):
        return [float(c) for c in completions]

    def fair(completions, **_):
        return [0.5] * len(completions)

    texts = ["1", "two", "3"]
    scores = rewards.score([parses, fair], [1.0, 1.0], ["p"] * 3, texts, {})
    # Without its first part the second would have 0.5, fewer than it may deserve.
    torch.testing.assert_close(scores.total, torch.tensor([1.5, math.nan, 3.5]), equal_nan=True)
    assert scores.failures == 1
    assert scores.means == {"parses": 2.0, "fair": 0.5}
    shown = capsys.readouterr().err
    assert shown.count("raised ValueError: could not convert string to float: 'two'") == 1
    rewards.score([parses], [1.0], ["p"] * 3, texts, {})
    assert capsys.readouterr().err == ""  # said once


def test_a_call_that_takes_too_long_is_given_up(capsys, untold):
    def slow(completions, **_):
        for text in completions:
            with contextlib.suppress(Exception):  # as functions often do
                time.sleep(60 if text == "slow" else 0)
        return [1.0] * len(completions)

    begin = time.monotonic()
    scores = rewards.score([slow], [1.0], ["p"] * 3, ["a", "slow", "b"], {}, timeout=0.3)
    assert time.monotonic() - begin < 10
    torch.testing.assert_close(scores.total, torch.tensor([1.0, math.nan, 1.0]), equal_nan=True)
    assert "took longer than 0.3 s for 3 completions" in capsys.readouterr().err


class Panic(BaseException):
    """As libraries in other languages raise."""


@pytest.mark.parametrize("error", [Panic("panic"), SystemExit(3), GeneratorExit()])
def test_whatever_a_function_raises_is_a_failure(error, capsys, untold):
    class Odd(list):
        def __iter__(self):
            raise error

    def raises(**_):
        raise error

    def odd(**_):
        return Odd([1.0])

    for reward in (raises, odd):
        assert rewards.score([reward], [1.0], ["p"], ["c"], {}).failures == 1
        assert f"raised {type(error).__name__}" in capsys.readouterr().err


def test_ctrl_c_is_no_failure():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards.score([interrupted], [1.0], ["p"], ["c"], {})


def test_a_reward_that_changes_the_working_directory_moves_no_files(module, monkeypatch):
    (module / "elsewhere").mkdir()
    (module / "my_rewards.py").write_text(
        "import os\ndef moves(completions, **_):\n"
        "    os.chdir('/')\n    return [float(i) for i in range(len(completions))]\n"
    )
    options = arguments("rel", name="run", reward="my_rewards:moves", warmup_steps=0, steps=2)
    assert main(["train", *options]) == 0
    assert len(metrics(module / "rel" / "run")) == 2
    assert checkpoints.latest(module / "rel" / "run").name == "step-000002"


def test_a_function_may_use_the_alarm_itself():
    def alarmed(completions, **_):
        previous = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(5)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        time.sleep(60)
        return [1.0] * len(completions)

    scores = rewards.score([alarmed], [1.0], ["p"], ["c"], {}, timeout=0.3)
    assert scores.failures == 1


def test_a_time_that_is_up_at_once_leaves_nothing_behind(monkeypatch):
    class Timer:
        ident = None

        def __init__(self, *_):
            self.cancel = self.join = lambda: None

        def start(self):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)

    before = signal.getsignal(signal.SIGUSR2)
    monkeypatch.setattr(threading, "Timer", Timer)
    with pytest.raises(rewards.TimeIsUp), rewards.at_most(5):
        pass
    assert signal.getsignal(signal.SIGUSR2) is before


def test_a_library_that_reacts_to_nothing_ends_the_process_with_its_traceback():
    """The watchdog needs neither the interpreter nor a signal handler."""
    code = (
        "import ctypes, sys\n"
        "from grpo_fast.trainer import rewards\n"
        "rewards.STUBBORN = 1.0\n"
        "def stuck(completions, **_):\n"
        "    ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock\n"
        "rewards.score([stuck], [1.0], ['p'], ['c'], {}, timeout=0.1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in stuck" in done.stderr


@pytest.mark.parametrize(
    "returned",
    [
        [1, True], (1.0, 1), torch.ones(2), torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        np.ones(2), np.ones(2, dtype=bool), [np.float32(1), torch.tensor(1.0)],
        (x for x in (1.0, 1.0)),
    ],
    ids=lambda returned: type(returned).__name__,
)  # fmt: skip
def test_lists_of_numbers_of_any_kind(returned):
    scores = score(returned)
    torch.testing.assert_close(scores.total, torch.ones(2))
    assert scores.means == {"mine": 1.0}


def test_none_is_a_reward_that_does_not_apply():
    def right(prompts, completions, **kwargs):
        return [1.0, None, None]

    def short(prompts, completions, **kwargs):
        return [None, 3.0, None]

    scores = rewards.score([right, short], [1.0, 2.0], [""] * 3, [""] * 3, {})
    torch.testing.assert_close(scores.total, torch.tensor([1.0, 6.0, math.nan]), equal_nan=True)
    assert scores.means == {"right": 1.0, "short": 3.0}
    assert scores.failures == 0


def test_functions_of_one_name_are_told_apart():
    def first():
        def mine(**kwargs):
            return [1.0]

        return mine

    def second():
        def mine(**kwargs):
            return [2.0]

        return mine

    means = rewards.score([first(), second()], [1.0, 1.0], [""], [""], {}).means
    assert sorted(means.values()) == [1.0, 2.0]
    assert all("mine" in name for name in means)


@pytest.fixture
def untold(monkeypatch):
    """No failure has been printed before."""
    monkeypatch.setattr(rewards, "_TOLD", set())


MODULE = """
import time
def missing(prompts, completions, **kwargs):
    import no_such_package
def value(prompts, completions, **kwargs):
    return [int("x") for c in completions]  # my own line
def leaves(prompts, completions, **kwargs):
    raise SystemExit(0)
def partly(prompts, completions, **kwargs):
    return [None if i % 4 == 0 else float(len(c)) for i, c in enumerate(completions)]
def none(prompts, completions, **kwargs):
    return [None] * len(completions)
calls = 0
def hangs(prompts, completions, **kwargs):
    global calls
    calls += 1
    while calls > 5:
        open("hangs", "w")
        time.sleep(0.01)
    return [0.0] * len(completions)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The folder of my_rewards.py, which is the working directory."""
    sys.modules.pop("my_rewards", None)  # of another test
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize(
    "function, error",
    [
        ("missing", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("value", "ValueError: invalid literal"),
        ("leaves", "SystemExit: 0"),
    ],
)
def test_a_reward_that_raises_shows_its_line_and_the_run_goes_on(
    module, capsys, function, error, untold
):
    options = arguments(
        module, name="run", reward=f"my_rewards:{function}", warmup_steps=0, steps=2
    )
    assert main(["train", *options]) == 0
    shown = capsys.readouterr().err
    assert f"reward my_rewards:{function} raised {error}" in shown
    assert "my_rewards.py" in shown
    assert "grpo_fast/trainer" not in shown  # from the user's own line on
    assert "pip install" not in shown
    if function == "value":
        assert "# my own line" in shown
    for row in metrics(module / "run"):
        assert (row["reward"], row["without_reward"], row["reward_failures"]) == (None, 1.0, 16)
        assert row["groups_without_signal"] == 1
        assert row["forwarded"] == (1.0 if row["kl"] is not None else 0.0)


def test_rewards_that_do_not_apply_end_no_run(module, capsys):
    options = arguments(module, warmup_steps=0, steps=2)
    assert main(["train", *options, "--name=run", "--reward=my_rewards:partly"]) == 0
    rows = metrics(module / "run")
    assert all(row["without_reward"] == 0.25 for row in rows)
    assert all(math.isfinite(row["loss"] + row["reward"]) for row in rows)
    assert all(row["reward_failures"] == 0 for row in rows)
    capsys.readouterr()

    assert main(["train", *options, "--name=none", "--reward=my_rewards:none"]) == 0
    assert metrics(module / "none")[-1]["reward"] is None
    assert "reward nan -> nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, status, message",
    [
        ("import no_such_package", 1, "importing broken raised ModuleNotFoundError"),
        ("1 +", 1, "importing broken raised SyntaxError"),
        ("raise KeyError('x')  # mine", 1, "importing broken raised KeyError"),
        ("", 2, "broken.py) has no 'f'"),
    ],
)
def test_a_module_that_cannot_be_imported(module, capsys, text, status, message):
    (module / "broken.py").write_text(text)
    assert main(["train", *arguments(module / "runs", reward="broken:f")]) == status
    shown = capsys.readouterr().err
    assert message in shown
    assert "pip install" not in shown
    if status == 1:
        assert text in shown
    assert not (module / "runs").exists()
    sys.modules.pop("broken", None)


def test_the_users_module_comes_before_an_installed_one(tmp_path, monkeypatch):
    for folder in ("installed", "mine"):
        (tmp_path / folder).mkdir()
        text = f"def where(**_): return {folder!r}"
        (tmp_path / folder / "scores_of_two.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed"), *sys.path])
    before = [*sys.path]
    assert rewards.load("scores_of_two:where", tmp_path / "mine")() == "mine"
    assert sys.path == [*before, str(tmp_path / "mine")], "others find what they found"
    sys.modules.pop("scores_of_two")


def test_what_a_function_does_to_its_arguments_stays_with_it():
    row = {"n": 1}

    def changes(prompts, completions, facts, **_):
        for prompt, fact in zip(prompts, facts, strict=True):
            prompt.append("more")
            fact["n"] += 1
        completions.clear()
        return [1.0, 2.0]

    def reads(prompts, completions, facts, **_):
        assert (prompts, facts) == ([["a"], ["a"]], [{"n": 1}] * 2)
        return [float(len(completions))] * 2

    prompt = ["a"]
    scores = rewards.score(
        [changes, reads], [1.0, 1.0], [prompt, prompt], ["x", "y"], {"facts": [row, row]}
    )
    assert scores.total.tolist() == [3.0, 4.0]
    assert (prompt, row) == (["a"], {"n": 1})


def test_functions_that_share_a_name_keep_their_own_means():
    functions = [lambda completions, x=x, **_: [x] * len(completions) for x in (0.25, 0.75)]
    names = rewards.names(functions)
    assert names[1] == f"{names[0]}-2"
    means = rewards.score(functions, [1.0, 1.0], ["p"], ["c"], {}).means
    assert list(means.values()) == [0.25, 0.75]


def test_the_first_function_is_the_accuracy_whatever_others_are_called(monkeypatch):
    means = {"right": 0.25, "reward": 0.5, "accuracy": 0.75}
    scores = rewards.Scores(
        torch.tensor([1.5]), {name: torch.tensor([x]) for name, x in means.items()}, 0
    )
    monkeypatch.setattr(evaluate.rollout, "sample", lambda *_, **__: None)
    monkeypatch.setattr(evaluate.rollout, "reward", lambda *_: scores)
    config = TrainConfig()
    found = evaluate.mean_rewards(None, None, [{"prompt": "p"}], config, 1.0)
    assert found == {"reward": 1.5, "accuracy": 0.25}


@pytest.mark.parametrize("text", ["[7]", "7", " [7] "])
@pytest.mark.parametrize("answer", ["[7]", "7", 7])
def test_brackets_do_not_matter(text, answer):
    assert rewards.correct(["p"], [text], [answer]) == [1.0]


def test_a_generator_that_raises_is_named(capsys, untold):
    def lazily(completions, **_):
        yield 1.0
        raise FileNotFoundError("tests.json")

    assert rewards.score([lazily], [1.0], ["p"] * 2, ["c"] * 2, {}).failures == 2
    assert "lazily raised FileNotFoundError: tests.json" in capsys.readouterr().err


def test_rewards_beyond_float32_are_named(capsys, untold):
    assert rewards.score([lambda **_: [1e39]], [1.0], ["p"], ["c"], {}).failures == 1
    assert "within float32's range" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_that_a_reward_starts_can_be_terminated():
    context = multiprocessing.get_context("fork")
    with interruption.interruptible() as state:
        ready = context.Event()
        child = context.Process(target=lambda: (ready.set(), time.sleep(60)))
        child.start()
        assert ready.wait(10)
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
        assert state.signal is None


def test_a_reward_that_hangs_ends_with_the_second_signal_and_the_weights(module):
    options = {"reward": "my_rewards:hangs", "warmup_steps": 0, "name": "run", "samples": 0}
    process = start(module, **options, steps=1000)
    try:
        while not (module / "hangs").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "again to save and stop at once" in err
    newest = checkpoints.latest(module / "run")
    assert str(newest) in err
    assert newest.name == f"step-{len(metrics(module / 'run')):06d}"


def test_a_second_signal_waits_while_weights_change_or_are_written(capfd):
    with interruption.interruptible() as state:
        ended = []

        def work():
            with interruption.undivided():
                signal.raise_signal(signal.SIGTERM)
                with interruption.undivided():
                    signal.raise_signal(signal.SIGINT)
                ended.append(True)

        with pytest.raises(interruption.Stopped) as stopped:
            work()
        assert ended
        assert stopped.value.args == (signal.SIGINT,)
        assert state.signal == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # a third one does not end the save that follows
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption.interruptible() as state:
            signal.raise_signal(signal.SIGHUP)
        assert state.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("where", ["torch.optim.AdamW.step", "grpo_fast.trainer.files.publish"])
def test_no_update_and_no_save_is_cut_in_two(tmp_path, monkeypatch, capfd, where):
    module, _, name = where.rpartition(".")
    target = pkgutil.resolve_name(module)
    real, ended = getattr(target, name), []

    def interrupted(*args, **kwargs):
        if not ended:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        ended.append(real(*args, **kwargs))

    monkeypatch.setattr(target, name, interrupted)
    options = arguments(tmp_path, name="run", warmup_steps=0, samples=0)
    assert main(["train", *options]) == 128 + signal.SIGTERM
    assert ended
    checkpoints.latest(tmp_path / "run")


def test_mathematical_answers_are_compared_by_their_value():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    verify = rewards.load("math_verify")
    completions = [r"So it is $\boxed{\frac{1}{2}}$.", "The answer is 0.5", r"\boxed{3}", "no idea"]
    assert verify([""] * 4, completions, ["1/2"] * 4) == [1.0, 1.0, 0.0, 0.0]
    chat = [[{"role": "assistant", "content": r"$x=\boxed{2\sqrt{2}}$"}]]
    assert verify([""], chat, [r"$\sqrt{8}$"]) == [1.0]
    assert verify([""], ["4"], [4]) == [1.0]
    scores = rewards.score([verify], [1.0], ["p"], ["4"], {"answer": ["no number"]}, timeout=60)
    assert scores.failures == 0


@pytest.fixture
def reward_model(tmp_path):
    """A model with one score, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from grpo_fast.trainer.model import character_tokenizer

    tokenizer = character_tokenizer("0123456789+=")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_a_reward_model_scores_prompt_and_completion(reward_model, monkeypatch):
    judge = rewards.load(str(reward_model), device="cpu")
    monkeypatch.setattr(rewards.RewardModel, "BATCH", 2)
    prompts, completions = ["1+2=", "11+22=", "3+3="], ["3", "33", "7"]
    found = judge(prompts=prompts, completions=completions)
    for prompt, completion, value in zip(prompts, completions, found, strict=True):
        ids = judge.tokenizer(prompt + completion, return_tensors="pt")
        assert value == pytest.approx(judge.model(**ids).logits.item(), abs=1e-5)
    assert rewards.names([judge]) == ["judge"]
    judge.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = judge(
        prompts=[[{"role": "user", "content": "1+2="}]],
        completions=[[{"role": "assistant", "content": "3"}]],
    )
    assert chat == pytest.approx(found[:1], abs=1e-5)
    judge.model.config.max_position_embeddings = 4
    with pytest.raises(ValueError, match="a text of 8 tokens, and judge has 4 positions"):
        judge(prompts=prompts, completions=completions)


def test_a_reward_model_in_a_run(reward_model, tmp_path, capsys):
    options = arguments(tmp_path, name="run", steps=1, warmup_steps=0, reward=reward_model)
    assert main(["train", *options]) == 0
    row = metrics(tmp_path / "run")[0]
    assert row["reward"] == pytest.approx(row["reward/judge"])
    assert row["reward_std"] > 0
    (tmp_path / "empty").mkdir()
    options = arguments(tmp_path, name="no", reward=tmp_path / "empty")
    assert main(["train", *options]) == 2
    assert "no reward model can be loaded" in capsys.readouterr().err
