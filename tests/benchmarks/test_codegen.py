"""What the kernels compile to: no spills, and hot loops that do nothing but stream."""

import ast
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl

from benchmarks import ROOT
from benchmarks.codegen import cases as codegen_cases
from benchmarks.codegen import reports as codegen
from benchmarks.codegen import saved as compiled
from benchmarks.codegen.assembly import Instruction, offsets_of, read_loops
from tests.support import older_triton

# Of the main loops of the common path: instructions per element, as measured and 5 % more. A barrier, a
# narrow load or a conversion that comes back costs more. (gfx942 has none that rounds to bfloat16.)
INSTRUCTIONS = {
    "sm_80": {"read": 7.8, "write": 6.2},
    "sm_90": {"read": 7.9, "write": 6.2},
    "sm_100": {"read": 7.0, "write": 6.2},
    "gfx942": {"read": 7.2, "write": 10.3},
}
LOOPS = {
    "_logprob_fwd_kernel": {"read"},
    "_logprob_bwd_kernel": {"write", "zeros"},
    "_grpo_kernel": {"read", "write", "zeros"},
    "_scale_rows_kernel": {"scale"},
}

# Pointers to one number for each sequence, program or metric: 32 bits reach them all.
SHORT = {"rewards_ptr", "advantages_ptr", "combined_ptr", "labels_ptr", "weights_ptr"}
SHORT |= {"metrics_ptr", "partial_ptr", "statistics_ptr"}

by_target = pytest.mark.parametrize("target", codegen.TARGETS)
# One GPU of each vendor, and of the launches those that tests name, the first of each kernel and one in three
# of the others. All are compiled with --slow, and if the sources are not those of the saved numbers.
ALWAYS = ("sm_90", "gfx942")
SAME_LANES = {"grpo fp32": "logprob_fwd fp32 split", "grpo split": "logprob_fwd split"}
NAMED = {*codegen_cases.COMMON, "logprob_fwd", *SAME_LANES, *SAME_LANES.values()}


@pytest.fixture(scope="module")
def everything(pytestconfig):
    """Whether all launches are compiled for all targets."""
    saved = compiled.load()
    same = (saved["triton"], saved["sources"]) == (triton.__version__, compiled.digest())
    return not same or pytestconfig.getoption("--slow")


@pytest.fixture(scope="module")
def targets(everything):
    return tuple(codegen.TARGETS) if everything else ALWAYS


@pytest.fixture(scope="module")
def cases(everything):
    found = list(codegen_cases.CASES)
    if everything:
        return found
    first = {case.split()[0]: case for case in reversed(found)}  # of each kernel
    some = {*found[::3], *NAMED, *first.values()}
    some |= {codegen_cases.UNEVEN[case][0] for case in some & codegen_cases.UNEVEN.keys()}
    return [case for case in found if case in some]


@pytest.fixture(scope="module")
def all_reports(targets, cases):
    return codegen.collect(targets, jobs=min(2, os.cpu_count() or 1), cases=cases)


@pytest.fixture
def reports(all_reports, targets, target):
    if target not in targets:
        pytest.skip("the saved numbers of this GPU are of this code, and have their own test")
    return {x.case: x for x in all_reports if x.target == target}


@pytest.fixture
def streaming(reports):
    return {case: x for case, x in reports.items() if x.kernel in LOOPS}


@by_target
def test_every_case_is_compiled(reports, cases):
    assert reports.keys() == set(cases)
    assert LOOPS.keys() < {x.kernel for x in reports.values()}


def test_published_numbers_are_those_of_the_code(all_reports):
    published = compiled.load()
    if published["triton"] != triton.__version__:
        pytest.skip(f"published with triton {published['triton']}, here is {triton.__version__}")
    rows = [codegen.summary(x) for x in all_reports]
    here = {(x.target, x.case) for x in all_reports}
    known = [row for row in published["rows"] if (row["target"], row["case"]) in here]
    assert known == rows, "run python -m benchmarks.codegen --save, then benchmarks.report"


def test_triton_before_3_7_could_translate_every_launch():
    settings = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.older_triton"]
    found = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert not found.returncode, found.stdout + found.stderr
    assert found.stdout == f"{len(codegen_cases.CASES)} launches\n"


@pytest.mark.parametrize(
    "members, holds",
    [([None, 1.0], True), ([tl.constexpr(None)], True), ([tl.constexpr(0), 1.0], False)],
)
def test_tuples_that_hold_none(members, holds):
    value = tl.tuple([tl.constexpr(1)])
    value.values = members
    assert older_triton.holds_none(value) == holds
    assert not older_triton.holds_none(members)


def test_the_digest_sees_code_and_no_comments(tmp_path):
    (tmp_path / "kernels").mkdir()
    path, found = tmp_path / "kernels" / "grpo.py", []
    for text in ("x = 1\n", "x = 1  # one\n", "x = 2\n"):
        path.write_text(text)
        found.append(compiled.digest(tmp_path))
    assert found[0] == found[1] != found[2]


@by_target
def test_saved_numbers_are_as_they_should_be(target):
    """Whether or not this target is compiled here."""
    rows = {row["case"]: row for row in compiled.load()["rows"] if row["target"] == target}
    assert rows.keys() == codegen_cases.CASES.keys()
    for case, row in rows.items():
        assert row["stack"] == 0, case
        assert not row["per_element"] or row["bits"] == [128], case
        assert row["resident_programs"] >= 1, case
    for case in codegen_cases.COMMON:
        for kind, ceiling in INSTRUCTIONS[target].items():
            assert rows[case]["per_element"][kind] <= ceiling, (case, kind)


@by_target
def test_nothing_spills(reports):
    assert {case: x.stack for case, x in reports.items() if x.stack} == {}


@by_target
def test_row_loops_only_stream(streaming):
    for case, report in streaming.items():
        assert report.main_loops().keys() == LOOPS[report.kernel], case
        for loop in report.row_loops():
            # A gradient over its logits: no thread may write a tile before all have read it.
            barriers = int("overlap" in case and loop.kind == "write")
            assert (loop.barriers, loop.shuffles) == (barriers, 0), (case, loop)
            # One scalar for a tile of some thousand elements; the capped kernels on gfx942 alone need it.
            # The series of a cap above 64 has more numbers than gfx942 has scalar registers: 3 % of the loop.
            most = loop.instructions // 28 if "high" in case else "capped" in case
            assert loop.reloads <= most, (case, loop)


@by_target
def test_row_loops_move_16_bytes_at_once(streaming):
    """Whatever the vocabulary and the stride of the rows."""
    for case, report in streaming.items():
        for loop in report.row_loops():
            assert set(loop.loads + loop.stores) == {128}, (case, loop)


@by_target
def test_instructions_per_element(streaming, target):
    for case in codegen_cases.COMMON:
        loops = streaming[case].main_loops()
        for kind, ceiling in INSTRUCTIONS[target].items():
            assert loops[kind].per_element(streaming[case].itemsize) <= ceiling, (case, kind)


@by_target
def test_uneven_rows_take_no_more_instructions(streaming):
    uneven = {
        case: codegen_cases.UNEVEN[case][0] for case in streaming if case in codegen_cases.UNEVEN
    }
    assert uneven
    for case, even in uneven.items():
        found, wanted = (
            {
                k: x.per_element(streaming[name].itemsize)
                for k, x in streaming[name].main_loops().items()
            }
            for name in (case, even)
        )
        assert found.keys() == wanted.keys()
        for kind, ceiling in wanted.items():
            assert found[kind] <= 1.1 * ceiling, (case, kind)


@by_target
def test_enough_programs_are_resident(streaming, target):
    """While one program is between its loops, others must keep the memory busy: 4 have 64 registers a thread.

    On Blackwell ptxas takes more registers (it computes on pairs), which leaves 3. So does the entropy next
    to a mask and temperatures, or to float32 logits. Of programs with four times the threads one is as much
    as four.
    """
    at_least = 3 if target == "sm_100" else 4
    for case, report in streaming.items():
        words = ("entropy extras", "fp32 split entropy", "overlap entropy")
        expected = 3 if any(x in case for x in words) else at_least
        expected = -(-expected * 256 // report.threads) if report.threads > 256 else expected
        assert report.resident_programs() >= expected, (case, report.registers)


@by_target
def test_threads_of_a_program(streaming, target):
    """1,024 rewrite a long row of float32 with its gradient over it: measured to be faster on an H100."""
    more = ("grpo overlap", "grpo overlap 151665")
    for case, report in streaming.items():
        expected = 128 if "small" in case or "capped" in case else 256
        if case in more and target != "gfx942":
            expected = 1024
        assert report.threads == expected, case


ON_AN_H200 = """
from benchmarks.codegen import reports
report = reports.inspect("grpo split", "sm_90", registers=48)
loops = {kind: loop.per_element(report.itemsize) for kind, loop in report.main_loops().items()}
print([report.registers, report.resident_programs(), report.stack, loops])
"""


def test_five_programs_share_a_multiprocessor_of_an_h200():
    """Those of a row wait for each other. What they spill lies outside the loops over a row."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ON_AN_H200]
    done = subprocess.run(
        command, cwd=codegen.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    registers, programs, stack, loops = ast.literal_eval(done.stdout)
    assert (registers, programs) == (48, 5)
    assert stack <= 8
    for kind, most in INSTRUCTIONS["sm_90"].items():
        assert loops[kind] <= most


@by_target
def test_offsets_have_64_bits(reports):
    """Of every pointer, members of records included, but for those of vectors that stay short."""
    for case, report in reports.items():
        assert report.offsets, case
        narrow = {name: x for name, x in report.offsets.items() if x != ["i64"]}
        assert narrow.keys() <= SHORT, (case, narrow)
    assert {"targets", "tokens", "outputs"} < reports["grpo"].offsets.keys()


TTIR = """
  tt.func public @_kernel(%x_ptr: !tt.ptr<f32> loc("x"), %tokens: !tt.ptr<f32>, %tokens_0: !tt.ptr<i1>) {
    %a = tt.addptr %x_ptr, %row : !tt.ptr<f32>, i64 loc(#loc1)
    %b = tt.addptr %tokens_0, %row : !tt.ptr<i1>, i32 loc(#loc2)
    %all = tt.splat %tokens : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>> loc(#loc3)
    %c = tt.addptr %all, %rows : tensor<8x!tt.ptr<f32>>, tensor<8xi32> loc(#loc4)
    %d = tt.addptr %a, %column : !tt.ptr<f32>, i32 loc(#loc5)
  }
  tt.func private @_function(%x_ptr: !tt.ptr<f32>) {
    %a = tt.addptr %x_ptr, %row : !tt.ptr<f32>, i32 loc(#loc6)
  }
"""


def test_offsets_of_members_of_records_are_seen():
    """What is added to a pointer that the kernel made, or within a function, is a column's offset."""
    assert offsets_of(TTIR) == {"tokens": ["i32"], "tokens_0": ["i32"], "x_ptr": ["i64"]}


@by_target
def test_a_log_prob_that_is_nan_makes_the_loss_nan(reports):
    """As on the CPU. Hardware's minimum of NaN and 1 is 1; the interpreter's is NaN, and can't show it."""
    bounded = {"_policy_loss_kernel", "_sequence_loss_kernel"}
    hidden = {case: x.hide_nan for case, x in reports.items() if x.kernel in bounded}
    assert hidden
    assert {case: n for case, n in hidden.items() if n} == {}


@by_target
def test_the_scored_logit_is_read_by_all_before_it_is_overwritten(reports):
    """In place every thread loads the scored logit and one overwrites it: a barrier must stand between.

    Up to the log-prob both kernels are the same code, so that barrier is what one has more.
    """
    for grpo, logprob in (("grpo", "logprob_fwd"), ("grpo split", "logprob_fwd split")):
        assert reports[grpo].barriers > reports[logprob].barriers


@by_target
def test_lanes_are_added_up_in_the_same_order_side_by_side(reports):
    """What makes the log-probs of `grpo` and `logprob` the same bits, and no interpreter shows."""
    for grpo, logprob in SAME_LANES.items():
        assert len(reports[logprob].lanes) == 1
        assert reports[grpo].lanes == reports[logprob].lanes, (grpo, logprob)
    assert reports["grpo split"].lanes != reports["grpo fp32"].lanes


def test_every_launch_asks_for_fused_products_and_sums():
    """Triton 3.9 warns where nothing is asked, and 3.10 fuses on request only."""
    for case, launch in codegen_cases.CASES.items():
        assert codegen.record(launch).arguments["enable_fp_fusion"] is True, case


@pytest.mark.parametrize(
    ("given", "message"),
    {
        "sm90": "target 'sm90' is unknown; choose from sm_80",
        "--case=policy_loss_topr": "--case 'policy_loss_topr' is unknown; there are policy_loss topr",
        "--case=xyz": "--case 'xyz' is unknown; `CASES` in",
        "--save --case=grpo": "--save writes all targets and cases",
    }.items(),
)
def test_unknown_words_on_the_command_line(given, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["codegen", *given.split()])
    with pytest.raises(SystemExit):
        codegen.main()
    assert message in capsys.readouterr().err


def test_one_case_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["codegen", "sm_90", "--case", "logprob_fwd"])
    codegen.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 1
    assert rows[0].startswith("| sm_90 | logprob_fwd |")


def test_a_block_that_was_moved_out_of_line_is_no_loop():
    """LLVM puts rare loads behind the code that goes on with them; from there the way is back, once."""
    load, ret = Instruction("global_load_dword", None), Instruction("s_endpgm", None)
    rest = [".back", load, ret]
    once = [Instruction("s_cbranch_execnz", ".away"), *rest, ".away", load]
    assert read_loops([*once, Instruction("s_cbranch_execz", ".back"), ret]) == []
    again = [".top", load, Instruction("s_cbranch_execnz", ".top"), ret]
    (loop,) = read_loops(again)
    assert (loop.instructions, loop.loads) == (2, [32])
