"""Files and folders that are written completely or not at all.

A file or folder that is unfinished, replaced or being deleted has a hidden name: `.<name>.partial`,
`.<name>.old`, `.<name>.deleted`.
"""

import contextlib
import errno
import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT}


def hidden(path: Path, state: str) -> Path:
    """Return the hidden name of `path` in the state "partial", "old" or "deleted"."""
    return path.with_name(f".{path.name.lstrip('.')}.{state}")


def write(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; it replaces an existing one.

    Raises:
        OSError: the message names `path`; an existing file is unchanged.
    """
    partial = hidden(path, "partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise named(error, path) from error


def read_yaml(text: str | bytes) -> Any:
    """Return what a text in YAML says, as plain values, lists and mappings.

    Raises:
        yaml.YAMLError: it is not YAML, or has tags or aliases; the message has the line.
    """
    import yaml  # not at the top: commands that read no YAML run without it

    class Plain(yaml.SafeLoader):
        """A reader of YAML without objects of Python and without aliases, which can fill the memory."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                where = event.start_mark
                raise yaml.composer.ComposerError(None, None, "aliases are not read", where)
            return super().compose_node(parent, index)

    return yaml.load(text, Plain)  # noqa: S506  # a SafeLoader


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name; it replaces an existing one.

    At every moment `final` or its hidden "old" name is a complete folder.
    """
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    old = hidden(final, "old")
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    _sync(final.parent)
    if old.exists():
        remove(old)


def remove(path: Path) -> None:
    """Delete a file or folder; it loses its name before any of its content is deleted."""
    deleted = hidden(path, "deleted")
    _delete(deleted)
    os.replace(path, deleted)
    _delete(deleted)


def tidy(folder: Path) -> None:
    """Undo or finish the work of a process that died, so that no hidden name is left in a folder."""
    for path in sorted(folder.glob(".*")):
        name, _, state = path.name[1:].rpartition(".")
        if state == "old" and not (folder / name).exists():
            os.replace(path, folder / name)
        elif state == "old":
            remove(path)
        elif state in ("partial", "deleted"):
            _delete(path)


def free_name(folder: Path, stem: str) -> str:
    """Return the first of stem, stem-2, stem-3, ... that is not in `folder`."""
    names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(folder / name))


def named(error: Exception, path: Path) -> OSError:
    """Return an error that says what could not be written, and why.

    Args:
        error: an OSError, or the error that safetensors or tokenizers raise in its place.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found[1])
    if code is None:
        return OSError(f"{path}: cannot be written: {error}")
    return OSError(code, os.strerror(code), str(path))


def reason(error: OSError) -> str:
    """Say in one line what could not be read or written, and why."""
    what = error.filename or error.filename2
    return f"{what}: {error.strerror}" if what and error.strerror else str(error)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder (Windows cannot do the latter)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
