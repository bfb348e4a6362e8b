"""The site: built without a warning and without a network, from all pages; llms.txt; the pictures."""

import importlib
import inspect
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="it builds the site")
pytest.importorskip("material", reason="it is the theme of the site")
pytest.importorskip("mkdocstrings", reason="it reads the docstrings")
from filelock import FileLock
from mkdocs.commands.build import build
from mkdocs.config import load_config

import grpo_fast
from grpo_fast import diagnostics, loss, ops, shared_prompt, weights
from tests.support import browser

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://github.com/grpo-fast/grpo-fast"
# What a browser loads by itself, and the attribute that says from where.
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
NOT_LOADED = {"canonical", "prev", "next"}  # what a <link> may be that loads nothing


@pytest.fixture
def parts(monkeypatch):
    """The modules in docs/site by their names."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    return importlib.import_module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site, one for all test processes; a warning would be an error."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made, done = folder / "site", folder / "site.done"
    with FileLock(folder / "site.lock"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mkdocs and its libraries
        if not done.exists():
            config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(made), strict=True)
            build(config)
            done.touch()
    return made


class Loads(HTMLParser):
    """What a page loads by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADED and given.get("rel") not in NOT_LOADED:
            self.found.append(given.get(LOADED[tag]) or "")


def test_every_page_is_in_the_navigation_and_in_the_site(site, parts):
    pages = parts("llms").pages()
    assert len(set(pages)) == len(pages)
    written = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert set(pages) == written | set(parts("hooks").OUTSIDE)
    for page in pages:
        assert (site / page).read_text() == (ROOT / page).read_text(), "its Markdown"
        place = Path(page.removeprefix("docs/"))
        name = "index" if place.stem == "README" else place.stem
        assert (site / place.with_name(f"{name}.html")).is_file()


def test_no_page_loads_anything_from_the_network(site):
    found = {}
    for path in site.rglob("*.html"):
        loads = Loads(path.read_text()).found
        found[path.name] = [x for x in loads if x.startswith(("http:", "https:", "//"))]
        for place in loads:
            if path.name != "404.html" and not place.startswith(("data:", "#")):
                assert (path.parent / place.split("?")[0]).exists(), f"{path.name}: {place}"
    assert len(found) > 40
    assert not any(found.values()), found
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:|//)", path.read_text()), path.name


def test_the_search_works_in_a_page_that_is_opened_as_a_file(site, tmp_path):
    found = browser.find()
    if found is None:
        pytest.skip("no Chromium is installed")
    address = f"{(site / 'trainers' / 'verl.html').as_uri()}?q=temperature"
    start = tmp_path / "start.html"
    start.write_text(f'<meta http-equiv="refresh" content="0;url={address}">')
    opened = browser.show(found, start, tmp_path)
    results = opened.dom.split('class="md-search-result__list"')[1].split("</ol>")[0]
    assert "Troubleshooting" in results
    assert results.count('class="md-search-result__item"') > 3
    assert opened.requests == []
    assert opened.console == []


def test_links_lead_to_pages_of_the_site_or_to_the_repository(site):
    """Those within the site are checked by mkdocs; here are the kinds of rewriting."""
    home = (site / "index.html").read_text()
    assert 'href="start.html"' in home
    assert f'href="{REPOSITORY}/tree/main/examples"' in home
    assert 'href="benchmarks/RESULTS.html#gpu"' in home
    assert 'href="../kernels.html"' in (site / "trainers" / "verl.html").read_text()
    loop = (site / "loop.html").read_text()
    assert 'href="scaling.html"' in loop
    assert f"{REPOSITORY}/blob/main/docs" not in loop, "a page of the site"
    assert ".md" not in re.sub(r">[^<]*<", "", (site / "kernels" / "index.html").read_text())


def test_code_is_not_rewritten(parts):
    """Indexing and calling in code looks like a link."""
    hooks = parts("hooks")
    text = "`x[0](loop.md)` and\n\n```python\nx[0](loop.md)\n```"
    assert hooks.CODE.split(text)[1::2] == ["`x[0](loop.md)`", "```python\nx[0](loop.md)\n```"]


@pytest.mark.parametrize(
    "written, read",
    [
        ("a\nb\n\nc", "a b\n\nc"),
        ("- a\n  b\n- c", "- a b\n- c"),
        ("1. a\n   - b\n     c\n2. d", "1. a\n    - b c\n2. d"),
        ("1. a\n\n   b\n\n    ```\n    c\n    ```\n\nd", "1. a\n\n    b\n\n     ```\n     c\n     ```\n\nd"),
        ("- below\n  95. The rest", "- below 95. The rest"),
        ("a\n| b |\n|---|\n| c |", "a\n\n| b |\n|---|\n| c |"),
        ("a\n- b\n- c\n\nd\n1. e", "a\n\n- b\n- c\n\nd\n\n1. e"),
        ("```\na\n b\n```\nc", "```\na\n b\n```\nc"),
        ("x\n\n    f = g\n    + h", "x\n\n    f = g\n    + h"),
        ("- a\n\n      f = g\n\n  b\n\nc", "- a\n\n        f = g\n\n    b\n\nc"),
        ("::: module.name\n    options:\n      a: b", "::: module.name\n    options:\n      a: b"),
    ],
)  # fmt: skip
def test_lists_and_paragraphs_as_python_markdown_reads_them(parts, written, read):
    assert parts("hooks").unwrapped(written) == read


def test_the_list_of_pages_for_language_models_is_up_to_date(site, parts):
    llms = parts("llms")
    text = (ROOT / "llms.txt").read_text()
    assert text == llms.content(), "run python docs/site/llms.py"
    assert (site / "llms.txt").read_text() == text
    assert re.match(r"# \S+\n\n> .+\.\n\n## ", text)
    entries = re.findall(r"^- \[(.+?)\]\(([^)]+)\): (.+)$", text, re.MULTILINE)
    assert [place for _, place, _ in entries] == llms.pages()
    for title, place, sentence in entries:
        assert (ROOT / place).read_text().startswith(f"# {title}\n")
        assert len(sentence) > 25, f"{place}: {sentence}"


def test_the_pictures_are_those_of_the_schedules(parts):
    pytest.importorskip("triton", reason="the schedules are those of its kernels")
    pictures = parts("pictures")
    text = (ROOT / "docs" / "kernels.md").read_text()
    for name, draw in pictures.PICTURES.items():
        drawn = str(draw())
        written = (ROOT / "docs" / f"{name}.svg").read_text()
        assert written == drawn, "run python docs/site/pictures.py"
        assert f"({name}.svg)" in text
    for _, moved, misses in pictures.moved():
        total = moved.least + (moved.reread if misses else 0)
        assert pictures.gigabytes(total) in text
    rows, _ = pictures.chunks()
    assert f"{rows:,} x {pictures.V:,}" in text


def test_the_formulas_on_the_page_are_those_of_the_benchmarks():
    formulas = importlib.import_module("benchmarks.measuring.traffic").FORMULAS
    text = (ROOT / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| `(\w+)`(, \w+)? \| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for name, way, *row in rows:
        assert formulas[name + way] == tuple(row)


def test_the_reference_has_every_public_function_with_its_arguments(site):
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    documented = {}
    for name in named:
        home, _, last = name.rpartition(".")
        if home.startswith("grpo_fast.integrations."):
            continue  # mkdocs has found it; to import it takes seconds
        documented[id(getattr(importlib.import_module(home), last))] = name
    modules = (grpo_fast, diagnostics, loss, ops, weights)
    public = [getattr(module, name) for module in modules for name in module.__all__]
    public += [getattr(shared_prompt, x) for x in ("plan", "with_head", "backward", "check")]
    page = (site / "api.html").read_text()
    for function in public:
        if inspect.ismodule(function):
            continue
        assert id(function) in documented, function
        name = documented[id(function)]
        start = page.index(f'id="{name}"')
        part = page[start : page.find('class="doc doc-object doc-', start)]
        words = set(re.findall(r"\w+", part))
        assert words >= inspect.signature(function).parameters.keys(), name
        if inspect.isfunction(function):
            assert "Parameters:" in part
            assert "Returns:" in part
    assert page.count("Raises:") > 10
