"""Run this project's kernels on a case, in a process that Triton interprets.

TRITON_INTERPRET=1 GRPO_FAST_BACKEND=triton python -m benchmarks.real_model.interpreted CASE RESULTS
"""

import sys

import torch

from benchmarks.real_model import accuracy
from grpo_fast.ops.backend import use_triton


def main() -> None:
    there, back = sys.argv[1:]
    case = accuracy.Case(*torch.load(there))
    if not use_triton(case.hidden):
        raise RuntimeError(
            "the kernels do not run: want TRITON_INTERPRET=1, GRPO_FAST_BACKEND=triton"
        )
    torch.save(accuracy.results_of(accuracy.OWN, case), back)


if __name__ == "__main__":
    main()
