"""The page of a run: it draws in a browser without a network, and no text of a run can run in it."""

import html.parser
import json
import os
import random
import re

import pytest

pytest.importorskip("plotly", reason="the trainer needs grpo-fast[train]")
pytest.importorskip("yaml", reason="the trainer needs grpo-fast[train]")

from grpo_fast.trainer import report
from tests.support import browser

HOSTILE = (
    "</pre></details></script><script>document.title = 'taken'</script>"
    "<img src=http://taken.invalid/a.png onerror=\"document.title = 'taken'\">"
    "<style>@import 'http://taken.invalid/a.css'</style><b id=taken>"
)
VOID = {"meta", "img", "br", "link"}


def healthy(steps: int = 40, **changes) -> list[dict]:
    """Metrics of a run in which all is well, but for the changes: a value, or a function of the step."""
    noise = random.Random(0)
    rows = []
    for i in range(steps):
        row = {
            "step": i,
            "reward": 0.2 + i / 100 + noise.gauss(0, 0.01),
            "reward/correct": 0.2 + i / 100,
            "without_reward": 0.0,
            "groups_without_signal": 0.2,
            "reward_failures": 0,
            "completion_length": 50 + i / 10,
            "completion_length_max": 90,
            "truncated": 0.01,
            "kl": i / 1000,
            "entropy": 1 - i / 200,
            "clip_fraction": 0.01,
            "clip_fraction_low": 0.004,
            "clip_fraction_high": 0.006,
            "grad_norm": 1 + noise.random(),
            "learning_rate": 1e-6,
            "loss": noise.gauss(0, 0.001),
            "tokens_per_second": 5000.0,
            "step_seconds": 2.0,
            "sampling_seconds": 1.2,
            "update_seconds": 0.7,
            "memory_gib": 3.5,
            "seconds": 2.0 * i,
            "mismatch_kl": None,
        }
        rows.append(row | {k: v(i) if callable(v) else v for k, v in changes.items()})
    return rows


def completion(text: str = "so [4]", **changes) -> dict:
    row = {
        "step": 0, "prompt": "2+2=", "completion": text, "reward": 1.0, "advantage": 0.5,
        "rewards": {"correct": 1.0, "format": None}, "tokens": 6, "ended": True, "answer": "4",
    }  # fmt: skip
    return row | changes


def make(run_dir, rows, completions=None, end=""):
    """Write the files of a run; `end` is what a process was just about to write."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("steps: 100\nmax_grad_norm: 1.0\nmodel: null\n")
    for name, found in (("metrics", rows), ("completions", completions)):
        if found is not None:
            text = "".join(json.dumps(row) + "\n" for row in found) + end
            (run_dir / f"{name}.jsonl").write_text(text)
    return run_dir


class Page(html.parser.HTMLParser):
    """The elements of a page, its text outside scripts, and what it does wrong."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.wrong, self.words = [], [], [], []
        self.source = path.read_text()
        self.feed(self.source)
        self.text = "".join(self.words)
        assert not self.wrong

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open[-1] in ("tr", "td", "th") and self.open[-1] != tag:
            self.open.pop()  # may stay open
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def charts(self):
        data = re.search(r'id="charts">(.*?)</script>', self.source, re.S)[1]
        return json.loads(data)


def page(run_dir):
    return Page(report.write(run_dir))


def test_parts(tmp_path):
    found = page(make(tmp_path / "first-run", healthy(), [completion()]))
    for text in ("first-run", "40of 100 steps", "Nothing unusual was found.", "so [4]", "2+2="):
        assert text in found.text.replace(" of", "of")
    assert "max_grad_norm1.0" in found.text
    assert len(found.charts()) == len(report.CHARTS) == found.source.count('class="plot"')
    assert sorted(p.name for p in (tmp_path / "first-run").iterdir()) == [
        "completions.jsonl", "config.yaml", "metrics.jsonl", "report.html",
    ]  # fmt: skip


def test_curves_are_the_metrics_and_their_means(tmp_path):
    rows = healthy(15, kl=lambda i: None if i == 3 else float(i))
    chart = next(
        x for x in page(make(tmp_path, rows)).charts() if x["data"][0]["legendgroup"] == "kl"
    )
    raw, mean = chart["data"][:2]
    assert raw["x"] == mean["x"] == list(range(15))
    assert raw["y"] == [row["kl"] for row in rows]
    assert mean["y"][:5] == [0, 0.5, 1, 1, 1.75]
    assert mean["y"][-1] == 9.5  # of steps 5 to 14


def test_plotly_knows_every_option(tmp_path):
    from plotly.graph_objects import Figure

    for chart in page(make(tmp_path, healthy())).charts():
        Figure(chart)  # raises ValueError


def test_long_curves_are_thinned_and_keep_their_peaks(tmp_path):
    rows = healthy(5_000, grad_norm=lambda i: 77.0 if i == 2_345 else 1.0)
    found = page(make(tmp_path, rows))
    curves = [curve for chart in found.charts() for curve in chart["data"]]
    assert max(len(curve["y"]) for curve in curves) <= report.POINTS + 1
    assert any(77.0 in curve["y"] for curve in curves)
    assert all(curve["x"][-1] == 4_999 for curve in curves)


def test_hostile_text_stays_text(tmp_path):
    run = tmp_path / "<script>run"
    rows = healthy(**{f"reward/{HOSTILE}": 1.0})
    prompt = [{"role": HOSTILE, "content": [HOSTILE]}, HOSTILE]
    texts = [completion(HOSTILE, prompt=prompt, answer=HOSTILE, rewards={HOSTILE: 1, "x": HOSTILE})]
    make(run, rows, texts)
    (run / "config.yaml").write_text(json.dumps({"steps": HOSTILE, HOSTILE: [HOSTILE]}))
    found = page(run)
    assert HOSTILE in found.text
    # plotly would read tags in the name of a curve
    names = {curve["name"] for curve in found.charts()[0]["data"]}
    assert names == {"total", "correct", html.escape(HOSTILE[:40])}
    tags = [tag for tag, _ in found.elements]
    assert (tags.count("script"), tags.count("style"), tags.count("img")) == (3, 2, 0)
    assert not any("id" in x and x["id"] == "taken" for _, x in found.elements)
    scripts = [x for tag, x in found.elements if tag == "script"]
    (policy,) = [x["content"] for _, x in found.elements if "http-equiv" in x]
    assert policy.startswith("default-src 'none';")
    assert scripts[0] == {"type": "application/json", "id": "charts"}  # data, which never runs
    assert f"'nonce-{scripts[1]['nonce']}'" in policy


def test_strange_characters(tmp_path):
    text = "é漢😀 \ud800 \x00\x1b[31m \u202eabc"
    found = page(make(tmp_path, healthy(), [completion(text)]))
    assert "é漢😀 ? \u2400\u241b[31m [U+202E]abc" in found.text


def test_long_texts_lose_their_middle(tmp_path):
    text = "begin" + "x" * 1_000_000 + "<end>"
    found = page(make(tmp_path, healthy(), [completion(text)]))
    assert "begin" in found.text
    assert "<end>" in found.text
    assert "[998,010 characters are left out here]" in found.text


def test_many_completions_are_spread_over_the_run(tmp_path):
    many = [
        completion(f"<{s}/{p}/{c}>", step=s, prompt=f"p{p}", reward=c / 20)
        for s in range(100) for p in range(6) for c in range(20)
    ]  # fmt: skip
    found = page(make(tmp_path, healthy(), many))
    shown = re.findall(r"<(\d+)/(\d+)/(\d+)>", found.text)
    steps = list(dict.fromkeys(int(s) for s, _, _ in shown))
    assert len(steps) == report.STEPS
    assert steps[0] == 99
    assert steps[-1] == 0
    assert len(shown) == report.STEPS * report.PROMPTS * report.COMPLETIONS
    first = [int(c) for s, p, c in shown if (s, p) == ("99", "0")]
    assert first[0] == 19  # the best first
    assert first == sorted(first, reverse=True)
    assert "4 of 6 prompts" in found.text
    assert "8 of 20 completions" in found.text


def test_a_run_that_is_still_written(tmp_path):
    found = page(make(tmp_path, healthy(), [completion()], end='{"step": 40, "comp\udce9'[:-1]))
    assert "so [4]" in found.text
    assert "40 of 100 steps" in found.text
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "reward": 1}\n{"step": 1, "x": "\xe9')
    assert "1 of 100 steps" in page(tmp_path).text


def test_what_is_absent_or_null_is_left_out(tmp_path):
    make(tmp_path, [{"step": 0, "reward": None, "kl": 0.5, "entropy": None}])
    (tmp_path / "config.yaml").unlink()
    found = page(tmp_path)
    assert [x["data"][0]["legendgroup"] for x in found.charts()] == ["kl"]
    assert "no completions.jsonl" in found.text
    assert "No config.yaml was found." in found.text
    bare = {"step": 0, "completion": None, "reward": None}
    assert "reward none" in page(make(tmp_path, healthy(), [bare])).text


def test_a_resumed_run_repeats_steps(tmp_path):
    again = [row | {"reward": 9.0} for row in healthy(12)[8:]]
    texts = [completion("old"), completion("next", step=5), completion("new")]
    found = page(make(tmp_path, healthy(10) + again, texts))
    reward = found.charts()[0]["data"][0]
    assert reward["x"] == list(range(12))
    assert reward["y"][8:] == [9.0] * 4
    assert "new" in found.text
    assert "old" not in found.text


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"groups_without_signal": 0.72}, "In 72% of the groups of the last 10 steps"),
        ({"without_reward": 0.1}, "10% of the completions had no reward"),
        ({"truncated": lambda i: 0.4 * (i > 29)}, "40% of the completions hit the length limit"),
        ({"clip_fraction": 0.3}, "30% of the tokens were clipped"),
        ({"kl": lambda i: i / 10}, "reference is 3.5 nats"),
        ({"mismatch_kl": 0.2}, "model that is trained is 0.2 nats"),
        ({"entropy": lambda i: 0.8**i}, "The entropy went from 0.45 to"),
        ({"entropy": lambda i: 1.0 * (1 + i)}, "The entropy went from"),
        ({"completion_length": lambda i: 10 * (1 + i)}, "completion length went from 55 to 355"),
        ({"reward_failures": lambda i: 3 * (i % 10 == 0)}, "The reward functions failed 12 times."),
        ({"reward_failures": lambda i: int(i == 1)}, "The reward functions failed 1 time."),
        (
            {"grad_norm": lambda i: 60.0 if i in (20, 30) else 1.0},
            "in 2 steps; the last was step 30",
        ),
        ({"reward": lambda i: min(i, 60 - 2 * i) / 40 + i % 3 / 50}, "The reward fell from"),
    ],
)
def test_what_stands_out(tmp_path, changes, text):
    found = page(make(tmp_path, healthy(**changes)))
    assert text in found.text
    assert found.source.count('class="card warn"') == 1
    assert "Nothing unusual" not in found.text


def test_a_reward_that_never_rose(tmp_path):
    found = page(make(tmp_path, healthy(60, reward=lambda i: 0.3 + (i % 3 - 1) / 50)))
    assert "The reward has not risen: 0.298 in the first 10 steps, 0.302 in the last." in found.text


def test_harmless_peaks_are_no_news(tmp_path):
    """Below max_grad_norm a gradient is not even scaled."""
    found = page(make(tmp_path, healthy(grad_norm=lambda i: 0.9 if i == 30 else 0.01)))
    assert "Nothing unusual was found." in found.text


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"not a run, it has no metrics\.jsonl"):
        report.write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0')
    with pytest.raises(ValueError, match="no step is finished yet"):
        report.write(tmp_path)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_another_place(tmp_path):
    run = make(tmp_path / "run", healthy())
    assert report.write(run, tmp_path / "page.html") == tmp_path / "page.html"
    assert not (run / "report.html").exists()
    with pytest.raises(OSError, match="nowhere"):
        report.write(run, tmp_path / "nowhere" / "page.html")


def test_nothing_is_loaded(tmp_path):
    found = page(make(tmp_path, healthy(), [completion()]))
    for _, attributes in found.elements:
        assert not {"src", "href", "srcset", "onload", "onerror"} & set(attributes)
    assert "url(" not in report.STYLE
    assert "@import" not in report.STYLE


@pytest.fixture
def chromium() -> str:
    path = browser.find()
    if path is None:
        pytest.skip(f"none of {', '.join(browser.NAMES)} is on PATH")
    return path


def test_in_a_browser(tmp_path, chromium):
    texts = [completion(HOSTILE), completion("so [4]", prompt=HOSTILE)]
    run = make(tmp_path / "run", healthy(**{f"reward/{HOSTILE}": 1.0}), texts)
    found = browser.show(chromium, report.write(run), tmp_path)
    assert found.console == []
    assert found.requests == []
    assert "<title>run: training report</title>" in found.dom
    assert 'id="taken"' not in found.dom
    assert "so [4]" in found.dom
    plots = re.split(r'(?=<div class="plot js-plotly-plot")', found.dom)[1:]
    charts = page(run).charts()
    assert len(plots) == len(charts) == len(report.CHARTS)
    for plot, chart in zip(plots, charts, strict=True):
        drawn = re.findall(r'<path class="js-line"[^>]* d="M[^"]{8,}"', plot)
        assert plot.count('<g class="trace scatter') == len(drawn) == len(chart["data"])


def test_the_browser_would_tell(tmp_path, chromium):
    """Errors and requests of a page are seen."""
    path = tmp_path / "page.html"
    path.write_text("<img src='http://taken.invalid/a.png'><script>missing()</script>")
    found = browser.show(chromium, path, tmp_path)
    assert found.requests == ["http://taken.invalid/a.png"]
    assert any("missing is not defined" in line for line in found.console)
