"""The command `grpo-fast doctor`: its arguments, its report and its exit status."""

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import grpo_fast
from grpo_fast.doctor import check, machine, paths
from grpo_fast.doctor.combinations import OF_BENCHMARKS, Finding, diagnose
from grpo_fast.integrations.shared.packages import is_between
from grpo_fast.notices import VARIABLES
from grpo_fast.torch_kernels import compiled

OTHERS = {
    "CC": "the C compiler that Triton calls",
    "CUDA_VISIBLE_DEVICES": "the GPUs that PyTorch sees",
    "TRITON_INTERPRET": "1: Triton's interpreter runs the kernels, on CPU tensors, too",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine this machine, print the report, and return the exit status.

    0: all is right. 1: the self-check or an operator failed, or there is a known bad combination of severity
    "error". 2: an argument cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="grpo-fast doctor",
        description="what is installed, which path each operator takes and why, whether it is right",
        epilog="exit status: 0: right; 1: something failed, or an error was found; 2: a wrong argument",
        allow_abbrev=False,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--no-check", action="store_true", help="leave out the self-check")
    parser.add_argument(
        "--seconds", type=float, default=check.SECONDS, metavar="N",
        help=f"limit of the self-check (default: {check.SECONDS:g})",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.seconds < float("inf"):
        parser.error(f"--seconds {chosen.seconds}: want a positive number")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
    if chosen.json is not None and not chosen.json.expanduser().absolute().parent.is_dir():
        parser.error(f"--json {chosen.json}: there is no such folder")
    if chosen.json is not None:
        try:  # before the work; an old file stays as it is until there is a new report
            chosen.json.expanduser().open("a").close()
        except OSError as error:
            parser.error(f"--json {chosen.json}: {error.strerror or error}")
    found = report(chosen.device, None if chosen.no_check else chosen.seconds)
    print(text(found))
    if chosen.json is not None:
        chosen.json.expanduser().write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["right"] else 1


def report(device: str | None = None, seconds: float | None = check.SECONDS) -> dict[str, Any]:
    """Examine this machine: everything that the command prints, as JSON has it.

    Args:
        device: "cpu" or "cuda"; default: cuda if there is one.
        seconds: limit of the self-check; None leaves it out.
    """
    here = machine.examine()
    findings = diagnose(here)
    where = torch.device(device or ("cuda" if here.gpus else "cpu"))
    ran = paths.paths(where)
    checked = [] if seconds is None else check.check(where, seconds)
    wrong = [x for x in checked if x.right is False]
    errors = [x for x in findings if x.severity == "error"]
    return {
        "right": not wrong and not errors and not any(x.error for x in ran),
        "version": grpo_fast.__version__,
        "source": here.source,
        "python": machine.python(),
        "system": here.system,
        "torch": f"{torch.__version__}, built for {here.build}",
        "packages": {
            name: _package(name, x, here.checkouts.get(name)) for name, x in here.versions.items()
        },
        "gpus": [
            f"{x.name}, compute capability {x.capability[0]}.{x.capability[1]}, {x.memory / 2**30:.0f} GiB"
            for x in here.gpus
        ],
        "gpu_error": here.gpu_error,
        "driver": _driver(here),
        "compiler": here.compiler,
        "compiled_on_a_cpu": _compiled(),
        "variables": {name: _variable(name, x) for name, x in here.variables.items()},
        "device": str(where),
        "paths": [x._asdict() for x in ran],
        "check": [x._asdict() for x in checked],
        "combinations": [x._asdict() for x in findings],
    }


def _compiled() -> str:
    """Return which calls are compiled on a CPU; with a wrong switch, none runs at all."""
    try:
        return compiled.summary()
    except ValueError as error:
        return f"nothing ({error})"


def _driver(here: machine.Machine) -> str:
    """Return the version of NVIDIA's driver, or why there is none."""
    if not here.driver and here.gpus and here.build.startswith("CUDA"):
        return f"unknown: {machine.DRIVER} does not exist, as in some containers"
    return here.driver or "no NVIDIA driver"


def _package(name: str, version: str | None, checkout: str | None = None) -> str:
    """Return the version of a package, and whether it is supported."""
    at_least, below = machine.RANGES[name]
    wanted = f">={at_least}" + (f",<{below}" if below else "") if at_least else "any version"
    if version is None and checkout:
        return f"of an unknown version, from {checkout} (supported: {wanted})"
    if version is None:
        return f"not installed (supported: {wanted})"
    fits = at_least is None or is_between(version, at_least, below)
    return f"{version} ({'supported' if fits else 'NOT SUPPORTED'}: {wanted})"


def _variable(name: str, value: str) -> str:
    """Return the value of a variable, and what it does."""
    meaning = VARIABLES[name][1] if name in VARIABLES else OTHERS.get(name)
    if meaning is None:
        meaning = "of benchmarks/" if name in OF_BENCHMARKS else "UNKNOWN: nothing reads it"
    return f"{value} ({meaning})"


def text(found: dict[str, Any]) -> str:
    """Return the report as plain text."""
    lines = ["installed", f"  grpo-fast {found['version']}, from {found['source']}"]
    lines += [f"  Python {found['python']}", f"  {found['system']}", f"  torch {found['torch']}"]
    lines += [f"  {name} {x}" for name, x in found["packages"].items() if name != "torch"]
    none = found["gpu_error"] or "PyTorch sees none"
    lines += [f"  GPU: {x}" for x in found["gpus"]] or _wrapped(f"GPU: {none}")
    lines += [f"  driver: {found['driver']}"]
    lines += [f"  C compiler: {found['compiler'] or 'none'}"]
    lines += _wrapped(f"compiled on a CPU: {found['compiled_on_a_cpu']}")
    lines += [f"  {name}={x}" for name, x in found["variables"].items()]
    lines += ["", f"paths on {found['device']}"]
    for x in found["paths"]:
        compiled = f"; compiled: {x['compiled']}" if x["compiled"] else ""
        given = f"{x['given']}: " if x["given"] else ""
        failed = f"FAILED: {x['error']}" if x["error"] else ""
        lines += _wrapped(f"{x['operator']}: {given}{x['ran']}{compiled}{failed}")
        lines += [y for message in x["fallbacks"] for y in _wrapped(f"FALLBACK: {message}", 4)]
    lines += ["", _headline(found["check"])]
    lines += [y for x in found["check"] for y in _result(x)]
    findings = [Finding(**x) for x in found["combinations"]]
    lines += ["", "known bad combinations" + ("" if findings else ": none")]
    for one in findings:
        lines += _wrapped(f"{one.severity} {one.name}: {one.found}. {one.consequence} {one.cure}")
    return "\n".join([*lines, "", _verdict(found)])


def _verdict(found: dict[str, Any]) -> str:
    if not found["right"]:
        return "NOT RIGHT: see above"
    late = sum(x["right"] is None for x in found["check"])
    if not found["check"] or late:
        return (
            "nothing wrong was found, but "
            + (f"{late} checks" if late else "the check")
            + " did not run"
        )
    return "all is right"


def _headline(checked: list[dict[str, Any]]) -> str:
    if not checked:
        return "self-check: left out"
    ran = [x for x in checked if x["right"] is not None]
    right, seconds = sum(bool(x["right"]) for x in ran), sum(x["seconds"] for x in ran)
    return (
        f"self-check against float64: {right} of {len(ran)} right, in {seconds:.1f} s\n"
        "  (the number is the error as a share of what is allowed, twice that of plain PyTorch plus 1e-5)"
    )


def _result(x: dict[str, Any]) -> list[str]:
    if x["right"] is None:
        return [f"  -     {x['name']}, {x['dtype']}: {x['detail']}"]
    share = "-   " if x["share"] is None else f"{x['share']:.2f}"
    line = f"  {'right' if x['right'] else 'WRONG'} {share} {x['name']}, {x['dtype']}"
    return [line] if x["right"] else [line, *_wrapped(x["detail"], 8)]


def _wrapped(line: str, indent: int = 2) -> list[str]:
    """Break a line after at most 100 columns, with the rest indented."""
    return textwrap.wrap(
        line, 100, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
