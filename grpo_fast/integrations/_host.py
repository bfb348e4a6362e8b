"""What the adapters share: a host's configuration, its version, its modules, numbers for its logs."""

import importlib.metadata
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.objective import Objective

REQUIRED: Any = object()


def read(config: Any, path: str, default: Any = REQUIRED) -> Any:
    """`config.a.b` for the path "a.b": of objects, mappings and OmegaConf nodes alike.

    Raises:
        AttributeError: nothing of that name and no default.
    """
    for name in path.split("."):
        # A dict has methods of its own; a configuration class may be a mapping as well as an object.
        value = REQUIRED if isinstance(config, dict) else getattr(config, name, REQUIRED)
        if value is REQUIRED and isinstance(config, Mapping):
            value = config.get(name, REQUIRED)
        if value is REQUIRED:
            if default is REQUIRED:
                raise AttributeError(
                    f"the configuration has no {path!r}: a {type(config).__name__} has no {name!r}"
                )
            return default
        config = value
    return config


class At(NamedTuple):
    """Where a host's configuration has an option: the first of these paths that is not None."""

    paths: tuple[str, ...]
    missing: Any = REQUIRED  # what stands in for a last path that does not exist
    none: Any = None  # and for one that is None


def at(*paths: str, missing: Any = REQUIRED, none: Any = None) -> At:
    return At(paths, missing, none)


def options(config: Any, table: Mapping[str, At]) -> dict[str, Any]:
    """What a configuration has for each option of `Objective`.

    Raises:
        AttributeError: a path that does not exist, nor anything that stands in for it.
    """
    found = {}
    for option, (paths, missing, none) in table.items():
        values = (read(config, path, None) for path in paths[:-1])
        value = next((x for x in values if x is not None), None)
        if value is None:
            value = read(config, paths[-1], missing)
        found[option] = none if value is None else value
    return found


def objective_of(preset: str, chosen: Mapping[str, Any], names: Mapping[str, At]) -> Objective:
    """`Objective.preset`, whose errors also say what the host calls the option.

    Args:
        names: where the host's configuration has each option, as for `options`.
    """
    try:
        return Objective.preset(preset, **chosen)
    except (TypeError, ValueError) as error:
        theirs = [
            f"{option} is {' or '.join(where.paths)}"
            for option, where in names.items()
            if re.search(rf"\b{option}\b", str(error))
        ]
        if not theirs:
            raise
        raise type(error)(f"{error} ({preset}: {', '.join(theirs)})") from error


def as_floats(metrics: dict[str, Tensor | float]) -> dict[str, float]:
    """The same as Python numbers, for hosts that want them: one host sync for all."""
    tensors = [torch.as_tensor(x, dtype=torch.float32) for x in metrics.values()]
    if not tensors:
        return {}
    device = max((x.device for x in tensors), key=lambda device: device.type != "cpu")
    values = torch.stack([x.detach().to(device) for x in tensors]).tolist()
    return dict(zip(metrics, values, strict=True))


def found_version(package: str) -> str | None:
    """The version of a package, installed or a checkout on the path; None where neither says it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path says it itself
        return getattr(sys.modules.get(package), "__version__", None)


def is_between(version: str, at_least: str, below: str | None = None) -> bool:
    """Whether a version is at least one and less than another, by their first three numbers."""

    def numbers(text: str) -> list[int]:
        found = [int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3]]
        return found + [0] * (3 - len(found))

    return numbers(at_least) <= numbers(version) and not (
        below and numbers(version) >= numbers(below)
    )


TRANSFORMERS = (
    "5.17"  # the oldest that the models are tested with; pyproject.toml asks pip for the same
)


def require(package: str, at_least: str, below: str | None = None) -> None:
    """Check that a host is installed in a version this adapter was written for.

    Raises:
        ImportError: it is not installed, older, or as new as `below`; with the command that installs it.
    """
    wanted = f"this needs {package} >= {at_least}" + (f", < {below}" if below else "")
    command = f"pip install '{package}>={at_least}" + (f",<{below}'" if below else "'")
    found = found_version(package)
    if found is None:
        raise ImportError(f"{wanted}, which is not installed: {command}")
    if not is_between(found, at_least, below):
        raise ImportError(f"{wanted}; {package} {found} is installed: {command}")


def replace(package: str, theirs: Any, ours: Any) -> None:
    """Put `ours` wherever a loaded module of the package has the name of `theirs` bound to it."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for key, value in list(vars(module).items()):
                if value is theirs:
                    setattr(module, key, ours)
