"""The file of results of one part."""

import importlib.metadata
from pathlib import Path
from typing import Any

from benchmarks.measuring import recorder

PACKAGES = ("transformers", "trl", "liger-kernel")


class Sheet(recorder.Sheet):
    """The rows of a part, who is absent and why, and the versions of the libraries."""

    def __init__(self, out: Path | None, kind: str, **document: Any) -> None:
        super().__init__(out, kind, versions=_versions(), **document)
        self.absent: dict[str, str] = self.document["machine_info"]["absent"]

    def skip(self, who: str, why: str) -> None:
        """Note why somebody has no numbers."""
        self.absent[who] = why
        print(f"{who}: {why}", flush=True)
        self.write()


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    installed = {
        d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    return {name: installed[name] for name in PACKAGES if name in installed}
