"""A headless browser that opens a page of this machine, for tests of HTML files.

`show` opens a page and returns what its scripts made of it. `Tab` drives a page with real clicks and keys, by
Chromium's debugging protocol over a pipe.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome")
OWN = "not an origin"
# Options of a browser that shows nothing, asks nobody, and reaches no network.
ALONE = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
PATIENCE = 30.0  # seconds to wait for an answer of the browser
# The code and the text of the keys that are pressed, as the protocol wants them.
KEYS = {
    "Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "End": (35, ""), "Home": (36, ""),
    "ArrowLeft": (37, ""), "ArrowUp": (38, ""), "ArrowRight": (39, ""), "ArrowDown": (40, ""),
}  # fmt: skip


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
        browser, *ALONE, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
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


class Tab:
    """A page in a browser, to click on and to type into. Use it in a `with` statement.

    Attributes:
        first: the page that it began with.
        trouble: exceptions of the page's scripts, its errors and warnings, and the requests that it made for
            anything but itself.
    """

    def __init__(self, browser: str, page: Path, folder: Path, width: int = 1280) -> None:
        """Open a page.

        Args:
            folder: an empty folder, for the browser's own files.
            width: of the window, in CSS pixels.
        """
        self.trouble: list[str] = []
        self.session: str | None = None
        self._numbers, self._rest = itertools.count(1), b""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def connect() -> None:
            """Give the browser descriptor 3 to read from and 4 to write to."""
            high = [fcntl.fcntl(x, fcntl.F_DUPFD, 10) for x in (theirs_in, theirs_out)]
            for number, x in zip((3, 4), high, strict=True):
                os.dup2(x, number)

        command = [*ALONE, "--remote-debugging-pipe", f"--user-data-dir={folder / 'driven'}"]
        self.process = subprocess.Popen(
            [browser, *command, "about:blank"],
            pass_fds=(3, 4),
            preexec_fn=connect,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.address = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")
        self.resize(width)
        self.first = page
        self.open(page)

    def open(self, page: Path) -> None:
        """Load a page in the place of the present one."""
        self.address = page.resolve().as_uri()
        self.call("Page.navigate", url=self.address)
        here = json.dumps(self.address)
        self.wait(f"document.readyState === 'complete' && location.href === {here}")

    def __enter__(self) -> "Tab":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol, and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._see(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _see(self, event: dict[str, Any]) -> None:
        kind, found = event.get("method", ""), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.trouble.append(str(found["exceptionDetails"]))
        elif kind == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.trouble.append(found["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.trouble.append(str(found["args"]))
        elif kind == "Network.requestWillBeSent" and found["request"]["url"] != self.address:
            self.trouble.append(found["request"]["url"])

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click on the middle of an element, which nothing may cover."""
        found = self.evaluate(f"""(() => {{
            const x = document.querySelector({json.dumps(selector)});
            x.scrollIntoView({{ block: "center", behavior: "instant" }});
            const r = x.getBoundingClientRect();
            const [left, top] = [r.left + r.width / 2, r.top + r.height / 2];
            return [left, top, x.contains(document.elementFromPoint(left, top))];
        }})()""")
        x, y, free = found
        assert free, f"{selector} is covered"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys: str) -> None:
        """Press keys one after the other, on the element that has the focus."""
        for key in keys:
            code, text = KEYS[key]
            common = {"key": key, "code": key.replace(" ", "Space"), "windowsVirtualKeyCode": code}
            down = {"type": "keyDown" if text else "rawKeyDown", "text": text}
            self.call("Input.dispatchKeyEvent", **common, **down)
            self.call("Input.dispatchKeyEvent", **common, type="keyUp")

    def resize(self, width: int, height: int = 900) -> None:
        """Set the size of the window, in CSS pixels; a narrow one is that of a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip

    def prefer(self, **features: str) -> None:
        """Set preferences of the reader, such as `prefers_color_scheme="dark"`."""
        pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.call("Emulation.setEmulatedMedia", features=pairs)

    def picture(self, path: Path) -> None:
        """Write a picture of the whole page, as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
