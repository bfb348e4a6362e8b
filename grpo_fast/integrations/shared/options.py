"""Options of `Objective` read from a host's configuration, by a table of their names there."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from grpo_fast.objective import Objective

REQUIRED: Any = object()


def read(config: Any, path: str, default: Any = REQUIRED) -> Any:
    """Return `config.a.b` for the path "a.b"; config may be an object, a mapping or an OmegaConf node.

    Raises:
        AttributeError: there is nothing of that name, and no default.
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


class Entry(NamedTuple):
    """The place of an option in a host's configuration: the first of `paths` that is not None."""

    paths: tuple[str, ...]
    missing: Any = REQUIRED  # the value where the last path does not exist
    none: Any = None  # the value where it is None


def entry(*paths: str, missing: Any = REQUIRED, none: Any = None) -> Entry:
    """Return an `Entry`; see there for `missing` and `none`."""
    return Entry(paths, missing, none)


def read_options(config: Any, table: Mapping[str, Entry]) -> dict[str, Any]:
    """Read the options of a table: {option of `Objective`: its value in the configuration}.

    Raises:
        AttributeError: a path does not exist, and its entry has no value for that.
    """
    found = {}
    for option, (paths, missing, none) in table.items():
        values = (read(config, path, None) for path in paths[:-1])
        value = next((x for x in values if x is not None), None)
        if value is None:
            value = read(config, paths[-1], missing)
        found[option] = none if value is None else value
    return found


def objective_of(preset: str, chosen: Mapping[str, Any], names: Mapping[str, Entry]) -> Objective:
    """Return `Objective.preset(preset, **chosen)`; its errors also have the host's name of the option.

    Args:
        names: where the host's configuration has each option, as for `read_options`.
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
