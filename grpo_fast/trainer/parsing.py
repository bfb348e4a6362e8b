"""The options of a run, read from the command line and from YAML, and written as YAML."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, get_origin

import yaml
from transformers import HfArgumentParser

from grpo_fast.trainer import files
from grpo_fast.trainer.config import TrainConfig, default_text
from grpo_fast.trainer.elsewhere import suggestion


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Parse `[CONFIG.yaml] [--option value]...`; options override the file.

    Raises:
        ValueError: an option or key is unknown, a value is bad, or the file cannot be read.
        SystemExit: after --help, or a value of the wrong type (argparse has printed which).
    """
    arguments = list(arguments)
    lists = (f.name for f in dataclasses.fields(TrainConfig) if get_origin(f.type) is list)
    given = _names(arguments)
    for name in lists:
        if given.count(name) > 1:
            raise ValueError(f"--{name} is given twice; give all after one: --{name} FIRST SECOND")
    if arguments and not arguments[0].startswith("-"):
        arguments = [*yaml_arguments(Path(arguments[0]).expanduser()), *arguments[1:]]
    parser = HfArgumentParser(
        TrainConfig,  # type: ignore[arg-type]  # any dataclass type
        prog="grpo-fast train",
        usage="grpo-fast train [CONFIG.yaml] [--option value]...",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    config, rest = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}{suggestion(rest[0].strip('-'))}")
    return config


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that adds defaults to help texts, also those that depend on other options."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if text := default_text(action.dest):
            return f"{action.help} (default: {text.replace('`', '')})"
        if action.default in (None, []):
            return action.help
        return super()._get_help_string(action)


def renamed(config: TrainConfig, arguments: Sequence[str]) -> TrainConfig:
    """Give a run that repeats another, from its config.yaml, a free name.

    So `grpo-fast train runs/x/config.yaml` repeats the run in a new folder. With --name or --overwrite among
    the arguments the name is kept.
    """
    path = Path(arguments[0]) if arguments else Path()
    if config.name is None or path.name != "config.yaml" or not path.is_file():
        return config
    if any(a.split("=")[0] in ("--name", "--overwrite") for a in arguments):
        return config
    parent = Path(config.output_dir)
    if path.resolve().parent != (parent / config.name).resolve():
        return config
    return dataclasses.replace(config, name=files.free_name(parent, config.name))


# What may change when a run goes on. The others would make it another run.
CHANGEABLE = {
    "steps", "save_steps", "keep_checkpoints", "samples", "completions_steps", "report_to", "threads",
    "device", "reward_timeout", "sampling_tokens", "micro_batch_tokens", "micro_batch_size", "server",
    "gradient_checkpointing", "share_prompts", "attention",
}  # fmt: skip


def resumed(config: TrainConfig, run_dir: Path, given: set[str] | None = None) -> TrainConfig:
    """Return the options of a run that goes on: its own, and what may change of `config`.

    Args:
        given: the names of the options that were given; None: those that differ from their defaults.

    Raises:
        ValueError: an option is given that would make it another run.
    """
    saved = parse([str(run_dir / "config.yaml")])
    new = to_dict(config)
    if given is None:
        usual = to_dict(TrainConfig(model=config.model))
        given = {name for name in new if new[name] != usual[name]}
    changes = {}
    for name in sorted(given - {"resume", "name", "output_dir", "overwrite"}):
        old = getattr(saved, name)
        if new[name] == old:
            continue
        if name not in CHANGEABLE:
            raise ValueError(
                f"resume: {name}={new[name]!r} was {old!r}; this would be another run: give it another "
                "--name, and --model with a checkpoint to start from its weights"
            )
        changes[name] = new[name]
    place = run_dir.resolve()
    return dataclasses.replace(
        saved, **changes, resume=str(place), name=place.name, output_dir=str(place.parent)
    )


def given_in(arguments: Sequence[str]) -> set[str]:
    """Return the names of the options of a command line and of its YAML file."""
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments += yaml_arguments(Path(arguments[0]).expanduser())
    return {name.removeprefix("no_") for name in _names(arguments)}


def _names(arguments: Sequence[str]) -> list[str]:
    """Return the names of the options among some arguments; each may be written with "-" for "_"."""
    given = (a.split("=")[0].removeprefix("--") for a in arguments if a.startswith("--"))
    return [name.replace("-", "_") for name in given]


def yaml_arguments(path: Path) -> list[str]:
    """Return the keys of a YAML file as command-line arguments, so that both get the same checks.

    Raises:
        ValueError: it is no file or no mapping, a key is unknown, or null is given where there is a default.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = files.read_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, (dict, type(None))):
        raise ValueError(f"{path}: want `option: value` lines, got {type(content).__name__}")
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    arguments = []
    for key, value in (content or {}).items():
        if key not in defaults:
            raise ValueError(f"{path}: unknown key {key!r}{suggestion(str(key))}")
        if isinstance(value, list):
            arguments += [f"--{key}", *map(_plain, value)] if value else []
        elif value is not None:
            arguments.append(f"--{key}={value}")
        elif defaults[key] is not None:
            raise ValueError(f"{path}: {key}: want a value, got null")
    return arguments


def _plain(value: Any) -> str:
    """Format a value without an exponent: argparse would take -1e-05 for an option."""
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(value)), "f")
    return str(value)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return all options, with absolute paths, as they are saved.

    `overwrite` and `resume` are permissions for one run, and not for a repetition.
    """
    options = dataclasses.asdict(config) | {"overwrite": False, "resume": None}
    for name in ("dataset", "model", "output_dir", "reward_dir"):
        if options[name] is not None and (there := Path(options[name]).expanduser()).exists():
            options[name] = str(there.resolve())
    options["reward"] = [str(Path(r).resolve()) if Path(r).is_dir() else r for r in config.reward]
    if config.reward and config.reward_dir is None:
        options["reward_dir"] = str(Path.cwd())
    return options


def save(config: TrainConfig, path: Path) -> None:
    """Write all options as YAML that `parse` reads back, in any working directory."""
    files.write(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).encode())
