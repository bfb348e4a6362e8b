"""The page of a step: one HTML file that needs no network, whose sliders compute everything again."""

import base64
import dataclasses
import hashlib
import html
import io
import json
import re
from pathlib import Path
from string import Template
from typing import Any

from grpo_fast.trainer import files
from grpo_fast.trainer.explain import numbers, text
from grpo_fast.trainer.explain.record import StepRecord
from grpo_fast.trainer.explain.stages import Stage, stages

HERE = Path(__file__).parent
MOST = 80  # tokens of a completion in a picture; all of them count


def write(record: StepRecord, path: Path) -> None:
    """Write the page of a step.

    Raises:
        ValueError: the objective is not explained.
        OSError: the file cannot be written; the message names it.
    """
    files.write(path, page(record).encode())


def page(record: StepRecord) -> str:
    """Return the page of a step as HTML.

    Its policy lets nothing load, and no script or style run but its own, which it knows by their hashes.

    Raises:
        ValueError: the objective is not explained.
    """
    record = text.visible(record)
    found = stages(record)
    data = {
        "record": dataclasses.asdict(record),
        "expected": [x._asdict() for x in numbers.of_updates(record)],
        "names": [stage.name for stage in found],
        "most": MOST,
    }
    style, script = ((HERE / f"page.{kind}").read_text() for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src {hash_of(style)}; script-src {hash_of(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    plain = io.StringIO()
    text.show(record, text.console(plain, 100))
    return Template((HERE / "page.html").read_text()).substitute(
        policy=policy,
        run=html.escape(record.source.run),
        about=html.escape(text.about(record)),
        style=style,
        script=script,
        buttons="".join(button(k, stage) for k, stage in enumerate(found, 1)),
        sections="".join(section(k, stage) for k, stage in enumerate(found, 1)),
        plain=html.escape(plain.getvalue()),
        origin="".join(f"<li>{html.escape(line)}</li>" for line in text.origin(record)),
        data=script_safe(data),
    )


def button(number: int, stage: Stage) -> str:
    """Return the button of a stage."""
    return f'<li><button type="button">{number}. {html.escape(stage.title)}</button></li>'


def section(number: int, stage: Stage) -> str:
    """Return the explanation of a stage, with a place for its picture."""
    paragraphs = "".join(f"<p>{html.escape(x)}</p>" for x in stage.text)
    symbols = "".join(
        f"<dt>{scripts(html.escape(symbol))}</dt><dd>{html.escape(meaning)}</dd>"
        for symbol, meaning in stage.symbols
    )
    return (
        f'<section class="stage" aria-labelledby="title-{stage.name}">'
        f'<h2 id="title-{stage.name}" tabindex="-1">{number}. {html.escape(stage.title)}</h2>'
        f"{paragraphs}{stage.mathml}<dl>{symbols}</dl>"
        f'<p class="task"><strong>Try it.</strong> {html.escape(stage.task)} '
        '<a class="narrow" href="#controls">To the sliders</a></p>'
        f'<div id="figure-{stage.name}"></div></section>\n'
    )


def scripts(symbol: str) -> str:
    """Return a symbol with its index and its exponent set as such."""
    symbol = re.sub(r"_(\w+)", r"<sub>\1</sub>", symbol)
    return re.sub(r"\^(\w+)", r"<sup>\1</sup>", symbol)


def hash_of(code: str) -> str:
    """Return the hash of a script or style, as a content security policy names it."""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def script_safe(data: Any) -> str:
    """Return JSON that is safe between script tags, whatever texts are in it."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
