"""What Triton before 3.7 cannot compile, found with the Triton that is installed.

    python -m tests.support.older_triton

Up to Triton 3.6, a tuple that has None among its members can neither be compared with None nor be returned by
a function. Each launch of `codegen` is translated, no further than to Triton's own representation, and what
would fail there is printed.
"""

import sys
from unittest import mock

import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.compiler.code_generator import CodeGenerator

from benchmarks.codegen import launches
from benchmarks.codegen.cases import CASES
from benchmarks.codegen.reports import TARGETS


class TranslatedError(Exception):
    """The first stage is over; the others would find nothing else."""


def holds_none(value: object) -> bool:
    """Tell whether a value in a kernel is a tuple that has None among its members."""
    members = getattr(value, "values", ()) if isinstance(value, tl.tuple) else ()
    return any(x is None or (isinstance(x, tl.constexpr) and x.value is None) for x in members)


def translate(case: str) -> list[str]:
    """Translate a launch; return what an older Triton could not."""
    found = []
    visit_compare, call, make_ir = (
        CodeGenerator.visit_Compare,
        CodeGenerator.call_JitFunction,
        ASTSource.make_ir,
    )

    def compared(self, node):
        for side in (node.left, *node.comparators):
            name = getattr(side, "id", None)
            if name in self.lscope and holds_none(self.lscope[name]):
                found.append(f"{case}: {name} holds None, and is compared")
        return visit_compare(self, node)

    def called(self, fn, *args, **kwargs):
        result = call(self, fn, *args, **kwargs)
        if holds_none(result):
            found.append(f"{case}: {fn.__name__} returns a tuple that holds None")
        return result

    def translated(self, *args, **kwargs):
        make_ir(self, *args, **kwargs)
        raise TranslatedError

    with (
        mock.patch.object(CodeGenerator, "visit_Compare", compared),
        mock.patch.object(CodeGenerator, "call_JitFunction", called),
        mock.patch.object(ASTSource, "make_ir", translated),
    ):
        try:
            launches.compile_launch(launches.record(CASES[case]), TARGETS["sm_90"])
        except TranslatedError:
            return found
    raise AssertionError(f"{case}: not translated")


def main() -> int:
    triton.knobs.compilation.always_compile = True
    lines = [line for case in CASES for line in translate(case)]
    print("\n".join([*dict.fromkeys(lines), f"{len(CASES)} launches"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
