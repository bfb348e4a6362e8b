"""What the adapters share: a host's configuration, its version, its modules, numbers for its logs."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

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
