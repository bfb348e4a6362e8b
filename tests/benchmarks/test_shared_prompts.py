"""The benchmark of shared prompts: what it counts, and that a wrong provider gets no number."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models are Hugging Face's")

from benchmarks.measuring import machine
from benchmarks.report import committed, document
from benchmarks.run import runner
from benchmarks.shared_prompt import models, rows, step

ROOT = Path(__file__).resolve().parents[2]
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # variables that would change it
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the models here are a CPU's")
OWN = [name for name in rows.OWN if name not in ("auto", "flex")]
ROOFS = {"bandwidth": {"copy": 1e10, "read": 1e10}, "gemm": {"float32": 1e11}}
SMALL = ["--model=tiny", "--prompt", "24", "--group", "3", "--completion", "5"]


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    monkeypatch.setenv(machine.COMMAND_VARIABLE, "a test")
    monkeypatch.setattr(machine, "calibration", lambda: ROOFS)  # measuring them takes seconds


@pytest.mark.parametrize("provider", OWN)
def test_providers_agree(provider):
    """The gradients of all parameters, also where the unshared batch is forwarded in parts."""
    model = models.build("tiny")
    given = step.inputs(step.Size(24, 3, 5), 512)
    found = []
    for who, most in (("unshared", 3), (provider, 2)):
        model.zero_grad()
        loss = step.update(model, given, who, most)
        found.append((loss, [x.grad for x in model.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)


def test_a_wrong_provider_gets_no_number(tmp_path, monkeypatch):
    right = step.update
    monkeypatch.setattr(
        step, "update", lambda *x: right(*x) * (1.01 if x[2] == "fork" else 1), raising=True
    )
    monkeypatch.setattr(rows.step, "update", step.update)
    out = tmp_path / "out.json"
    code = rows.main([*SMALL, "--providers", "unshared", "fork", "mask", "flex", f"--out={out}"])
    assert code == 1
    found = json.loads(out.read_text())
    assert [row["provider"] for row in found["shared_prompt"]] == ["unshared", "mask"]
    absent = found["machine_info"]["absent"]
    assert absent["tiny 24x3x5, fork"].startswith("wrong result: loss ")
    assert absent["tiny 24x3x5, flex"].startswith("it needs attn_implementation='flex_attention'")
    assert rows.own_failures(found) == ["tiny 24x3x5, fork"]
    piece = next(x for x in runner.plan(tmp_path, "c") if x.module == runner.SHARED)
    piece.results.write_text(out.read_text())
    assert runner._rows_failed(piece)


def test_memory_of_the_unshared_update_is_that_of_one_part(monkeypatch):
    model, seen = models.build("tiny"), []
    monkeypatch.setattr(step, "update", lambda model, given, *_: seen.append(given))
    given = step.inputs(step.Size(24, 3, 5), 512)
    for provider in ("unshared", "fork"):
        rows._peak(model, given, provider, 2)
    assert [len(x.completions) for x in seen] == [2, 3]
    assert seen[0].completions.equal(given.completions[:2])
    assert seen[0].plan.given == (2, 5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is set")
def test_freed_memory_is_kept():
    """256 MiB stay that are freed within `kept`, and go before and after it, in any blocks.

    In a process of its own: what other tests have freed, and `malloc_trim` has emptied, serves a
    large block before the system does, and its pages stay.
    """
    code = (
        "import json, torch\n"
        "from benchmarks.measuring import memory\n"
        "def left(allocate):\n"
        "    before = memory._status('VmRSS')\n"
        "    allocated = allocate()\n"
        "    del allocated\n"
        "    return memory._status('VmRSS') - before\n"
        "above = []\n"
        "def block(mib=256):\n"
        "    made = torch.ones(mib << 18)\n"
        # Behind it in the heap, if it is there: what is freed at the heap's end is given back in any case.
        "    above.extend(bytearray(100 << 10) for _ in range(64))\n"
        "    return made\n"
        "small = lambda: [bytearray(64 << 10) for _ in range(4096)]\n"
        "gone, stay = [left(block), left(small)], []\n"
        "with memory.kept():\n"
        "    pass\n"
        "gone += [left(block), left(small)]\n"
        "with memory.kept():\n"
        "    stay += [left(small), left(lambda: block(512))]\n"
        "    gone += [left(lambda: block(384))]\n"  # the same memory again
        "print(json.dumps([gone, stay]))\n"
    )
    environment = {name: x for name, x in os.environ.items() if not name.startswith(ALLOCATOR)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    gone, stay = ([x >> 20 for x in found] for found in json.loads(ran.stdout))
    assert min(stay) > 128, (gone, stay)
    assert max(gone) < 32, (gone, stay)


def test_what_is_counted():
    """The operations of a small Llama by hand: weights and pairs of tokens of each layer, and the head."""
    model = models.build("tiny")
    size = step.Size(P=10, G=4, R=6)
    assert size.tokens == (64, 34)
    weights = sum(x.numel() for x in model.model.layers.parameters()) + 48  # and the last norm
    pairs = [4 * (6 * 10 + 6 * 6 / 2) + 10 * 10 / 2 * prompts for prompts in (4, 1)]
    for shared in (False, True):
        attention = 12 * pairs[shared] * 48 * 2
        want = 6 * weights * size.tokens[shared] + attention + 6 * 512 * 48 * 24
        assert step.flops(model, size, shared) == pytest.approx(want)


def test_the_report(tmp_path, monkeypatch):
    folder = tmp_path / "machine"
    out = folder / "measured.json"
    case = [*SMALL[:3], "--group", "3", "4", "5", "--completion", "5", "--tokens", "64"]
    assert rows.main([*case, "--providers", "unshared", "auto", f"--out={out}"]) == 0
    known = json.loads(out.read_text())
    out.unlink()
    measured = [row | {"model": "invented"} for row in known["shared_prompt"]]
    for day, commit, groups in (("1", "19274bf", (3, 4)), ("2", "a1b2c3d", (4, 5))):
        known["shared_prompt"] = [row for row in measured if row["G"] in groups]
        known["machine_info"] |= {"commit": commit, "dirty": False}
        known["datetime"] = f"2026-01-0{day}T00:00:00"
        (folder / f"{commit}.json").write_text(json.dumps(known))
    (found,) = committed.shared_prompts(tmp_path)
    assert len(found["shared_prompt"]) == 6
    text = document.render(tmp_path)
    assert "#### An update with shared prompts (invented, float32)" in text
    lines = [line for line in text.splitlines() if "| auto (" in line]
    assert [[x.strip() for x in line.split("|")[1:4]] for line in lines] == [
        ["24", "3", "5"],
        ["24", "4", "5"],
        ["24", "5", "5"],
    ]
    commits = [line.split("|")[-2].strip() for line in lines]
    assert commits == ["19274bf", "a1b2c3d", "a1b2c3d"]  # of each case the newest
    assert "Commit 19274bf, 2026-01-01" in text
    assert all(f"in {n} parts" in line for n, line in zip((2, 2, 3), lines, strict=True))


def test_the_command_is_written_without_its_file():
    given = ["--model", "tiny", "--out", "/a/b.json", "--prompt", "4", "--out=c.json"]
    assert rows._command(given) == "python -m benchmarks.shared_prompt --model tiny --prompt 4"


def test_a_run_without_an_option_is_for_this_machine(tmp_path):
    piece = next(x for x in runner.plan(tmp_path, "c") if x.module == runner.SHARED)
    assert "--model" not in " ".join(piece.arguments)
    assert rows.main([*SMALL[1:], "--providers", "unshared"]) == 0
