"""Draw the pictures of docs/kernels.md, with sizes from the code's own schedules and formulas.

python docs/site/pictures.py            # after a change of a schedule
python docs/site/pictures.py --check    # are they up to date?
"""

import html
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import traffic  # noqa: E402
from grpo_fast.kernels.schedules import MAX_V_PER_PROGRAM, reading  # noqa: E402
from grpo_fast.ops.head.chunk_length import WORKSPACE_BYTES, chunk_rows, padded  # noqa: E402

N, D, V, SHORT_V = (
    16_384,
    3_584,
    152_064,
    32_000,
)  # the largest shape of the benchmarks; Llama 2's V
HALF, SINGLE = 2, 4  # bytes of an entry
PROCESSORS = 132  # of an H100 or H200
INK, MEMORY, CACHE, WRITTEN, WAITS = "#222222", "#9ecae1", "#deebf7", "#fdae6b", "#eeeeee"


class Picture:
    """An SVG file on a white ground, legible on light and dark pages."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif" font-size="14" fill="{INK}">',
            f"<title>{html.escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def text(self, x: float, y: float, words: str, anchor: str = "start", more: str = "") -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {more}>{html.escape(words)}</text>'
        )

    def head(self, x: float, y: float, words: str) -> None:
        self.text(x, y, words, more='font-weight="bold"')

    def box(self, x: float, y: float, width: float, height: float, fill: str, words="") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
            f'stroke="{INK}"/>'
        )
        if words:
            self.text(x + width / 2, y + height / 2 + 5, words, "middle")

    def line(self, x1: float, y1: float, x2: float, y2: float, more: str = "") -> None:
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" {more}/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def legend(picture: Picture, x: float, y: float) -> None:
    """The meaning of the colours of a program's time."""
    for fill, words, width in (
        (MEMORY, "reads from memory", 150),
        (WAITS, "waits", 70),
        (CACHE, "reads again from the cache", 205),
        (WRITTEN, "writes", 60),
    ):
        picture.box(x, y, 16, 16, fill)
        picture.text(x + 22, y + 13, words)
        x += width + 28


def program(picture: Picture, y: float, begin: float, read: float, meet: float, rest: float):
    """The time of one program: it reads, waits, then reads again and writes in turns."""
    x = 150 + begin
    picture.box(x, y, read, 24, MEMORY)
    if x + read < meet:
        picture.box(x + read, y, meet - x - read, 24, WAITS)
    step = rest / 8
    for i in range(4):
        picture.box(meet + 2 * i * step, y, step, 24, CACHE)
        picture.box(meet + (2 * i + 1) * step, y, step, 24, WRITTEN)


def schedules() -> Picture:
    """The two schedules of `grpo`, for a short and a long row."""
    long = reading(V, HALF, together=True)
    assert reading(SHORT_V, HALF).parts == 1
    assert long.polls
    picture = Picture(880, 440, "Programs of a short row and of a long row over time")
    picture.head(20, 28, f"A row of up to {MAX_V_PER_PROGRAM:,} entries: one program")
    picture.text(20, 69, "program")
    program(picture, 52, 0, 240, 410, 320)
    picture.box(390, 52, 20, 24, "white")
    picture.line(400, 76, 400, 92)
    picture.text(400, 106, "log-prob, loss, coefficient of the row", "middle")
    picture.text(
        20, 134,
        f"{SHORT_V:,} entries of {HALF} bytes: {SHORT_V * HALF:,} bytes read, as many read again "
        "from the cache, as many written",
    )  # fmt: skip
    picture.line(20, 154, 860, 154, 'stroke-dasharray="2 4"')
    picture.head(20, 184, f"A longer row: {long.parts} programs that meet")
    starts = {1: (0, 150), 2: (20, 170), 3: (10, 160), long.parts: (60, 180)}
    for i, (number, (begin, read)) in enumerate(starts.items()):
        y = 204 + 34 * i + (20 if i == 3 else 0)
        picture.text(20, y + 17, f"program {number}")
        program(picture, y, begin, read, 410, 250)
    picture.text(60, 320, "...")
    picture.line(410, 196, 410, 358, 'stroke-width="2"')
    picture.text(410, 376, "all programs have read: each computes the same coefficient", "middle")
    picture.text(
        20, 402,
        f"{V:,} entries in {long.parts} parts of up to {long.columns:,}: {V * HALF:,} bytes read, as "
        "many read again, as many written",
    )  # fmt: skip
    legend(picture, 20, 414)
    return picture


def moved() -> list[tuple[str, traffic.Traffic, bool]]:
    """List operations with the bytes that they move, and whether the second read misses the cache."""
    fused = traffic.grpo(N, N, N, V, HALF)
    return [
        ("grpo: loss and gradient in one launch", fused, False),
        ("the same, half of the tokens masked", traffic.grpo(N, N // 2, N // 2, V, HALF), False),
        ("the same as the first, if the cache kept nothing", fused, True),
        ("two launches: log-probs, then their gradient", traffic.logprob(N, N, V, HALF), False),
    ]


def gigabytes(count: float) -> str:
    """A number of bytes in GB, 10^9 bytes."""
    return f"{count / 1e9:.2f} GB"


def bytes_moved() -> Picture:
    """The bytes that memory moves, by the formulas of benchmarks/measuring/traffic.py."""
    picture = Picture(880, 300, "Bytes moved between memory and the chip")
    picture.head(20, 28, f"Bytes that memory moves: {N:,} tokens x {V:,} entries of {HALF} bytes")
    scale = 500 / 15e9
    for i, (words, count, misses) in enumerate(moved()):
        y = 44 + 52 * i
        picture.text(20, y + 12, words)
        x = 20.0
        read = count.read + (count.reread if misses else 0)
        for fill, size in ((MEMORY, read), (WRITTEN, count.written)):
            picture.box(x, y + 18, size * scale, 22, fill, gigabytes(size))
            x += size * scale
        picture.text(x + 12, y + 34, f"{gigabytes(read + count.written)} in all")
    picture.box(20, 264, 16, 16, MEMORY)
    picture.text(42, 277, "read")
    picture.box(110, 264, 16, 16, WRITTEN)
    picture.text(132, 277, "written")
    return picture


def chunks() -> tuple[int, int]:
    """(rows of a chunk of the head, number of chunks) with float32 logits on an H100 or H200."""
    most = WORKSPACE_BYTES["cuda"] // (padded(V) * SINGLE)
    rows = chunk_rows(N, D, most, PROCESSORS)
    return rows, -(-N // rows)


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def head() -> Picture:
    """The head in chunks: one workspace, three matrix products for each chunk."""
    rows, count = chunks()
    picture = Picture(880, 400, "The head works on one chunk of tokens at a time")
    picture.head(20, 28, f"The head: {N:,} tokens in {count} chunks of up to {rows:,}")
    for i in range(count):
        picture.box(40, 60 + 44 * i, 70, 44, MEMORY if i == 1 else "white", f"chunk {i + 1}")
    picture.text(75, 52, "hidden states", "middle")
    picture.text(75, 60 + 44 * count + 18, f"{N:,} x {D:,}", "middle")
    picture.line(110, 126, 250, 126, 'stroke-width="2"')
    picture.text(180, 118, "1: h Wᵀ", "middle")
    picture.box(250, 104, 330, 44, WRITTEN, "logits, then their gradient over them")
    picture.text(415, 96, f"workspace: {rows:,} x {V:,}", "middle")
    picture.text(392, 168, "the kernel: log-prob, loss, coefficient, gradient", "middle")
    picture.line(580, 116, 690, 116, 'stroke-width="2"')
    picture.text(635, 108, "2: dz W", "middle")
    picture.box(690, 94, 150, 44, CACHE, "dh of the chunk")
    picture.line(550, 148, 690, 222, 'stroke-width="2"')
    picture.text(635, 176, "3: dzᵀ h")
    picture.box(690, 200, 150, 44, CACHE, "dW += ..., float32")
    picture.text(250, 218, "Then the next chunk takes")
    picture.text(250, 236, "the same workspace.")
    scale = 560 / (N * V * SINGLE)
    for i, (words, size) in enumerate(
        (
            ("all logits, float32", N * V * SINGLE),
            ("all logits, bfloat16", N * V * HALF),
            ("the workspace", rows * V * SINGLE),
        )
    ):
        y = 312 + 28 * i
        picture.text(20, y + 15, words)
        picture.box(170, y, size * scale, 20, WRITTEN if i == 2 else "white")
        picture.text(180 + size * scale, y + 15, mebibytes(size))
    return picture


PICTURES = {"grpo_schedules": schedules, "grpo_bytes": bytes_moved, "head_chunks": head}


def main(arguments: list[str]) -> int:
    """Write the pictures; with --check only compare them."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(f"arguments {arguments}: want none, or --check")
    for name, draw in PICTURES.items():
        path = ROOT / "docs" / f"{name}.svg"
        if not arguments:
            path.write_text(str(draw()))
        elif path.read_text() != str(draw()):
            raise SystemExit(
                f"docs/{path.name} is not up to date: run python docs/site/pictures.py"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
