"""Reward functions: plain Python, with TRL's signature; and reward models.

`def reward(prompts, completions, **kwargs) -> list[float]` returns one number per completion. The other
columns of the dataset are keyword arguments, with one value per completion, and `completion_ids` is another.
Prompts and completions are strings, or lists of chat messages if the dataset has those. None in the list
means that the reward does not apply to this completion, as in TRL.

A function that raises, takes too long or returns NaN has failed. The run goes on: the failures are counted,
and completions that they concern have no reward, because a missing part of a reward would act as a zero.
"""

import contextlib
import copy
import faulthandler
import importlib.util
import math
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.operands import LARGEST
from grpo_fast.trainer.quoting import quoted

Reward = Callable[..., list[float | None]]
Text = str | list[dict[str, str]]
# The arguments of every call. A column of a dataset cannot have these names.
ARGUMENTS = ("prompts", "completions", "completion_ids")


class RewardError(ValueError):
    """An error of a reward function: it raised, or did not return a list of rewards.

    Attributes:
        details: the traceback of its exception, from its own first line on; or "".
    """

    def __init__(self, message: str, raised: BaseException | None = None) -> None:
        super().__init__(message)
        self.details = ""
        if raised is not None:
            frames = raised.__traceback__
            while frames is not None and _ours(frames.tb_frame.f_code.co_filename):
                frames = frames.tb_next
            self.details = "".join(traceback.format_exception(type(raised), raised, frames))


def text_of(completion: Text) -> str:
    """Return the text of a completion, which may be a chat message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def correct(
    prompts: list[Text], completions: list[Text], answer: list[Any], **kwargs: Any
) -> list[float | None]:
    """Return 1 if the completion equals the `answer` column, else 0.

    Surrounding spaces and the brackets of `[...]` do not count.
    """
    pairs = zip(completions, answer, strict=True)
    return [float(_bare(text_of(c)) == _bare(str(a))) for c, a in pairs]


def _bare(text: str) -> str:
    return text.strip().removeprefix("[").removesuffix("]").strip()


def bracketed_number(
    prompts: list[Text], completions: list[Text], **kwargs: Any
) -> list[float | None]:
    """Return 1 if the completion is a whole number in brackets, like `[42]`, and nothing else."""
    return [float(re.fullmatch(r"\[\d+\]", text_of(c)) is not None) for c in completions]


def math_verify(
    prompts: list[Text], completions: list[Text], answer: list[Any], **kwargs: Any
) -> list[float | None]:
    """Return 1 if the completion's mathematical answer equals the `answer` column, else 0 (math-verify).

    None where the answer itself cannot be read.
    """
    from math_verify import parse, verify

    values: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        gold = parse(str(right)) or parse(f"${right}$")
        values.append(float(verify(gold, parse(text_of(completion)))) if gold else None)
    return values


BUILT_IN: dict[str, Reward] = {"correct": correct, "math_verify": math_verify}


class RewardModel:
    """A model with one score for a text, `AutoModelForSequenceClassification`, as a reward function.

    Args:
        name: its folder or hub id.
        device: "auto": cuda if there is one.

    Raises:
        ValueError: it cannot be loaded, or has several scores.
    """

    BATCH = 16

    def __init__(self, name: str, device: str = "auto") -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from grpo_fast.trainer.loading import refusal

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # of whatever the files' readers raise
            text = refusal(error) or " ".join(str(error).split())
            raise ValueError(f"reward={name!r}: no reward model can be loaded: {text}") from error
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"reward={name!r}: want a model with one score, got {self.model.config.num_labels} labels"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.eval().requires_grad_(False).to(device)
        self.__name__ = self.__qualname__ = Path(name).name

    @torch.no_grad()
    def __call__(
        self, prompts: list[Text], completions: list[Text], **kwargs: Any
    ) -> list[float | None]:
        texts: list[str] = []
        special = True  # a chat template has written the special tokens already
        for prompt, completion in zip(prompts, completions, strict=True):
            if isinstance(prompt, str) or isinstance(completion, str):
                texts.append(f"{prompt}{text_of(completion)}")
            else:
                chat = [*prompt, *completion]
                texts.append(str(self.tokenizer.apply_chat_template(chat, tokenize=False)))
                special = False
        scores: list[float | None] = []
        for i in range(0, len(texts), self.BATCH):
            some = texts[i : i + self.BATCH]
            inputs = self.tokenizer(
                some, padding=True, return_tensors="pt", add_special_tokens=special
            )
            places = getattr(self.model.config, "max_position_embeddings", None)
            if places is not None and inputs["input_ids"].shape[1] > places:
                raise ValueError(
                    f"a text of {inputs['input_ids'].shape[1]} tokens, and {self.__name__} has {places} "
                    "positions"
                )
            out = self.model(**inputs.to(self.model.device)).logits[:, 0]
            scores += out.float().tolist()
        return scores


def load(specification: str, folder: Path | None = None, device: str = "auto") -> Reward:
    """Return a built-in reward, a reward model, or the function `module:function`.

    Raises:
        ValueError: there is none of this name.
        RewardError: the import of its module raised.
    """
    if specification in BUILT_IN:
        if specification == "math_verify" and importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward='math_verify': not installed; pip install math-verify")
        return BUILT_IN[specification]
    if ":" not in specification and not specification.endswith(".py"):
        path = Path(specification).expanduser()
        if path.is_dir() or "/" in specification:
            return RewardModel(str(path), device)
    return imported(specification, folder)


def imported(specification: str, folder: Path | None = None) -> Reward:
    """Import the function `module:function`.

    Modules of `folder` are found before installed ones, but after modules that Python has already imported,
    such as its own `queue`.

    Args:
        folder: default: the working directory. Later imports by the functions search it last.

    Raises:
        ValueError: the specification has another form, or does not name a function.
        RewardError: the import of its module raised.
    """
    module, _, function = specification.partition(":")
    if not module or not function or module.endswith(".py"):
        raise ValueError(
            "reward: want module:function, such as my_rewards:short (without .py), one of "
            f"{', '.join(BUILT_IN)}, or the folder or hub id of a reward model; got {specification!r}"
        )
    folder = folder or Path.cwd()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        reward = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = (isinstance(error, ModuleNotFoundError) and error.name) or ""
        if missing and f"{module}.".startswith(f"{missing}."):
            raise ValueError(
                f"reward={specification!r}: no module {module!r} in {folder}, nor installed"
            ) from error
        raise RewardError(
            f"reward={specification!r}: importing {module} raised {_raised(error)}", error
        ) from error
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    for name in function.split("."):
        if not hasattr(reward, name):
            where = getattr(sys.modules[module], "__file__", "built in")
            raise ValueError(
                f"reward={specification!r}: {module} ({where}) has no {function!r}; a file of another name "
                "cannot be taken for that module"
            )
        reward = getattr(reward, name)
    if not callable(reward):
        raise ValueError(f"reward={specification!r}: not a function")
    return reward


class Scores(NamedTuple):
    """The rewards of B completions.

    Attributes:
        total: (B,) the weighted sum of what applies; NaN: no reward applies, or one has failed.
        each: what each function gave, by name, (B,) float64; NaN: it does not apply, or has failed.
        failures: how many times a function failed for a completion.
    """

    total: Tensor
    each: dict[str, Tensor]
    failures: int

    @property
    def means(self) -> dict[str, float]:
        """The mean of each reward over the completions that it applies to; NaN if there is none."""
        return {name: values.nanmean().item() for name, values in self.each.items()}


def score(
    rewards: Sequence[Reward],
    weights: Sequence[float],
    prompts: list[Text],
    completions: list[Text],
    columns: dict[str, list[Any]],
    timeout: float = math.inf,
) -> Scores:
    """Return the rewards of completions.

    Each function gets copies, so it cannot change the dataset or the arguments of the others. A function that
    fails for a batch is called for each completion alone, so that one of them does not cost the others.

    Args:
        timeout: seconds after which a call is given up.
    """
    total = torch.zeros(len(completions), dtype=torch.float64)
    scored, failed = torch.zeros(2, len(completions), dtype=torch.bool)
    each, failures = {}, 0
    for name, reward, weight in zip(names(rewards), rewards, weights, strict=True):
        given = {"prompts": prompts, "completions": completions, **columns}
        values, wrong = _values(reward, given, len(completions), timeout)
        applies = ~values.isnan()
        total += weight * values.nan_to_num()
        scored |= applies
        failed |= wrong
        failures += int(wrong.sum())
        each[name] = values
    return Scores(torch.where(scored & ~failed, total, math.nan).float(), each, failures)


def _values(
    reward: Reward, given: dict[str, list[Any]], count: int, timeout: float
) -> tuple[Tensor, Tensor]:
    """Call a reward function: its values, (count,) float64, NaN where missing, and where it has failed."""
    try:
        return _called(reward, given, count, timeout)
    except RewardError as error:
        _tell(error, reward)
    values = torch.full((count,), math.nan, dtype=torch.float64)
    failed = torch.ones(count, dtype=torch.bool)
    if count > 1:
        for i in range(count):
            one = {name: [x[i]] for name, x in given.items()}
            with contextlib.suppress(RewardError):
                values[i : i + 1], failed[i : i + 1] = _called(
                    reward, one, 1, max(timeout / count, min(timeout, 1.0))
                )
    return values, failed


def _called(
    reward: Reward, given: dict[str, list[Any]], count: int, timeout: float
) -> tuple[Tensor, Tensor]:
    """Call a reward function once.

    Raises:
        RewardError: it raised, took too long, or did not return one number or None per completion.
    """
    try:
        with at_most(timeout):
            returned = reward(**{k: [copy.deepcopy(x) for x in v] for k, v in given.items()})
            if isinstance(returned, Iterator):
                returned = list(returned)
            numbers = _numbers(returned, count)
            shown = "" if numbers is not None else _shown(returned)
    except TimeIsUp as error:
        raise RewardError(
            f"reward {place(reward)} took longer than {timeout:g} s for {count} completions", error
        ) from None
    except KeyboardInterrupt:  # Ctrl-C, or a second signal
        raise
    except BaseException as error:  # SystemExit, and what libraries in other languages raise
        raise RewardError(f"reward {place(reward)} raised {_raised(error)}", error) from error
    if numbers is None:
        raise RewardError(
            f"reward {place(reward)}: want a list of {count} finite numbers, within "
            f"float32's range (None where it does not apply), got {shown}"
        )
    values, failed = numbers
    if failed.any():
        _tell(RewardError(f"reward {place(reward)} returned NaN"), reward)
    return values, failed


_TOLD: set[str] = set()
STUBBORN = 300.0


def _tell(error: RewardError, reward: Reward) -> None:
    """Print a failure, once for each function and kind."""
    kind = place(reward) + re.sub(r"\d+", "", str(error))[:80]
    if kind not in _TOLD:
        _TOLD.add(kind)
        print(
            f"{error.details}{error}; its rewards are missing, and count as reward_failures",
            file=sys.stderr,
        )


class TimeIsUp(BaseException):
    """The exception that ends a call which takes too long; a function's own handlers do not catch it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in a block that takes longer; it works in the main thread alone.

    Another signal than SIGALRM is used, which reward functions use themselves. A block that does not even
    react to that, in a library that is no Python, ends the process `STUBBORN` seconds later: its traceback is
    printed, and the exit status is 1.
    """
    main = threading.main_thread()
    if (
        seconds == math.inf
        or threading.current_thread() is not main
        or not hasattr(signal, "SIGUSR2")
    ):
        yield
        return
    running = True

    def stop(number: int, frame: object) -> None:
        if running:
            raise TimeIsUp

    previous = signal.signal(signal.SIGUSR2, stop)
    timer = threading.Timer(seconds, lambda: signal.pthread_kill(main.ident or 0, signal.SIGUSR2))
    timer.daemon = True
    try:  # around the other one, which the signal may end at any place: it comes once
        try:
            faulthandler.dump_traceback_later(
                seconds + STUBBORN, exit=True, file=sys.__stderr__ or 2
            )
            timer.start()
            yield
        finally:
            running = False
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
        if timer.ident is not None:  # it was started
            timer.join()
        signal.signal(signal.SIGUSR2, previous or signal.SIG_DFL)


def names(rewards: Sequence[Reward]) -> list[str]:
    """Return the names of the functions in metrics: `function`, or `module:function` if two share a name.

    Functions that share both names, such as those of a decorator, are numbered.
    """
    short = [getattr(r, "__name__", type(r).__name__) for r in rewards]
    long = [place(r) if short.count(s) > 1 else s for r, s in zip(rewards, short, strict=True)]
    return [f"{n}-{long[:i].count(n) + 1}" if n in long[:i] else n for i, n in enumerate(long)]


def place(reward: Reward) -> str:
    """Return `module:function`."""
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def _numbers(returned: Any, count: int) -> tuple[Tensor, Tensor] | None:
    """Convert a list of rewards to (count,) float64, None to NaN, and tell which are NaN themselves.

    Return None if it is no list of `count` numbers.
    """
    if hasattr(returned, "tolist"):  # tensors, arrays, series
        returned = returned.tolist()
    if isinstance(returned, (str, bytes, Mapping, set)) or not isinstance(returned, Iterable):
        return None
    values, wrong = [], []
    for value in returned:
        try:
            text = isinstance(value, (str, bytes))
            number = math.inf if text else math.nan if value is None else float(value)
        except Exception:  # whatever a type of theirs raises
            return None
        if abs(number) > LARGEST:
            return None
        values.append(number)
        wrong.append(value is not None and math.isnan(number))
    if len(values) != count:
        return None
    return torch.tensor(values, dtype=torch.float64), torch.tensor(wrong, dtype=torch.bool)


def _shown(returned: Any) -> str:
    """Describe the value that a function returned, in about one line."""
    size = f" of {len(returned)}" if isinstance(returned, (list, tuple)) else ""
    return f"{type(returned).__name__}{size}: {quoted(returned, 200)}"


def _ours(file: str) -> bool:
    return file == __file__ or "importlib" in file


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
