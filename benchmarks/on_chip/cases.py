"""The launches of `kernels/on_chip.py` that `python -m benchmarks.codegen --on-chip` compiles.

They are not among those of `benchmarks.codegen`, whose published numbers are of the pinned Triton:
3.7 cannot compile this kernel.
"""

from functools import partial

import torch

from benchmarks.codegen.cases import launch_grpo
from grpo_fast.kernels import on_chip

TARGETS = ("sm_90", "sm_100")
_launch = partial(launch_grpo, launcher=on_chip.grpo_fwd_bwd)
CASES = {
    "grpo": partial(_launch, 152_064),
    "grpo fp16": partial(_launch, 152_064, torch.float16),
    "grpo entropy": partial(_launch, 152_064, returned=True),
    "grpo bonus extras": partial(_launch, 152_064, entropy=True, extras=True, packed=True),
    "grpo V 1000": partial(_launch, 1000, stride=1000),
    "grpo V 50304 bonus": partial(_launch, 50_304, entropy=True),
    "grpo V 262144 extras": partial(_launch, 262_144, extras=True),
}
