"""What the documents say of the repository is so."""

import re
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def documents():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("docs/*/*.md")]:
        if ".venv" not in path.parts and "site-packages" not in path.parts:
            yield path, path.read_text()


def test_links_lead_somewhere():
    for path, text in documents():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_links_to_a_section_lead_to_a_heading():
    for path, text in documents():
        for target, section in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
            there = (path.parent / target).read_text() if target else text
            headings = re.findall(r"^#+ (.*)$", there, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
            assert section in anchors, f"{path.name} links to {target}#{section}"


def test_every_page_can_be_reached_from_the_readme():
    found, new = set(), {ROOT / "README.md"}
    while new:
        path = new.pop()
        found.add(path)
        for target in re.findall(r"\]\(([^)#:]+\.md)", path.read_text()):
            new |= {(path.parent / target).resolve()} - found
    assert set(ROOT.glob("docs/**/*.md")) <= found


def test_modules_that_documents_run_exist():
    """The changelog and the results name those of other commits."""
    for path, text in documents():
        for name in re.findall(r"python -m ((?:benchmarks|tests|grpo_fast)[\w.]*\w)", text):
            found = ROOT / name.replace(".", "/")
            runs = found.with_suffix(".py").is_file() or (found / "__main__.py").is_file()
            assert runs or path.name in ("CHANGELOG.md", "RESULTS.md"), f"{path.name}: {name}"


def test_names_in_the_guide_exist():
    """Files, folders, and the tables in capitals that a contributor is told to edit."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = [ROOT, *(ROOT / x for x in ("grpo_fast", "kernels", "tests", "benchmarks"))]
    code = [path for folder in folders[1:] for path in folder.glob("**/*.py")]
    names = {path.name for path in code} | {f"{path.parent.name}/" for path in code}
    for name in re.findall(r"`([\w./]+(?:\.py|/))`", text):
        assert name in names or any((x / name).exists() for x in folders), name
    source = "".join(path.read_text() for path in [*code, ROOT / "Makefile"])
    for name in re.findall(r"`([A-Z][A-Z_]+)`", text):
        assert re.search(rf"^ *{name}\b", source, re.MULTILINE), f"nothing defines {name}"


def test_the_extras_that_documents_name_exist():
    for path, text in documents():
        for names in re.findall(r"(?:grpo-fast|grpo_fast\S*whl|'\.)\[(\w[\w,]*)\]", text):
            unknown = set(names.split(",")) - PROJECT["optional-dependencies"].keys()
            assert not unknown, f"{path.name}: no extra {unknown}"


def test_the_page_on_installation_names_the_wheel_that_is_built():
    name = f"{PROJECT['name'].replace('-', '_')}-{PROJECT['version']}-py3-none-any.whl"
    assert name in (ROOT / "docs" / "install.md").read_text()


def test_times_and_memory_in_the_summary_are_those_of_the_report():
    written, measured = (ROOT / "README.md").read_text().split("<!-- measured", 1)
    for number in re.findall(r"[\d,.]+ (?:ms|MiB)\b", written):
        assert number in measured, f"README.md: {number} is not in the part that the report writes"
    commit = re.search(r"at commit (\w+)", written)[1]
    assert f"commit {commit}, " in measured


def test_prose_wraps_at_100_columns():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        code = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            table, formula = line.startswith("|"), line.startswith("    ")
            short = len(line) <= 100 or code or table or formula
            assert short, f"{path.name}:{number} has {len(line)} columns"
