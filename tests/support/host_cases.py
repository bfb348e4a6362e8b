"""Cases in which an adapter is compared with the loss function of its host's own sources.

Each host has a table `CASES[host]` of functions of its imported modules (`tests.support.host_sources`). The
batches are ragged, with an empty row, NaN in the padding for the adapter, and ratios beyond every bound. The
host's function in float64 is the truth for loss and gradient, and in float32 the error that is allowed.
"""

from typing import Any

import pytest
import torch

from tests.support import host_checkouts, host_wheels  # noqa: F401, they fill the table
from tests.support.host_sources import Source, imported
from tests.support.host_table import CASES, Case

ABSENT = "not in this release: "


def is_wrong(what: str) -> bool:
    """Tell whether a result of `run_all` is an error."""
    return bool(what) and not what.startswith(ABSENT)


def outcome(function: Case, modules: dict[str, Any]) -> str:
    """Run a case: "", "not in this release: ...", or the error."""
    try:
        function(modules)
    except pytest.skip.Exception as error:
        return f"{ABSENT}{error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_all(source: Source) -> dict[str, str]:
    """Run the cases of a host with the sources of one release: of each case its `outcome`."""
    # miles compiles parts of its loss, which takes minutes and changes nothing.
    with imported(source) as modules, torch.compiler.set_stance("force_eager"):
        return {name: outcome(run, modules) for name, run in CASES[source.host].items()}
