"""What the adapters share: reading a host's configuration, its version, taking its place."""

import importlib.metadata
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
                raise AttributeError(f"the configuration has no {path!r}: {config!r}")
            return default
        config = value
    return config


Choices = tuple[Any, ...]


def given(config: Any, *choices: Any) -> Any:
    """The first of these paths that is set; what is not a path, at the end, is the default.

    Raises:
        AttributeError: none of the paths exists and there is no default.
    """
    *paths, last = choices
    for path in paths:
        value = read(config, path, None)
        if value is not None:
            return value
    return read(config, last) if isinstance(last, str) else last


def options(config: Any, table: Mapping[str, Choices]) -> dict[str, Any]:
    """What a configuration has for each option of `Objective`: the table says where, as `given` reads it."""
    return {option: given(config, *choices) for option, choices in table.items()}


def as_floats(metrics: dict[str, Tensor | float]) -> dict[str, float]:
    """The same as Python numbers, for hosts that want them: one host sync for all."""
    tensors = [torch.as_tensor(x, dtype=torch.float32) for x in metrics.values()]
    if not tensors:
        return {}
    device = max((x.device for x in tensors), key=lambda device: device.type != "cpu")
    values = torch.stack([x.detach().to(device) for x in tensors]).tolist()
    return dict(zip(metrics, values, strict=True))


def require(package: str, at_least: str, below: str | None = None) -> None:
    """Check that a host is installed in a version this adapter was written for.

    Raises:
        ImportError: it is not installed, older, or as new as `below`.
    """
    wanted = f"this needs {package} >= {at_least}" + (f", < {below}" if below else "")
    found: str | None
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path says it itself
        found = getattr(sys.modules.get(package), "__version__", None)
    if found is None:
        raise ImportError(f"{wanted}, which is not installed")

    def numbers(version: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", version)[:3]]

    if numbers(found) < numbers(at_least) or (below and numbers(found) >= numbers(below)):
        raise ImportError(f"{wanted}; {package} {found} is installed")


def replace(package: str, theirs: Any, ours: Any) -> None:
    """Put `ours` wherever a loaded module of the package has the name of `theirs` bound to it."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for key, value in list(vars(module).items()):
                if value is theirs:
                    setattr(module, key, ours)
