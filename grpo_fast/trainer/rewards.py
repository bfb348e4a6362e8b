"""Reward functions: plain Python, with TRL's signature.

`def reward(prompts, completions, **kwargs) -> list[float]` returns one number per completion. The other
columns of the dataset are keyword arguments, with one value per completion, and `completion_ids` is another.
Prompts and completions are strings, or lists of chat messages if the dataset has those. None in the list
means that the reward does not apply to this completion, as in TRL.
"""

import copy
import importlib
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast.operands import LARGEST

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


def load(specification: str, folder: Path | None = None) -> Reward:
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
            f"reward: want module:function, such as my_rewards:short (without .py), got {specification!r}"
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


def score(
    rewards: Sequence[Reward],
    weights: Sequence[float],
    prompts: list[Text],
    completions: list[Text],
    columns: dict[str, list[Any]],
) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted sums of the rewards, (B,), and the mean of each reward by name.

    Each function gets copies, so it cannot change the dataset or the arguments of the others. Sums and means
    ignore a reward that is None. NaN is the total of a completion without any reward, and the mean of a
    function that gave none.

    Raises:
        RewardError: a function raised, or did not return one finite number or None per completion.
    """
    total = torch.zeros(len(completions), dtype=torch.float64)
    scored = torch.zeros(len(completions), dtype=torch.bool)
    means = {}
    for name, reward, weight in zip(names(rewards), rewards, weights, strict=True):
        try:
            given = {"prompts": prompts, "completions": completions, **columns}
            returned = reward(**{k: [copy.deepcopy(x) for x in v] for k, v in given.items()})
            if isinstance(returned, Iterator):
                returned = list(returned)
        except (Exception, SystemExit) as error:
            raise RewardError(f"reward {place(reward)} raised {_raised(error)}", error) from error
        values = _numbers(returned, len(completions))
        if values is None:
            raise RewardError(
                f"reward {place(reward)}: want a list of {len(completions)} finite numbers, within "
                f"float32's range (None where it does not apply), got {_shown(returned)}"
            )
        applies = ~values.isnan()
        total += weight * values.nan_to_num()
        scored |= applies
        means[name] = values[applies].mean().item()
    return torch.where(scored, total, math.nan).float(), means


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


def _numbers(returned: Any, count: int) -> Tensor | None:
    """Convert a list of rewards to (count,) float64, None to NaN; return None if it is no such list."""
    if hasattr(returned, "tolist"):  # tensors, arrays, series
        returned = returned.tolist()
    if isinstance(returned, (str, bytes, Mapping, set)) or not isinstance(returned, Iterable):
        return None
    values = []
    for value in returned:
        if value is None:
            values.append(math.nan)
            continue
        try:
            number = math.nan if isinstance(value, (str, bytes)) else float(value)
        except Exception:  # whatever a type of theirs raises
            return None
        if not abs(number) <= LARGEST:  # nor NaN
            return None
        values.append(number)
    return torch.tensor(values, dtype=torch.float64) if len(values) == count else None


def _shown(returned: Any) -> str:
    """Describe the value that a function returned, in about one line."""
    kind, text = type(returned).__name__, repr(returned)
    size = f" of {len(returned)}" if isinstance(returned, (list, tuple)) else ""
    return f"{kind}{size}: {text if len(text) <= 200 else text[:200] + '...'}"


def _ours(file: str) -> bool:
    return file == __file__ or "importlib" in file


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
