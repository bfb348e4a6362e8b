"""A host's package: its installed version, and the modules that have imported its functions."""

import importlib.metadata
import re
import sys
from typing import Any


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
    """Replace `theirs` by `ours` in every loaded module of the package that has a name for it."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for key, value in list(vars(module).items()):
                if value is theirs:
                    setattr(module, key, ours)


def found_version(package: str) -> str | None:
    """Return the version of a package, installed or a checkout on the path; None if it is unknown."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path says it itself
        return getattr(sys.modules.get(package), "__version__", None)


def is_between(version: str, at_least: str, below: str | None = None) -> bool:
    """Tell whether at_least <= version < below, by their first three numbers."""

    def numbers(text: str) -> list[int]:
        found = [int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3]]
        return found + [0] * (3 - len(found))

    return numbers(at_least) <= numbers(version) and not (
        below and numbers(version) >= numbers(below)
    )


# The oldest version that the models are tested with; pyproject.toml asks pip for the same.
TRANSFORMERS = "5.17"

# From, and below. TRL's trainer overrides private methods: another minor version is another trainer.
VERSIONS: dict[str, tuple[str, str | None]] = {
    "transformers": (TRANSFORMERS, None),
    "trl": ("1.15", "1.17"),
    "verl": ("0.9.1", "0.10"),
    "openrlhf": ("0.11.2", "0.12"),
    "nemo_rl": ("0.7", "0.8"),
    "accelerate": ("1.0", None),
}
