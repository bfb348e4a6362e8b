"""The page of `grpo-fast explain` in a browser: its numbers, its buttons and sliders, its readers."""

import dataclasses
import html.parser
import itertools
import json
import re

import pytest
import torch

pytest.importorskip("rich", reason="the page needs grpo-fast[train]")

from grpo_fast import logprob
from grpo_fast.trainer.explain import numbers, page, record
from tests.support import browser

HOSTILE = (
    "</script><script>document.title = 'taken'</script><img src=http://taken.invalid/a.png "
    "onerror=\"document.title = 'taken'\"> \"'`$run ${1} \u202eabc\u2028\r\n\x00\ud800 &amp; <b id=taken>"
)
STAGES = ["sample", "reward", "advantage", "ratio", "clip", "kl", "gradient", "update"]
SLIDERS = ["update", "group", "low", "high", "beta", *(f"reward{i}" for i in range(1, 9))]
SHOWN = """Object.fromEntries([...document.querySelectorAll(".stage:not([hidden]) data, #summary data")]
    .map((x) => [x.dataset.name, Number(x.value)]))"""


@pytest.fixture(scope="module")
def shipped():
    return record.load(record.SHIPPED)


def with_texts(one, value):
    """The record with one text in every place that has one."""
    names = {f"{value}{k}": v for k, v in enumerate(one.source.reward_weights.values())}
    rewards = dict.fromkeys(names, 1.0)

    def changed(x):
        return dataclasses.replace(x, text=value, tokens=[value] * len(x.tokens), rewards=rewards)

    source = dataclasses.replace(
        one.source, run=value, model=value, task=value, reward_weights=names
    )
    return dataclasses.replace(
        one,
        source=source,
        prompt=[record.Message(value, value)],
        answer=value,
        completions=[changed(c) for c in one.completions],
        again=[[changed(c) for c in some] for some in one.again],
    )


class Page(html.parser.HTMLParser):
    """The tags of a page, and its text outside scripts."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.within = [], [], ""
        self.feed(source)
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.within = tag

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within not in ("script", "style"):
            self.words.append(data)


def test_nothing_is_loaded_and_nothing_else_runs(shipped):
    for one in (shipped, with_texts(shipped, HOSTILE)):
        source = page.page(one)
        found = Page(source)
        tags = [tag for tag, _ in found.tags]
        assert (tags.count("script"), tags.count("style"), tags.count("img")) == (2, 1, 0)
        for _, attributes in found.tags:
            assert not {"src", "srcset", "style", "onload", "onclick", "onerror"} & set(attributes)
            assert attributes.get("href", "#")[0] == "#"
            assert attributes.get("id") != "taken"
        (policy,) = [x["content"] for _, x in found.tags if "http-equiv" in x]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy
        data = re.search(r'id="data">(.*?)</script>', source, re.S)[1]
        assert json.loads(data)["record"]["completions"][0]["tokens"]


def test_the_page_explains_itself_without_scripts(shipped):
    found = Page(page.page(shipped))
    tags = [tag for tag, _ in found.tags]
    assert tags.count("math") >= len(STAGES) == tags.count("section")
    assert "hidden" not in dict(next(x for tag, x in found.tags if tag == "section"))
    assert shipped.completions[5].text in found.text
    assert f"{numbers.compute(shipped, numbers.settings_of(shipped)).loss:+.6f}" in found.text
    for name in ("smollm2-geo", "step-000003", "dapo", "grpo_fast 0.1.0", "token_mean"):
        assert name in found.text


@pytest.fixture(scope="module")
def tab(tmp_path_factory, shipped):
    path = browser.find()
    if path is None:
        pytest.skip(f"none of {', '.join(browser.NAMES)} is on PATH")
    folder = tmp_path_factory.mktemp("browser")
    page.write(shipped, folder / "page.html")
    with browser.Tab(path, folder / "page.html", folder) as found:
        yield found
        assert found.trouble == []


@pytest.fixture(autouse=True)
def _from_the_start(request):
    if "tab" in request.fixturenames:
        tab = request.getfixturevalue("tab")
        tab.click("#reset")
        stage(tab, "sample")


def stage(tab, name):
    """Click on the button of a stage."""
    tab.click(f"#stages li:nth-child({STAGES.index(name) + 1}) button")
    assert shown_stage(tab) == name


def shown_stage(tab):
    (found,) = tab.evaluate(
        "[...document.querySelectorAll('.stage:not([hidden])')]"
        ".map((x) => x.querySelector('[id^=figure]').id.slice(7))"
    )
    assert tab.evaluate("document.querySelector('[aria-current]').textContent").startswith(
        str(STAGES.index(found) + 1)
    )
    return found


def slide(tab, name, *keys):
    """Focus a slider, press keys, and return its value."""
    tab.evaluate(f"document.getElementById('{name}').focus()")
    tab.press(*keys)
    return tab.evaluate(f"Number(document.getElementById('{name}').value)")


def expected(one, settings):
    """What the page has to show, by the names it gives."""
    found = numbers.compute(one, settings)
    sides = [x for row in found.clipped for x in row]
    names = {
        "mean": found.mean,
        "std": found.std,
        "kl_mean": found.kl_mean,
        "clip_fraction": found.clip_fraction,
        "clipped": sum(map(abs, sides)),
        "stopped.above": sides.count(1),
        "stopped.below": sides.count(-1),
        "loss": found.loss,
        "loss_after": found.loss_after,
        "summary.loss": found.loss,
        "summary.after": found.loss_after,
        "summary.kl": found.kl_mean,
        "recorded.loss": one.updates[settings.update - 1].loss,
        "grad_norm": one.updates[settings.update - 1].grad_norm,
    }
    for i, A in enumerate(found.advantages, 1):
        names |= {f"advantage.{i}": A, f"reward.{i}": settings.rewards[i - 1]}
        rows = zip(found.ratios[i - 1], found.kl[i - 1], found.coefficients[i - 1], strict=True)
        for t, (ratio, kl, coefficient) in enumerate(rows, 1):
            names |= {f"ratio.{i}.{t}": ratio, f"k3.{i}.{t}": kl}
            names[f"c1000.{i}.{t}"] = 1000 * coefficient
    return names


def all_shown(tab):
    """The numbers of all stages."""
    found = {}
    for name in STAGES:
        stage(tab, name)
        found |= tab.evaluate(SHOWN)
    return found


def assert_right(tab, one, settings, found=None):
    """The page shows the library's numbers, to 1e-6; return how many were compared."""
    found, want = all_shown(tab) if found is None else found, expected(one, settings)
    other = {x for x in found if x.startswith("token.") or x in ("before", "after")}
    other |= {"ratio.least", "ratio.largest"}
    assert found.keys() - other <= want.keys()
    compared = found.keys() & want.keys()
    for name in compared:
        assert found[name] == pytest.approx(want[name], abs=1e-6, rel=1e-6), name
    return len(compared)


def test_every_number_is_that_of_grpo_fast(tab, shipped):
    settings = numbers.settings_of(shipped)
    tokens = sum(len(c.tokens) for c in shipped.completions)
    assert assert_right(tab, shipped, settings) == len(expected(shipped, settings))
    assert len(expected(shipped, settings)) > 3 * tokens
    difference = "Number(document.querySelector('[data-name=difference]').value)"
    assert 0 < tab.evaluate(difference) < 1e-6


def test_every_slider_is_computed_again_as_grpo_fast_does(tab, shipped):
    """One after the other, so that each changes what all before it have set."""
    moves = {
        "update": ["ArrowRight"],
        "low": ["ArrowLeft"] * 3,
        "high": ["ArrowUp"] * 2,
        "beta": ["ArrowRight"] * 5,
        "reward1": ["End"],
        "reward2": ["Home"],
        "reward3": ["ArrowRight"] * 7,
        "reward4": ["ArrowLeft"] * 9,
        "reward5": ["ArrowLeft"],
        "reward6": ["ArrowDown"] * 2,
        "reward7": ["ArrowRight"],
        "reward8": ["ArrowRight"] * 2,
        "group": ["ArrowLeft"] * 2,
    }
    assert sorted(moves) == sorted(SLIDERS)
    settings = numbers.settings_of(shipped)
    rewards = list(settings.rewards)
    stage(tab, "gradient")
    before = tab.evaluate(SHOWN)
    for name, keys in moves.items():
        value = slide(tab, name, *keys)
        match name:
            case "update":
                settings = settings._replace(update=int(value))
            case "low" | "high":
                settings = settings._replace(**{f"epsilon_{name}": value})
            case "beta":
                settings = settings._replace(beta=value)
            case "group":
                rewards = rewards[: int(value)]
            case _:
                rewards[int(name[6:]) - 1] = value
        settings = settings._replace(rewards=rewards)
        found = tab.evaluate(SHOWN)
        assert found != before, f"{name} changes nothing"
        assert_right(tab, shipped, settings, found)
        words = tab.evaluate(f"document.getElementById('{name}').getAttribute('aria-valuetext')")
        assert float(words) == pytest.approx(value)
        before = found
    assert (settings.update, settings.epsilon_low, len(rewards)) == (2, 0.17, 6)
    assert rewards[:3] == pytest.approx([1.0, 0.0, 0.37])
    assert_right(tab, shipped, settings)
    tab.click("#reset")
    assert_right(tab, shipped, numbers.settings_of(shipped))


def test_a_slider_follows_the_mouse(tab, shipped):
    tab.click("#beta")  # in its middle
    assert tab.evaluate("Number(document.getElementById('beta').value)") == 0.25
    stage(tab, "kl")
    settings = numbers.settings_of(shipped)._replace(beta=0.25)
    assert_right(tab, shipped, settings, tab.evaluate(SHOWN))


def test_equal_rewards_teach_nothing(tab, shipped):
    stage(tab, "advantage")
    slide(tab, "group", "ArrowLeft")
    assert (
        slide(tab, "reward1", "Home", *["ArrowRight"] * 10) == 0.1
    )  # the mean of seven is rounded
    tab.click("#equal")
    assert "This group teaches nothing" in tab.evaluate("document.body.innerText")
    settings = numbers.settings_of(shipped)._replace(rewards=[0.1] * 7)
    assert_right(tab, shipped, settings)
    stage(tab, "gradient")
    assert "80 have no gradient" in tab.evaluate("document.body.innerText")


def test_previous_and_next(tab):
    for name in STAGES[1:]:
        tab.click("#next")
        assert shown_stage(tab) == name
        focused = tab.evaluate("document.activeElement.id")
        assert focused == f"title-{name}"  # a screen reader begins to read there
    assert tab.evaluate("document.getElementById('next').disabled")
    for name in STAGES[-2::-1]:
        tab.click("#previous")
        assert shown_stage(tab) == name
    assert tab.evaluate("document.getElementById('previous').disabled")


def test_the_second_update_by_its_button(tab, shipped):
    stage(tab, "clip")
    assert tab.evaluate(SHOWN)["clipped"] == 0
    tab.click("#second")
    assert tab.evaluate("document.activeElement.id") == "update"
    settings = numbers.settings_of(shipped, 2)
    assert tab.evaluate(SHOWN)["clipped"] > 0
    assert_right(tab, shipped, settings, tab.evaluate(SHOWN))


def test_a_token_and_all_that_is_multiplied_for_it(tab, shipped):
    stage(tab, "gradient")
    slide(tab, "update", "ArrowRight")
    slide(tab, "beta", "ArrowRight", "ArrowRight")
    found = numbers.compute(shipped, numbers.settings_of(shipped, 2)._replace(beta=0.02))
    tab.click(".token[data-i='6'][data-t='3']")
    places = [(6, 3)]
    for key, i, t in (
        ("ArrowRight", 6, 4),
        ("ArrowDown", 7, 4),
        ("ArrowLeft", 7, 3),
        ("ArrowUp", 6, 3),
    ):
        tab.press(key)
        places.append((i, t))
        focused = tab.evaluate("({ ...document.activeElement.dataset })")
        assert focused == {"i": str(i), "t": str(t)}
    for i, t in dict.fromkeys(places):
        tab.click(f".token[data-i='{i}'][data-t='{t}']")
        shown = tab.evaluate(SHOWN)
        want = {"ratio": found.ratios, "kl": found.kl, "coefficient": found.coefficients}
        for name, rows in want.items():
            assert shown[f"token.{name}"] == pytest.approx(rows[i][t], abs=1e-6)
        assert shown["token.logp"] == shipped.logps[1][i][t]
        # Of the logits of two tokens, of which the first one has this log-prob.
        p = torch.tensor(shown["token.logp"], dtype=torch.float64).exp()
        logits = torch.stack([p.log(), (1 - p).log()])[None].float().requires_grad_()
        (logprob(logits, torch.tensor([0])) * shown["token.coefficient"]).sum().backward()
        assert shown["token.own"] == pytest.approx(logits.grad[0, 0].item(), abs=1e-6)
    assert shown_stage(tab) == "gradient"  # the keys moved the token and not the stage


def test_the_keyboard_reaches_everything(tab):
    """By Tab alone; the arrow keys change the stage."""
    stage(tab, "ratio")
    reached = []
    for _ in range(60):
        tab.press("Tab")
        name = tab.evaluate(
            "document.activeElement.id || document.activeElement.textContent.slice(0, 2)"
        )
        if name == "Co" or name in reached:
            break
        reached.append(name)
    assert set(SLIDERS) | {"previous", "next", "equal", "reset", "second"} <= set(reached)
    buttons = [
        tab.evaluate(f"document.querySelectorAll('#stages button')[{k}].tabIndex") for k in range(8)
    ]
    assert buttons == [0] * 8
    assert (
        tab.evaluate(
            "document.querySelectorAll('.stage:not([hidden]) .token[tabindex=\"0\"]').length"
        )
        == 1
    )
    stage(tab, "ratio")
    tab.press("ArrowRight", "ArrowRight")
    assert shown_stage(tab) == "kl"
    assert tab.evaluate("document.activeElement.textContent") == "6. KL"
    tab.press("ArrowLeft")
    assert shown_stage(tab) == "clip"
    tab.press("Tab", "Enter")
    assert shown_stage(tab) == "kl"
    tab.press("Tab", " ")
    assert shown_stage(tab) == "gradient"
    slide(tab, "beta", "ArrowRight")  # its arrows are its own
    assert shown_stage(tab) == "gradient"


def test_what_a_screen_reader_is_told(tab):
    stage(tab, "clip")
    tab.click("#second")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    told = [(x["role"]["value"], x.get("name", {}).get("value", ""))
            for x in nodes if not x["ignored"]]  # fmt: skip
    for role in ("slider", "button", "image", "group", "navigation", "region", "heading"):
        names = [name for kind, name in told if kind == role]
        assert names, role
        assert all(names), f"a {role} has no name"
    sliders = [name for kind, name in told if kind == "slider"]
    assert sliders == [
        "Update", "G, completions used", "Epsilon low", "Epsilon high", "Beta",
        *(f"Completion {i}" for i in range(1, 9)),
    ]  # fmt: skip
    assert ("status", "") in told
    assert any(kind == "button" and "stopped by the clip" in name for kind, name in told)
    assert any(kind == "image" and "tokens, 4 stopped" in name for kind, name in told)
    assert any(kind.startswith("Math") for kind, _ in told)
    levels = [int(x) for x in tab.evaluate(
        "[...document.querySelectorAll('h1,h2,h3')].filter((x) => x.offsetParent)"
        ".map((x) => x.tagName[1]).join('')"
    )]  # fmt: skip
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    status = "document.getElementById('summary')"
    assert tab.evaluate(f"{status}.getAttribute('aria-live')") == "polite"
    before = tab.evaluate(f"{status}.textContent")
    slide(tab, "low", "Home")
    assert tab.evaluate(f"{status}.textContent") != before


CONTRAST = r"""(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parts = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => c.slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (x) => {
    const colour = parts(getComputedStyle(x).backgroundColor);
    return colour[3] === 255 || !x.parentElement ? colour : behind(x.parentElement);
  };
  const found = [];
  for (const x of document.querySelectorAll("body *")) {
    const own = [...x.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !x.checkVisibility() || x.closest(":disabled, script, svg")) continue;
    const [a, b] = [light(parts(getComputedStyle(x).color)), light(behind(x))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push([x.tagName, x.className, ratio, x.textContent.slice(0, 20)].join());
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_by_day_and_by_night(tab, scheme):
    """Nothing is wider than 390 pixels, all text stands out, and every button is large enough for a thumb."""
    tab.resize(390, 844)
    tab.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    slide(tab, "update", "ArrowRight")
    try:
        for name in STAGES:
            stage(tab, name)
            assert tab.evaluate("document.documentElement.scrollWidth") == 390
            wide = tab.evaluate(
                "[...document.querySelectorAll('.stage:not([hidden]) math')]"
                ".filter((x) => x.getBoundingClientRect().right > 380 || x.scrollWidth > x.clientWidth + 1)"
                ".map((x) => x.textContent)"
            )
            assert not wide
            assert tab.evaluate(CONTRAST) == []
            small = tab.evaluate(
                "[...document.querySelectorAll('button, input')].filter((x) => x.checkVisibility())"
                ".map((x) => x.getBoundingClientRect()).filter((r) => r.width < 24 || r.height < 24).length"
            )
            assert small == 0
        tab.click("#beta")
        assert tab.evaluate("Number(document.getElementById('beta').value)") > 0.2
    finally:
        tab.resize(1280)
        tab.prefer()


OTHERS = {
    "sequence_mean": {"reduction": "sequence_mean", "beta": 0.04},
    "sequence_sum": {"reduction": "sequence_sum"},
    "fixed_length": {"reduction": "fixed_length", "max_length": 16, "beta": 0.1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_objectives_and_hostile_texts(tab, shipped, tmp_path, name):
    one = dataclasses.replace(
        with_texts(shipped, HOSTILE),
        objective={**shipped.objective, **OTHERS[name]},
        scale_rewards="none" if name == "fixed_length" else "group",
        temperature=0.5,
    )
    page.write(one, tmp_path / "page.html")
    tab.open(tmp_path / "page.html")
    try:
        stage(tab, "gradient")
        for update in (1, 2, 3):
            if update > 1:
                slide(tab, "update", "ArrowRight")
            found = tab.evaluate(SHOWN)
            assert_right(tab, one, numbers.settings_of(one, update), found)
        free = 1 - torch.tensor(found["token.logp"], dtype=torch.float64).exp().item()
        assert found["token.own"] == pytest.approx(
            found["token.coefficient"] * free / 0.5, abs=1e-9
        )
        stage(tab, "advantage")
        assert_right(tab, one, numbers.settings_of(one, 3), tab.evaluate(SHOWN))
        stage(tab, "sample")
        words = tab.evaluate("document.querySelector('.stage').innerText")
        assert "</script><script>document.title = 'taken'</script><img src=http://taken" in words
        assert "`$run ${1} [U+202E]abc[U+2028][U+000D]⏎[U+0000][U+D800] &amp; <b id=taken>" in words
        assert tab.evaluate("document.title").startswith("One step of GRPO: </script>")
        assert tab.evaluate("document.getElementById('taken') === null")
    finally:
        tab.open(tab.first)


def test_without_scripts(tab):
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(tab.first)
        words = tab.evaluate("document.body.innerText")
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
        tab.open(tab.first)
    for name in ("1. Completions", "8. Update", "+0.077768", "The capital of Belarus is Minsk."):
        assert name in words
    assert "Change the numbers" not in words


def test_trouble_is_seen(tab, tmp_path):
    """Errors and requests of a page reach `Tab.trouble`, which the fixture looks at."""
    assert tab.trouble == []
    (tmp_path / "page.html").write_text(
        "<img src='http://taken.invalid/a.png'><script>missing()</script>"
    )
    tab.open(tmp_path / "page.html")
    try:
        assert "http://taken.invalid/a.png" in tab.trouble
        assert any("missing is not defined" in x for x in tab.trouble)
    finally:
        tab.open(tab.first)
        tab.trouble.clear()
