"""The page `report.html` of a run: what stands out, curves, samples and options.

The page needs no network: plotly's code is in it. Its policy lets no other script run and nothing
load, whatever a completion holds.
"""

import datetime
import html
import json
import math
import secrets
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from plotly.offline import get_plotlyjs

from grpo_fast.trainer import files
from grpo_fast.trainer.smoothing import WINDOW, known, moving_means

Item = TypeVar("Item")
Columns = dict[str, list[float | None]]
POINTS = 1000  # about the most points of a curve
STEPS, PROMPTS, COMPLETIONS, CHARACTERS = 30, 4, 8, 2000  # the most that is shown of the samples
COLOURS = ("#3b82d6", "#e0781e", "#2fa36b", "#cf4a7d", "#8d6bd6", "#8a8a8a", "#b8960c", "#18a0a8")
# Control characters, which browsers hide or which turn the direction of a text, become visible.
TURNS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
VISIBLE: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **{code: f"[U+{code:04X}]" for code in TURNS},
}


class Chart(NamedTuple):
    """One chart: its metrics with their names in the legend, and plotly's options of the y axis."""

    title: str
    names: dict[str, str]
    axis: dict[str, Any]
    caption: str


SHARE = {"tickformat": ".0%", "range": [-0.02, 1.02]}
ZERO = {"rangemode": "tozero"}
CHARTS = (
    Chart("Reward", {"reward": "total"}, {},
          "Mean reward of the completions, in total and of each function. Healthy: it rises, then stays. "
          "If one function rises while another falls, the model may exploit the first."),
    Chart("Groups without signal",
          {"groups_without_signal": "all rewards equal", "without_reward": "no reward"}, SHARE,
          "Share of groups whose completions all earned the same reward, and of completions without "
          "any reward. Nothing is learned from either. Healthy: below one half."),
    Chart("Completion length", {"completion_length": "mean", "completion_length_max": "longest"}, ZERO,
          "Tokens per completion. Healthy: it changes slowly. If it grows and the reward does not, "
          "read the samples."),
    Chart("Truncated completions", {"truncated": "truncated"}, SHARE,
          "Share of completions that reached the length limit. Healthy: near 0."),
    Chart("KL", {"kl": "to the reference", "mismatch_kl": "server to trainer"}, ZERO,
          "Distance to the policy before training and, with a server, between the policy that samples and "
          "the one that is trained, in nats per token. Healthy: slow growth; the second near 0."),
    Chart("Entropy", {"entropy": "entropy"}, ZERO,
          "How undecided the policy is, in nats per token. Healthy: it falls slowly. Near 0 all completions "
          "are alike; a sudden rise often means broken text."),
    Chart("Clipped tokens",
          {"clip_fraction": "total", "clip_fraction_low": "below the range",
           "clip_fraction_high": "above the range", "clip_fraction_dual": "dual clip"},
          {**ZERO, "tickformat": ".1%"},
          "Share of tokens whose ratio left the clip range. Healthy: a few percent; about 0 with one update "
          "per batch."),
    Chart("Gradient norm", {"grad_norm": "norm"}, {"type": "log", "minallowed": -9},
          "Before the gradient is clipped, on a log scale. Healthy: steady. A single peak is harmless if "
          "the reward recovers; growth is not."),
    Chart("Learning rate", {"learning_rate": "learning rate"}, {**ZERO, "exponentformat": "e"},
          "As the schedule sets it."),
    Chart("Loss", {"loss": "loss"}, {},
          "In GRPO the loss stays around 0 and says little: look at the reward. Only jumps are a bad sign."),
    Chart("Time per step",
          {"step_seconds": "step", "sampling_seconds": "sampling", "update_seconds": "update"},
          {**ZERO, "ticksuffix": " s"},
          "Seconds per step, and the part of sampling and of updates. Healthy: steady, or in line with the "
          "completion length."),
    Chart("Speed", {"tokens_per_second": "tokens per second"}, ZERO,
          "Completion tokens divided by the time of the whole step. Healthy: steady."),
    Chart("Memory", {"memory_gib": "memory"}, {**ZERO, "ticksuffix": " GiB"},
          "The most memory in use. Healthy: it soon stops growing."),
)  # fmt: skip
# What the mean of the last steps may be at most, and what is said above that.
LIMITS = {
    "groups_without_signal": (0.5,
        "In {value:.0%} of the groups of the last {steps} steps all completions earned the same reward: "
        "such groups teach nothing. Choose problems that the model solves sometimes, but not always."),
    "without_reward": (0.05,
        "In the last {steps} steps, {value:.0%} of the completions had no reward: they teach nothing."),
    "truncated": (0.2,
        "In the last {steps} steps, {value:.0%} of the completions hit the length limit. Raise "
        "max_new_tokens if good answers need more."),
    "clip_fraction": (0.2,
        "In the last {steps} steps, {value:.0%} of the tokens were clipped: the updates are large. Lower "
        "learning_rate or num_iterations."),
    "kl": (1.0,
        "The KL to the reference is {value:.2g} nats per token: the policy has moved far. Look for broken "
        "text in the samples."),
    "mismatch_kl": (0.05,
        "The KL between the server that samples and the model that is trained is {value:.2g} nats per "
        "token: the completions are those of another policy."),
}  # fmt: skip
# What the last steps may be as a multiple of the first: at least, at most, and what is said outside.
CHANGES = {
    "entropy": (0.15, 3.0,
        "The entropy went from {first:.2g} to {value:.2g} nats per token. Near 0 the completions of a "
        "group are all alike; a strong rise often means broken text."),
    "completion_length": (1 / 3, 3.0,
        "The mean completion length went from {first:.0f} to {value:.0f} tokens. Look at the samples to "
        "see whether that is wanted."),
}  # fmt: skip
STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6472; --page: #f5f6f8; --card: #fff;
  --line: #dfe3e8; --warn: #b45309; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #a0a9b6; --page: #13161b;
  --card: #1c2027; --line: #363c47; --warn: #f59e0b; --good: #4ade80; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3, h4 { line-height: 1.25; margin: 0; } h2 { margin: 2rem 0 .75rem; } h3 { font-size: 1rem; }
p { margin: .25rem 0; } .soft, figcaption { color: var(--soft); font-size: .875rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.state { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.card { margin: 0; padding: .75rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; min-width: 0; }
.state .card { flex: 1 1 9rem; } .state b { display: block; font-size: 1.35rem; }
.warn { border-left: 4px solid var(--warn); } .fine { border-left: 4px solid var(--good); }
ul { margin: 0; padding: 0; list-style: none; } li.card { margin-bottom: .5rem; }
.plot { height: 260px; margin: .25rem 0; }
details { margin-bottom: .5rem; } summary { cursor: pointer; } h4 { margin: 1rem 0 .25rem; font-size: .9rem; }
pre { margin: .25rem 0; padding: .5rem .75rem; background: var(--page); border-radius: 6px; max-height: 24rem;
  overflow: auto; white-space: pre-wrap; font: .85rem/1.45 ui-monospace, monospace; }
.up, .down, .even { margin: .5rem 0; padding-left: .75rem; border-left: 4px solid var(--line); }
.up { border-color: var(--good); } .down { border-color: var(--bad); }
mark { background: none; color: var(--soft); }
table { border-collapse: collapse; width: 100%; } td, th { padding: .2rem .5rem; text-align: left;
  border-top: 1px solid var(--line); font-weight: normal; } th { color: var(--soft); width: 40%; }
"""
SCRIPT = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const touch = matchMedia("(pointer: coarse)").matches;  // there a drag scrolls the page
function draw() {
  const style = getComputedStyle(document.documentElement), css = name => style.getPropertyValue(name).trim();
  const axis = {gridcolor: css("--line"), zerolinecolor: css("--line"), fixedrange: touch};
  charts.forEach(({data, layout}, i) => Plotly.react("chart-" + i, data, {...layout,
    font: {color: css("--ink"), size: 12}, dragmode: touch ? false : "zoom",
    hoverlabel: {bgcolor: css("--card"), font: {color: css("--ink")}},
    xaxis: {...layout.xaxis, ...axis}, yaxis: {...layout.yaxis, ...axis},
  }, {responsive: true, displaylogo: false, displayModeBar: false}));
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""


def write(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run, finished or not, to `out` or `report.html` in its folder; return its path.

    Raises:
        ValueError: `run_dir` is not a run, or has made no step yet.
        OSError: something could not be read or written; the message names it.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{run_dir}: not a run, it has no metrics.jsonl")
    rows = {row["step"]: row for row in _rows(metrics)}  # a resumed run may repeat steps
    if not rows:
        raise ValueError(f"{metrics}: no step is finished yet")
    names = dict.fromkeys(name for step in sorted(rows) for name in rows[step])
    columns = {name: [_number(rows[s].get(name)) for s in sorted(rows)] for name in names}
    try:
        options = files.read_yaml((run_dir / "config.yaml").read_bytes())
    except (FileNotFoundError, yaml.YAMLError):
        options = None
    config = options if isinstance(options, dict) else {}
    time = datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.timezone.utc)
    samples = _samples(run_dir / "completions.jsonl")
    page = _page(run_dir.resolve().name, f"{time:%Y-%m-%d %H:%M} UTC", columns, config, samples)
    path = run_dir / "report.html" if out is None else out
    files.write(path, page.encode(errors="replace"))
    return path


def observations(columns: Columns, config: dict[str, Any]) -> list[str]:
    """Say in plain words what is unusual about the metrics of a run."""
    found, steps = [], min(WINDOW, len(columns["step"]))
    measured = {name: known(values) for name, values in columns.items()}
    means = {name: known(moving_means(values)) for name, values in measured.items() if values}
    for name, (limit, text) in LIMITS.items():
        if name in means and means[name][-1] > limit:
            found.append(text.format(value=means[name][-1], steps=steps))
    for name, (low, high, text) in CHANGES.items():
        if len(measured.get(name, [])) >= 2 * WINDOW:
            first, value = means[name][WINDOW - 1], means[name][-1]
            if not low * first <= value <= high * first:
                found.append(text.format(first=first, value=value))
    if failures := round(sum(measured.get("reward_failures", []))):
        found.append(f"The reward functions failed {failures:,} time{'s'[: failures > 1]}.")
    norms, spikes = columns.get("grad_norm", []), []
    for i, norm in enumerate(norms):
        before = [v for v in norms[max(0, i - 50) : i] if v]
        if norm and len(before) >= WINDOW and norm > 5 * statistics.median(before):
            spikes.append((columns["step"][i] or 0, norm))
    # A peak that is not above the limit moves the weights no further than other steps may.
    if spikes := [x for x in spikes if x[1] > (_number(config.get("max_grad_norm")) or 0)]:
        found.append(
            f"The gradient norm was over 5 times its usual value in {len(spikes)} "
            f"step{'s'[: len(spikes) > 1]}; the last was step {spikes[-1][0]:.0f}, with {spikes[-1][1]:.3g}."
        )
    return found + _about_reward(measured.get("reward", []))


def _about_reward(rewards: list[float]) -> list[str]:
    """Say whether the reward fell or never rose; differences within the noise do not count."""
    if len(rewards) < 3 * WINDOW:
        return []
    means = known(moving_means(rewards))[WINDOW - 1 :]
    # The noise of a step, and the standard error of the difference of two means.
    noise = statistics.pstdev(b - a for a, b in pairwise(rewards)) / math.sqrt(2)
    error = noise * math.sqrt(2 / WINDOW)
    first, best, last = means[0], max(means), means[-1]
    if best - last > max(4 * error, 0.2 * (best - min(means))):
        return [f"The reward fell from {best:.3g} to {last:.3g} (means of {WINDOW} steps)."]
    if len(rewards) >= 5 * WINDOW and last - first < 2 * error:
        return [
            f"The reward has not risen: {first:.3g} in the first {WINDOW} steps, {last:.3g} in the last."
        ]
    return []


def _page(name: str, time: str, columns: Columns, config: dict[str, Any], samples: str) -> str:
    """Put the parts of the page together; only text that `_text` has escaped comes from the run."""
    found, plots = observations(columns, config), _plots(columns)
    nonce = secrets.token_hex(16)  # no completion can know it, so none of its scripts runs
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'nonce-{nonce}'"
    )
    notes = "".join(f'<li class="card warn">{_text(text)}</li>' for text in found)
    figures = "".join(
        f'<figure class="card"><h3>{chart.title}</h3><p class="soft">{now}</p><div class="plot" '
        f'id="chart-{i}"></div><figcaption>{chart.caption}</figcaption></figure>'
        for i, (chart, now, _) in enumerate(plots)
    )
    options = "".join(f"<tr><th>{_text(k)}<td>{_text(v)}" for k, v in config.items())
    data = json.dumps([figure for _, _, figure in plots]).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(name)}: training report</title><style>{STYLE}</style></head><body>
<h1>{_text(name)}</h1><p class="soft">Training report; the last step ended at {time}.</p>
<div class="state">{_state(columns, config)}</div>
<h2>What stands out</h2>
<ul class="notes">{notes or '<li class="card fine">Nothing unusual was found.</li>'}</ul>
<h2>Curves</h2><p class="soft">Faint: each step. Strong: the mean of {WINDOW} steps. Drag to zoom,
double-click to go back; a click on a name in a legend hides its curve.</p>
<noscript><style>.plot {{ display: none; }}</style><p>The curves need JavaScript.</p></noscript>
<div class="grid">{figures}</div>
<h2>Samples</h2>{samples}
<h2>Options</h2><div class="card"><table>{options or "<tr><td>No config.yaml was found."}</table></div>
<script type="application/json" id="charts">{data}</script>
<script nonce="{nonce}">{get_plotlyjs()}</script><script nonce="{nonce}">{SCRIPT}</script>
</body></html>
"""


def _state(columns: Columns, config: dict[str, Any]) -> str:
    """Return how far the run is, as HTML."""
    last = {k: known(moving_means(x))[-1:] for k, x in columns.items()}
    steps = (columns["step"][-1] or 0) + 1  # steps are numbered from 0
    state = {f"of {config.get('steps', '?')} steps": f"{steps:.0f}"}
    for value in last.get("reward", []):
        state[f"reward, mean of the last {min(WINDOW, len(columns['step']))} steps"] = _short(value)
    for value in known(columns.get("seconds", []))[-1:]:
        state["elapsed"] = str(datetime.timedelta(seconds=round(value)))
    for value in last.get("tokens_per_second", []):
        state["tokens per second"] = _short(value)
    return "".join(f'<p class="card"><b>{v}</b> {_text(k)}</p>' for k, v in state.items())


def _plots(columns: Columns) -> list[tuple[Chart, str, dict[str, Any]]]:
    """Return the charts that have data, each with its last values in words and its plotly figure."""
    plots, steps = [], min(WINDOW, len(columns["step"]))
    for chart in CHARTS:
        names = dict(chart.names)
        if chart.title == "Reward":
            names |= {k: k.partition("/")[2][:40] for k in columns if k.startswith("reward/")}
        names = {k: v for k, v in names.items() if known(columns.get(k, []))}
        if names:
            share = "%" in chart.axis.get("tickformat", "")
            now = (
                f"{_text(v)} {_short(moving_means(columns[k])[-1], share)}"
                for k, v in names.items()
            )
            text = f"Mean of the last {steps} steps: {', '.join(now)}"
            plots.append((chart, text, _figure(names, chart.axis, columns)))
    return plots


def _figure(names: dict[str, str], axis: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Return plotly's data and layout: for each metric a faint curve of the steps and one of the means."""
    data: list[dict[str, Any]] = []
    for i, (name, label) in enumerate(names.items()):
        values, colour = columns[name], COLOURS[i % len(COLOURS)]
        few = len(known(values)) < 2 * WINDOW  # a line needs two points
        for kind, curve in (("raw", values), ("mean", moving_means(values))):
            shown = _thinned(curve)
            data.append(
                {
                    "type": "scatter",
                    "x": [columns["step"][j] for j in shown],
                    "y": [None if (v := curve[j]) is None else float(f"{v:.5g}") for j in shown],
                    "name": html.escape(label),  # plotly reads tags in names
                    "legendgroup": name,
                    "showlegend": kind == "mean",
                    "mode": "lines+markers" if few else "lines",
                    "line": {"color": colour, "width": 2 if kind == "mean" else 1},
                    "opacity": 1 if kind == "mean" else 0.35,
                    **({} if kind == "mean" else {"hoverinfo": "skip"}),
                }
            )
    layout = {
        "margin": {"l": 56, "r": 12, "t": 8, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "showlegend": len(names) > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": "step", "standoff": 4}},
        "yaxis": {"zeroline": False, **axis},
    }
    return {"data": data, "layout": layout}


def _samples(path: Path) -> str:
    """Return completions of steps spread over the run, the newest first, as HTML."""
    if not path.is_file():
        return '<p class="card">This run has no completions.jsonl.</p>'
    steps = sorted({row["step"] for row in _rows(path)})
    groups: dict[int, dict[str, list[dict[str, Any]]]] = {s: {} for s in _spread(steps, STEPS)}
    before = None
    for row in _rows(path):
        if row["step"] in groups:
            if row["step"] != before:  # a resumed run may repeat steps: the last time counts
                groups[row["step"]] = {}
            groups[row["step"]].setdefault(json.dumps(row.get("prompt")), []).append(row)
        before = row["step"]
    parts = [
        f'<p class="soft">{len(groups)} of the {len(steps)} saved steps, the newest first.</p>'
    ]
    for step, prompts in reversed(groups.items()):
        rewards = known([_number(r.get("reward")) for rows in prompts.values() for r in rows])
        mean = f": mean reward {_short(statistics.fmean(rewards))}" if rewards else ""
        shown = _spread(list(prompts.values()), PROMPTS)
        opened = " open" if step == steps[-1] else ""
        parts.append(
            f'<details class="card"{opened}><summary>Step {step}{mean}</summary><p class="soft">'
            f"{len(shown)} of {len(prompts)} prompts</p>{''.join(map(_group, shown))}</details>"
        )
    return "".join(parts)


def _group(rows: list[dict[str, Any]]) -> str:
    """Return a prompt and its completions, the best first, as HTML."""
    prompt = rows[0].get("prompt")
    messages = prompt if isinstance(prompt, list) else [{"role": "prompt", "content": prompt}]
    parts = []
    for message in messages:
        chat = message if isinstance(message, dict) else {"role": "prompt", "content": message}
        parts.append(f"<h4>{_text(chat.get('role'))}</h4><pre>{_cut(chat.get('content'))}</pre>")
    if rows[0].get("answer") is not None:
        parts.append(f"<h4>answer</h4><pre>{_cut(rows[0]['answer'])}</pre>")
    order = sorted(rows, key=lambda row: -(_number(row.get("reward")) or 0))
    shown = _spread(order, COMPLETIONS)
    parts.append(f"<h4>{len(shown)} of {len(rows)} completions, the best first</h4>")
    for row in shown:
        advantage = _number(row.get("advantage")) or 0
        side = "up" if advantage > 0 else "down" if advantage < 0 else "even"
        values = {"reward": row.get("reward"), "advantage": row.get("advantage")}
        values |= row["rewards"] if isinstance(row.get("rewards"), dict) else {}
        values["tokens"] = row.get("tokens")
        facts = [f"{_text(k)} {_short(_number(v))}" for k, v in values.items()]
        facts += ["<b>cut off at the length limit</b>"] if row.get("ended") is False else []
        parts.append(
            f'<div class="{side}"><p class="soft">{" · ".join(facts)}</p>'
            f"<pre>{_cut(row.get('completion'))}</pre></div>"
        )
    return "".join(parts)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that may still be written: a line that is not whole is left out."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _thinned(values: Sequence[float | None]) -> list[int]:
    """Return the places of a curve that are drawn: of a long one the extremes of each stretch."""
    size, places = math.ceil(len(values) / POINTS * 2), list(range(len(values)))
    if size <= 2:
        return places
    kept = set()
    for i in range(0, len(values), size):
        some = [j for j in places[i : i + size] if values[j] is not None] or [i]
        kept |= {min(some, key=lambda j: values[j] or 0), max(some, key=lambda j: values[j] or 0)}
    return sorted({*kept, len(values) - 1})


def _spread(items: list[Item], most: int) -> list[Item]:
    """Return at most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _short(value: float | None, share: bool = False) -> str:
    if value is None:
        return "none"
    if share:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _text(value: object) -> str:
    """Escape for HTML, with control characters made visible."""
    return html.escape(str(value).translate(VISIBLE))


def _cut(value: object) -> str:
    """Escape a text for HTML; the middle of a long one is left out."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    left_out, half = len(text) - CHARACTERS, CHARACTERS // 2
    if left_out <= 0:
        return _text(text)
    note = f"<mark>[{left_out:,} characters are left out here]</mark>"
    return f"{_text(text[:half])}\n{note}\n{_text(text[-half:])}"
