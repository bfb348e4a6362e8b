"""Write llms.txt: a list of all pages with the first sentence of each, for language models.

    python docs/site/llms.py            # after a change of a page
    python docs/site/llms.py --check    # is it up to date?

The order is that of the navigation in mkdocs.yml. The format is that of llmstxt.org.
"""

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "llms.txt"


class Loader(yaml.SafeLoader):
    """A loader of mkdocs.yml, which has tags of Python."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def sections() -> dict[str, list[str]]:
    """The pages of each part of the navigation, by their places in the repository."""
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]

    def places(entry) -> Iterator[str]:
        if isinstance(entry, str):
            docs = posixpath.join("docs", entry)
            yield docs if (ROOT / docs).is_file() else entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from places(part)

    return {title: list(places(part)) for entry in nav for title, part in entry.items()}


def pages() -> list[str]:
    """All pages, by their places in the repository."""
    return [place for part in sections().values() for place in part]


def title_and_sentence(text: str) -> tuple[str, str]:
    """The title of a page, and the first sentence of its first paragraph, without links and marks."""
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    title, *paragraphs = without_code.split("\n\n")
    first = " ".join(next((x for x in paragraphs if re.match(r"\s*[\w*`]", x)), "").split())
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"^\*\*.*?\*\* ", "", first))
    return title.removeprefix("# ").strip(), re.match(r"(.*?)[.:]?(?:(?<=\.) |$)", plain)[1]


def content() -> str:
    """The text of llms.txt."""
    name, summary = title_and_sentence((ROOT / "README.md").read_text())
    lines = [f"# {name}", "", f"> {summary}."]
    for section, places in sections().items():
        lines += ["", f"## {section}", ""]
        for place in places:
            title, sentence = title_and_sentence((ROOT / place).read_text())
            lines.append(f"- [{title}]({place}): {sentence}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the file; with --check only compare it."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(f"arguments {arguments}: want none, or --check")
    if not arguments:
        FILE.write_text(content())
    elif FILE.read_text() != content():
        raise SystemExit("llms.txt is not up to date: run python docs/site/llms.py")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
