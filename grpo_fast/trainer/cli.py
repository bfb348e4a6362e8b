"""The command line: `grpo-fast train`, `eval`, `report`, `plan`, `explain` and `doctor`."""

import argparse
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import grpo_fast
from grpo_fast.integrations.shared.packages import TRANSFORMERS, found_version, require
from grpo_fast.notices import FallbackError
from grpo_fast.trainer import console, files
from grpo_fast.trainer.interruption import Stopped
from grpo_fast.trainer.rewards import RewardError

EXTRA = (
    "transformers", "tokenizers", "matplotlib", "yaml", "filelock", "accelerate", "rich", "plotly",
)  # fmt: skip

OVERVIEW = """\
commands:
  train    make a run, or go on with one
  eval     measure the accuracy of a run
  report   write a page about a run
  plan     predict whether a run fits a GPU
  explain  show one training step, stage by stage
  doctor   say what is installed, what runs on this machine, and whether it is right"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done. 1: failed. 2: an argument cannot be used. 128 + n: signal n ended the run (130: Ctrl-C), and a
    checkpoint was saved.
    """
    parser = argparse.ArgumentParser(
        prog="grpo-fast",
        description="GRPO training of a causal language model",
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"grpo_fast {grpo_fast.__version__}")
    parser.add_argument("command", choices=list(COMMANDS), help="what to do, see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see grpo-fast COMMAND --help")
    chosen = parser.parse_args(arguments)
    with console.lasting():
        return run(chosen.command, chosen.arguments)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one command, and turn its errors into messages and exit statuses."""
    # The doctor needs no transformers. Where it is missing, its import names the extra.
    if command != "doctor" and found_version("transformers") is not None:
        try:
            require("transformers", TRANSFORMERS)
        except ImportError as error:
            return fail(command, 1, str(error))
    try:
        return COMMANDS[command](arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA:
            raise
        return fail(command, 1, f"{error}: {how_to_install()}")
    except RewardError as error:
        print(error.details, end="", file=sys.stderr)
        return fail(command, 1, str(error))
    except (FloatingPointError, FallbackError) as error:
        return fail(command, 1, str(error))
    except OSError as error:
        refused = isinstance(error, FileExistsError) and error.errno is None  # a run that exists
        return fail(command, 2 if refused else 1, files.reason(error))
    except ValueError as error:
        return fail(command, 2, str(error))
    except KeyboardInterrupt as error:
        number = error.args[0] if isinstance(error, Stopped) else signal.SIGINT
        return fail(command, 128 + number, "interrupted")


def how_to_install() -> str:
    """Return the command that installs what the trainer needs, for a checkout or an installed package."""
    root = Path(grpo_fast.__file__).parents[1]
    if (root / "pyproject.toml").is_file():
        return f"pip install '{root}[train]' (or `make train` there, in an environment of its own)"
    return "pip install '.[train]' in a checkout of grpo_fast"


def fail(command: str, status: int, message: str) -> int:
    """Print an error and return the exit status."""
    print(f"grpo-fast {command}: error: {message}", file=sys.stderr)
    return status


def train(arguments: Sequence[str]) -> int:
    """Run `grpo-fast train` and print how the run ended."""
    from grpo_fast.trainer import parsing
    from grpo_fast.trainer import train as training

    settings = parsing.parse(arguments)
    if not settings.resume:
        settings = parsing.renamed(settings, arguments)
    quiet()
    end = training.train(settings, parsing.given_in(arguments))
    if os.environ.get("RANK", "0") != "0":  # of several processes one speaks
        return 0 if end.signal is None else 128 + end.signal
    print(
        f"reward {end.first_reward:.3f} -> {end.last_reward:.3f} in {end.steps} GRPO steps, "
        f"{end.seconds:.0f} s in all"
    )
    if settings.dry_run:  # its folder is gone
        print("dry run: the options can be used; nothing was kept")
        return 0 if end.signal is None else 128 + end.signal
    print(f"checkpoint: {end.checkpoint}\ncurve: {end.run_dir / 'curve.png'}")
    if end.signal is not None:
        print(f"interrupted after step {end.steps}; the weights are in {end.checkpoint}")
        return 128 + end.signal
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Run `grpo-fast eval` and print its table."""
    parser = argparse.ArgumentParser(
        prog="grpo-fast eval",
        usage="grpo-fast eval RUN [--option value]...",
        description="accuracy and rewards of a run on its held-out problems, with 95 % intervals",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or a checkpoint")
    parser.add_argument(
        "--seeds", "--seed", type=int, nargs="+", default=[0], metavar="SEED",
        help="seeds of the sampled answers (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--temperatures", type=float, nargs="+", metavar="T",
        help="temperatures; 0 is greedy, and sampled once (default: 0 and that of the run)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=1, help="answers to each problem for each seed (default: 1)"
    )
    parser.add_argument(
        "--base", action="store_true",
        help="evaluate the model before GRPO, too, and show the paired differences",
    )  # fmt: skip
    parser.add_argument(
        "--answers",
        type=int,
        default=0,
        metavar="N",
        help="show the answers to the first N problems",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ...; auto: cuda if there is one"
    )
    chosen = parser.parse_args(arguments)
    from grpo_fast.trainer.evaluate import evaluate_run
    from grpo_fast.trainer.results import Wanted

    quiet()
    wanted = Wanted(
        seeds=chosen.seeds,
        temperatures=chosen.temperatures,
        samples=chosen.samples,
        base=chosen.base,
        answers=chosen.answers,
        path=chosen.json and chosen.json.expanduser(),
    )
    command = shlex.join(["grpo-fast", "eval", *arguments])
    print(evaluate_run(chosen.run, chosen.device, wanted, command))
    return 0


def report(arguments: Sequence[str]) -> int:
    """Run `grpo-fast report`: write a page about a run, and print where it is."""
    parser = argparse.ArgumentParser(
        prog="grpo-fast report", description="one page about a run, for a browser without network"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="file to write; default: RUN/report.html")
    chosen = parser.parse_args(arguments)
    from grpo_fast.trainer.report import write

    print(write(chosen.run.expanduser(), chosen.out))
    return 0


def plan(arguments: Sequence[str]) -> int:
    """Run `grpo-fast plan`: print whether a run fits a GPU."""
    parser = argparse.ArgumentParser(
        prog="grpo-fast plan",
        usage="grpo-fast plan [CONFIG.yaml] --gpu 24GB [--option value]...",
        description="whether a run fits a GPU, and what to change; takes the options of grpo-fast train, too",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", required=True, help="memory of a GPU, such as 24GB")
    parser.add_argument(
        "--prompt_tokens", "--prompt-tokens", type=int, default=512, metavar="N",
        help="longest prompt, in tokens (default: 512)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="number of GPUs (default: 1)"
    )
    chosen, rest = parser.parse_known_args(arguments)
    from grpo_fast.trainer import fitting, known_models, parsing, sizing, workload

    quiet()
    settings = parsing.parse(rest)
    if settings.model is None:
        raise ValueError("plan: want --model, the name or folder of a model, or its config.json")
    budget = sizing.parse_size(chosen.gpu)
    work = workload.of(settings, chosen.prompt_tokens, chosen.processes)
    print(fitting.table(known_models.describe(settings.model), work, budget))
    return 0


def explain(arguments: Sequence[str]) -> int:
    """Run `grpo-fast explain`: show one step, stage by stage."""
    from grpo_fast.trainer.explain import command

    return command.explain(arguments)


def doctor(arguments: Sequence[str]) -> int:
    """Run `grpo-fast doctor`, which needs no extra."""
    try:
        from grpo_fast.doctor import command
    except ImportError as error:
        return fail("doctor", 1, str(error))
    return command.main(arguments)


COMMANDS = {
    "train": train, "eval": evaluate, "report": report, "plan": plan, "explain": explain,
    "doctor": doctor,
}  # fmt: skip


def quiet() -> None:
    """Turn off the progress bars and warnings of transformers: the trainer prints its own."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    # peft asks transformers for it; nobody who trains can do anything about it.
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
