"""A headless browser that opens a page of this machine, for tests of HTML files."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome")
OWN = "not an origin"


class Opened(NamedTuple):
    """A page after its scripts have run.

    Attributes:
        dom: its elements as HTML.
        console: the lines that it wrote to the console, errors and blocked requests among them.
        requests: the addresses that the page asked the network for.
    """

    dom: str
    console: list[str]
    requests: list[str]


def find() -> str | None:
    """Return the path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def show(browser: str, page: Path, folder: Path, *options: str) -> Opened:
    """Open a file in a browser without a network, and wait until its scripts are done.

    Args:
        folder: an empty folder, for the browser's own files.
        options: more arguments of the browser.
    """
    log = folder / "requests.json"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
        "--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000", "--dump-dom",
        *options, page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own requests, for its services, come from no page: "not an origin".
    made = [x for x in events if x.get("initiator", OWN) != OWN and "url" in x]
    requests = {x["url"] for x in made if x["url"].startswith(("http", "ws"))}
    return Opened(done.stdout, console, sorted(requests))
