"""Make a site of pages that are written for GitHub; mkdocs calls these functions while it builds.

- Pages that lie outside docs/ become part of the site (`OUTSIDE`).
- Links between files of the repository lead to pages of the site, or to the file on GitHub.
- Lists are indented as Python-Markdown wants them: by four spaces for each level.
- The page that `grpo-fast explain` writes stands inside concepts.md.
- llms.txt, and the Markdown of every page that it names, are copied beside the pages.
"""

import os.path
import posixpath
import re
from pathlib import Path

import llms  # beside this file, where mkdocs looks while it loads a hook
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "kernels/README.md",
    "benchmarks/README.md",
    "benchmarks/RESULTS.md",
    "benchmarks/NOTES.md",
]
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"( *)(- |\d+\. +)(?=\S)")
# Lines that are no part of a paragraph: blank, headings, tables, quotes, HTML.
ALONE = re.compile(r"\s*($|#|\||>|<|:::)")
INTERACTIVE = "interactive.html"
FRAME = (
    f'<iframe class="interactive" src="{INTERACTIVE}" title="One step of GRPO"></iframe>\n\n'
    f"[Open it alone]({INTERACTIVE})."
)


def on_files(files, config):
    """Add the pages that lie outside docs/, and the interactive page."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    files.append(File.generated(config, INTERACTIVE, content=interactive_page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite what GitHub and Python-Markdown, or the two places of a page, read differently."""
    name = page.file.src_uri
    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(lambda x: link(x[1], name, config, files), text) for text in parts[::2]]
    text = "".join(parts).replace("<!-- grpo-fast explain -->", FRAME)
    return unwrapped(text)


def on_post_build(config):
    """Copy llms.txt, and the pages that it names, to where its links lead."""
    for name in ["llms.txt", *llms.pages()]:
        place = Path(config.site_dir, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text((ROOT / name).read_text())


def link(target: str, name: str, config, files) -> str:
    """The link that leads from a page of the site to where `target` leads in the repository.

    Args:
        name: the place of the page among the files of the site.
    """
    here = name if name in OUTSIDE else f"docs/{name}"
    there = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    place = there.removeprefix("docs/")
    file = files.get_file_from_path(place)
    in_site = file is not None and not file.inclusion.is_excluded()
    if in_site and (place in OUTSIDE) == (place == there):
        return posixpath.relpath(place, posixpath.dirname(name) or ".")
    if not os.path.lexists(ROOT / there):
        return target  # mkdocs reports it
    return (
        f"{config.extra['repository']}/{'tree' if (ROOT / there).is_dir() else 'blob'}/main/{there}"
    )


def unwrapped(text: str) -> str:
    """Text with one line for each paragraph, and four spaces for each level of lists.

    A list or a table has an empty line before it, which GitHub does not need.
    """
    lines: list[str] = []
    offsets: list[int] = []  # where the text of each open list item begins
    fence = paragraph = False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        marker = MARKER.match(line)
        is_fence = line.lstrip().startswith("```")
        if fence or is_fence or ALONE.match(line):
            joins = False
        elif marker:  # a number other than 1 does not begin a list within a paragraph
            joins = paragraph and marker[2][0] not in "-1" and indent >= (offsets or [0])[-1]
        else:
            joins = paragraph
        if joins:
            lines[-1] += f" {line.strip()}"
            continue
        if paragraph and ((marker and not offsets) or line.startswith("|")):
            lines.append("")
        if line.strip() and not fence:
            while offsets and indent < offsets[-1]:
                offsets.pop()
        given = offsets[-1] if offsets else 0
        lines.append((" " * 4 * len(offsets) + line[min(indent, given) :]).rstrip())
        fence ^= is_fence
        indented_code = indent - given >= 4
        paragraph = not (fence or is_fence or ALONE.match(line) or indented_code)
        if marker and not fence and not indented_code:
            offsets.append(len(marker[0]))
    return "\n".join(lines)


def interactive_page() -> str:
    """The page that `grpo-fast explain` writes, as HTML."""
    from grpo_fast.trainer.explain import page, record

    return page.page(record.load(record.SHIPPED))
