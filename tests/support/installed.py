"""Say what a Python lacks for `make train` or `make test`: `python tests/support/installed.py train|test`.

`make VENV=system` runs it first. It reads the requirements from pyproject.toml and needs no package.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = (3, 11)


def requirements(project, extra, requirement):
    """The requirements of the project with an extra that apply to this Python.

    Args:
        project: the table of that name in pyproject.toml.
        requirement: the class that parses one.
    """
    extras, found = [extra], {}
    for text in project["dependencies"]:
        found[requirement(text).name] = requirement(text)
    for name in extras:  # grows while it is read: an extra may name others
        for one in map(requirement, project["optional-dependencies"][name]):
            if one.name == project["name"]:
                extras += sorted(one.extras)
            else:
                found[one.name] = one
    return [one for one in found.values() if one.marker is None or one.marker.evaluate()]


def lacking(wanted):
    """(what is not installed, what is installed in another version), as texts."""
    missing, other = [], []
    for one in wanted:
        try:
            found = version(one.name)
        except PackageNotFoundError:
            missing.append(f"{one.name}{one.specifier}")
            continue
        if not one.specifier.contains(found, prereleases=True):
            other.append(f"{one.name}{one.specifier} is wanted, {found} is installed")
    return missing, other


def main(extra):
    """Returns the exit status: 1 where a package is missing."""
    if sys.version_info < PYTHON:
        print(f"make needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}")
        return 1
    import tomllib

    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    missing, other = lacking(requirements(project, extra, Requirement))
    for text in other:
        print(f"warning: {text}")
    if not missing:
        return 0
    print(f"VENV=system: {sys.executable} lacks what `make {extra}` needs: {', '.join(missing)}")
    print(f"Install it: {sys.executable} -m pip install {' '.join(map(repr, missing))}")
    print(f"Or run `make {extra}` without VENV=system: it sets up an environment in .venv.")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
