"""The comparison of the adapters with the code of their hosts, as a table.

`python -m tests.support.host_matrix` runs the cases of `tests.support.host_cases` with the sources that
`tests.support.host_sources` finds, and prints a row for each release. `--save` writes the table into
docs/integrations.md. It needs sources of every host, and all cases right.
"""

import argparse
import datetime
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import machine
from grpo_fast.integrations.shared.packages import VERSIONS
from tests.support import host_cases, host_sources

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
BEGIN = "<!-- hosts: python -m tests.support.host_matrix --save -->"
END = "<!-- end of hosts -->"

NAMES = {
    "verl": "verl",
    "skyrl": "SkyRL",
    "openrlhf": "OpenRLHF",
    "areal": "AReaL",
    "prime_rl": "prime-rl",
    "slime": "slime",
    "miles": "miles",
    "nemo_rl": "NeMo-RL",
    "xtuner": "xtuner",
}
WHAT = {
    "verl": "eleven losses, five averages; `register()`, `patch_logprobs()`",
    "skyrl": "ten losses, masks of fractions, six off-policy corrections; `register()`",
    "openrlhf": "PPO and GSPO, six corrections, averages of one rank and of several; `patch()`",
    "areal": "PPO and SAPO per token and per sequence, rejection sampling, packed; `patch()`",
    "prime_rl": "`default` and `ipo`, weights of tokens",
    "slime": "the options of the loss, TIS, masks of fractions; not its log-probs",
    "miles": "the options of the loss, TIS, masks of fractions; not its log-probs",
    "nemo_rl": "the options of the loss, weighed samples, masks of fractions; `patch()`",
    "xtuner": "`vanilla`, each kind of clamp; the loss type found by its path",
}
HOW = {"wheel": "wheel, in each run of the tests", "sources": "sources"}


def row(source: host_sources.Source, happened: dict[str, str]) -> str:
    """A line of the table.

    Args:
        happened: what `host_cases.run_all` returned.
    """
    right = sum(not what for what in happened.values())
    cases = f"{right}" if right == len(happened) else f"{right} of {len(happened)}"
    cells = (NAMES[source.host], source.release, HOW[source.how], cases, WHAT[source.host])
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[str]) -> str:
    """The generated part of the page."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    head = (
        f"Run on {today} at commit {machine.commit()}, with PyTorch on a CPU. All cases that a release can\n"
        "run agree.\n\n"
        "| trainer | release or commit | its code | cases | what they compare |\n|---|---|---|--:|---|"
    )
    versions = " and ".join((VERSIONS["trl"][0], importlib.metadata.version("trl")))
    runs = f"| TRL | {versions} | {HOW['wheel']} | | complete training runs: [trl.md](trl.md) |"
    return "\n".join([BEGIN, "", head, runs, *rows, "", END])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    os.environ["GRPO_FAST_BACKEND"] = "torch"
    rows, wrong = [], 0
    for host in NAMES:
        found = host_sources.sources(host)
        if not found and options.save:
            parser.error(
                f"no sources of {host}: {host_sources.FOLDERS} names a folder of checkouts"
            )
        for source in found:
            happened = host_cases.run_all(source)
            rows.append(row(source, happened))
            print(rows[-1])
            for name, what in happened.items():
                if what:
                    print(f"    {name}: {what}")
            wrong += any(map(host_cases.is_wrong, happened.values()))
    if options.save and not wrong:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + table(rows) + rest.split(END)[1])
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
