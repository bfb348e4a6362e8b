"""What the kernels compile to, on GPUs that need not be there.

The launchers run on tensors without storage (device "meta"), and each launch is compiled with the
specialisation that Triton would choose at run time; then the assembly is read.

    python -m benchmarks.codegen [--save] [--json] [sm_80 sm_90 sm_100 gfx942]

`--save` writes `codegen.json`, from which RESULTS.md and the cost model take their numbers.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import compiled
from benchmarks.assembly import (
    Loop,
    count_barriers,
    lane_orders,
    read_amd,
    read_loops,
    read_nvidia,
)
from benchmarks.launches import compile_launch, record
from grpo_fast.kernels import (
    group_advantage,
    grpo,
    linear_grpo,
    linear_logprob,
    logprob,
    policy_loss,
    reduction_weights,
    schedules,
    sequence_loss,
)
from grpo_fast.objective import KL, Objective, Surrogate

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one launch compiles to."""

    case: str
    kernel: str
    target: str
    itemsize: int
    threads: int
    registers: int
    stack: int  # bytes, where registers spill to
    shared: int
    barriers: int
    loops: list[Loop]
    offsets: dict[str, list[str]]  # pointer argument -> types of the offsets added to it
    hide_nan: int  # minima and maxima that return the other operand
    lanes: list[str]  # in which orders the lanes of a tile are added up

    def row_loops(self) -> list[Loop]:
        return [loop for loop in self.loops if loop.kind != "other"]

    def main_loops(self) -> dict[str, Loop]:
        """By kind, the loop that moves most at once: the others see to what is left over."""
        return {
            loop.kind: loop
            for loop in sorted(self.row_loops(), key=lambda loop: sum(loop.loads + loop.stores))
        }

    def resident_programs(self) -> int:
        """How many programs the register file of a multiprocessor (a compute unit) holds."""
        if self.target.startswith("gfx"):
            return 512 // (-(-self.registers // 8) * 8) * 256 // self.threads
        return 65_536 // (-(-self.registers // 8) * 8 * self.threads)


B, T_LEN = 4, 16
N = B * T_LEN
V_SMALL, V_ROW, V_SPLIT = 1024, 32_768, 152_064  # one per schedule
CAP = (30.0, 0.5)  # softcap, logit_scale


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tokens(given: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    return tensor(N, dtype=dtype) if given else None


def logits(V: int, dtype: torch.dtype) -> torch.Tensor:
    padded = triton.cdiv(V, 16) * 16  # Triton knows a stride as aligned if 16 divides it
    return tensor(B, T_LEN, padded, dtype=dtype)[..., :V]


def launch_logprob_fwd(
    V: int = V_ROW,
    dtype: torch.dtype = torch.bfloat16,
    entropy: bool = False,
    extras: bool = False,
    cap: tuple[float, ...] = (),
) -> None:
    logprob.logprob_fwd(
        logits(V, dtype),
        tokens(dtype=torch.int64),
        tokens(extras, torch.bool),
        tokens(extras),
        1.0,
        entropy,
        *cap,
    )


def launch_logprob_bwd(
    V: int = V_ROW,
    dtype: torch.dtype = torch.bfloat16,
    entropy: bool = False,
    extras: bool = False,
    cap: tuple[float, ...] = (),
) -> None:
    x = logits(V, dtype)
    logprob.logprob_bwd(
        tokens(),
        tokens(entropy),
        x,
        tokens(dtype=torch.int64),
        tokens(extras, torch.bool),
        tokens(extras),
        1.0,
        tokens(),
        tokens(entropy),
        tokens(),
        tokens(),
        x,
        *cap,
    )


def launch_grpo(
    V: int = V_ROW,
    dtype: torch.dtype = torch.bfloat16,
    entropy: bool = False,
    rewards: bool = False,
    packed: bool = False,
    extras: bool = False,
    objective: Objective | None = None,
    out: torch.dtype | None = None,
    cap: tuple[float, ...] = (),
) -> None:
    x = logits(V, dtype)
    grpo.grpo_fwd_bwd(
        x,
        tokens(dtype=torch.int64),
        tokens(dtype=torch.bool),
        tokens(),
        tokens(not rewards),
        tensor(B) if rewards else None,
        2,
        tokens(packed, torch.int64),
        tokens(),
        tokens(),
        tokens(extras),
        tokens(extras),
        tokens(extras),
        tokens(extras),
        tokens(extras),
        1.0,
        False,
        objective or Objective(beta=0.04, entropy_coef=0.01 if entropy else 0.0),
        x if out is None else logits(V, out),
        *cap,
    )


def launch_scale_rows(V: int = V_ROW, dtype: torch.dtype = torch.bfloat16) -> None:
    grpo.scale_rows(tensor().expand(N), logits(V, dtype))


def launch_scale(dtype: torch.dtype | None = None) -> None:
    x = tensor(152_064, 3584)
    linear_grpo.scale(x, tensor(), x if dtype is None else tensor(*x.shape, dtype=dtype))


def launch_weigh_rows() -> None:
    x = tensor(N, 3584, dtype=torch.bfloat16)
    linear_logprob.weigh_rows(x, tensor(N), tensor(N, 3584, dtype=torch.bfloat16))


def launch_policy_loss(extras: bool = True, objective: Objective | None = None) -> None:
    policy_loss.policy_loss_fwd(
        tokens(),
        tokens(extras, torch.bool),
        tokens(),
        tokens(),
        tokens(extras),
        tokens(extras),
        tokens(extras),
        tokens(extras),
        objective or Objective(beta=0.04),
    )


def launch_sequence_loss(objective: Objective, packed: bool) -> None:
    sequence_loss.sequence_loss_fwd(
        tokens(),
        tokens(dtype=torch.bool),
        *(tokens() for _ in range(7)),
        None,
        tensor(B + 1, dtype=torch.int64) if packed else None,
        T_LEN,
        objective,
    )


def launch_token_statistics(extras: bool = True) -> None:
    policy_loss.token_statistics_fwd(
        tokens(extras, torch.bool),
        None,
        tokens(),
        tokens(),
        tokens(extras),
        tokens(extras),
        tokens(extras),
        tokens(extras),
        tokens(dtype=torch.int8),
    )


def launch_reduction_weights(reduction: str = "sequence_mean", packed: bool = False) -> None:
    like = tensor(N) if packed else tensor(B, T_LEN)
    boundaries = tensor(B + 1, dtype=torch.int32) if packed else None
    flags, mask = tokens(dtype=torch.bool), tokens(not packed, torch.bfloat16)
    rest = (tensor(dtype=torch.int64) if packed else None, tensor(), reduction, 0, not packed)
    reduction_weights.reduction_weights_fwd(like, flags, mask, tokens(), boundaries, *rest)


def launch_group_advantage(scale: str = "group", labels: bool = False) -> None:
    group_advantage.group_advantage_fwd(
        tensor(256), 16, tensor(256, dtype=torch.int64) if labels else None, scale, 1e-4, True
    )


def launch_group_advantage_variants(labels: bool = False) -> None:
    group_advantage.group_advantage_fwd(
        *(tensor(256), 16, tensor(256, dtype=torch.int64) if labels else None),
        *("group", 1e-4, True, True, True, True),
    )


def launch_combine_rewards(normalize: bool, labels: bool = False) -> None:
    ids = tensor(256, dtype=torch.int64) if labels else None
    group_advantage.combine_rewards_fwd(
        *(tensor(256, 3), tensor(3), 16, ids, normalize, "group", 1e-4, True, True, labels)
    )


# Every surrogate and every KL estimator once; each is a compile-time choice of the same kernels.
OBJECTIVES = {
    **{x: Objective(surrogate=x, beta=0.04) for x in get_args(Surrogate)},
    **{x: Objective(kl=x, beta=0.04) for x in get_args(KL) if x != "k3"},
    "k3+": Objective(beta=0.04, kl_gradient="k2"),
    "k3 where not clamped": Objective(beta=0.04, kl_value_clip=10.0, kl_gradient="k2_clipped"),
    **{
        f"{x} ratio": Objective(surrogate=x, beta=0.04, dppo_value="ratio")
        for x in ("dppo_tv", "dppo_kl")
    },
}
BY_TOKEN = {x: o for x, o in OBJECTIVES.items() if not o.needs_sequences and x != "clip"}
BY_SEQUENCE = {
    "gspo": Objective(ratio="sequence", beta=0.04, kl="k3_unbiased"),
    "gspo_token": Objective(ratio="sequence_token", beta=0.04),
    "off_policy_mask": Objective(off_policy_threshold=0.1, beta=0.04),
    **{x: o for x, o in OBJECTIVES.items() if o.needs_sequences},
}
# Clip, k3, old and reference log-probs, bfloat16: what most runs launch.
COMMON = ("grpo", "grpo split")
CASES: dict[str, Callable[[], None]] = {
    "logprob_fwd": launch_logprob_fwd,
    "logprob_fwd entropy": partial(launch_logprob_fwd, entropy=True),
    "logprob_fwd split": partial(launch_logprob_fwd, V_SPLIT),
    "logprob_fwd split entropy extras": partial(
        launch_logprob_fwd, V_SPLIT, entropy=True, extras=True
    ),
    "logprob_fwd fp32 split": partial(launch_logprob_fwd, V_SPLIT, torch.float32),
    "logprob_bwd": launch_logprob_bwd,
    "logprob_bwd entropy": partial(launch_logprob_bwd, entropy=True),
    "logprob_bwd split entropy extras": partial(
        launch_logprob_bwd, V_SPLIT, entropy=True, extras=True
    ),
    "grpo": launch_grpo,
    "grpo split": partial(launch_grpo, V_SPLIT),
    "grpo entropy": partial(launch_grpo, entropy=True),
    "grpo split entropy extras": partial(launch_grpo, V_SPLIT, entropy=True, extras=True),
    "grpo small": partial(launch_grpo, V_SMALL),
    "grpo padded": partial(launch_grpo, 50_257),
    "grpo rewards": partial(launch_grpo, rewards=True),
    "grpo rewards packed": partial(launch_grpo, V_SPLIT, rewards=True, packed=True),
    "grpo fp16": partial(launch_grpo, V_SPLIT, torch.float16),
    "grpo fp32": partial(launch_grpo, V_SPLIT, torch.float32),
    "grpo fp32 split entropy": partial(launch_grpo, V_SPLIT, torch.float32, entropy=True),
    "grpo fp32 entropy": partial(launch_grpo, V_ROW, torch.float32, entropy=True),
    "grpo fp32 to bf16": partial(launch_grpo, V_SPLIT, torch.float32, out=torch.bfloat16),
    "grpo capped": partial(launch_grpo, V_SPLIT, torch.float32, out=torch.bfloat16, cap=CAP),
    "grpo capped entropy": partial(launch_grpo, entropy=True, cap=CAP),
    "logprob_fwd capped": partial(launch_logprob_fwd, V_SPLIT, torch.float32, cap=CAP),
    "logprob_bwd capped": partial(launch_logprob_bwd, V_SPLIT, entropy=True, cap=CAP),
    **{f"grpo {name}": partial(launch_grpo, objective=x) for name, x in BY_TOKEN.items()},
    "scale_rows": launch_scale_rows,
    "scale_rows split fp32": partial(launch_scale_rows, V_SPLIT, torch.float32),
    "linear_grpo scale": launch_scale,
    "linear_grpo scale to bf16": partial(launch_scale, torch.bfloat16),
    "linear_logprob weigh_rows": launch_weigh_rows,
    "policy_loss": launch_policy_loss,
    "policy_loss bare": partial(launch_policy_loss, extras=False),
    **{
        f"policy_loss {name}": partial(launch_policy_loss, objective=x)
        for name, x in BY_TOKEN.items()
    },
    **{
        f"sequence_loss {name}": partial(launch_sequence_loss, x, packed=name == "gspo")
        for name, x in BY_SEQUENCE.items()
    },
    "token_statistics": launch_token_statistics,
    "token_statistics bare": partial(launch_token_statistics, extras=False),
    "reduction_weights": launch_reduction_weights,
    "reduction_weights packed": partial(launch_reduction_weights, "token_mean", packed=True),
    "group_advantage": launch_group_advantage,
    "group_advantage labels": partial(launch_group_advantage, labels=True),
    "group_advantage batch": partial(launch_group_advantage, "batch"),
    "group_advantage none": partial(launch_group_advantage, "none"),
    "group_advantage variants": launch_group_advantage_variants,
    "group_advantage variants labels": partial(launch_group_advantage_variants, labels=True),
    "combine_rewards": partial(launch_combine_rewards, False),
    "combine_rewards normalize": partial(launch_combine_rewards, True),
    "combine_rewards normalize labels": partial(launch_combine_rewards, True, labels=True),
}


def inspect(case: str, target: str) -> Report:
    gpu = TARGETS[target]
    with mock.patch.object(schedules, "WARP_SIZE", gpu.warp_size):
        launch = record(CASES[case])
    kernel = compile_launch(launch, gpu)
    registers, stack, listing = (read_nvidia if gpu.backend == "cuda" else read_amd)(kernel)
    offsets = collections.defaultdict(set)
    for name, kind in re.findall(
        r"tt\.addptr %(\w+_ptr), %\w+ : !tt\.ptr<\w+>, (i\d+)", kernel.asm["ttir"]
    ):
        offsets[name].add(kind)
    big = launch.arguments.get("logits_ptr", launch.arguments.get("x_ptr"))
    return Report(
        case=case,
        kernel=launch.fn.__name__,
        target=target,
        itemsize=4 if big is None else big.element_size(),
        threads=launch.arguments["num_warps"] * gpu.warp_size,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        barriers=count_barriers(listing),
        loops=[] if big is None else read_loops(listing),
        offsets={name: sorted(kinds) for name, kinds in sorted(offsets.items())},
        lanes=lane_orders(kernel.asm["ttgir"], launch.arguments.get("T", 0)),
        hide_nan=len(re.findall(r"arith\.(?:min|max)numf", kernel.asm["ttir"])),
    )


def collect(targets: Iterable[str] = TARGETS, jobs: int = 2) -> list[Report]:
    """Reports of all cases on all targets, compiled in processes that do not interpret Triton."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(target: str) -> list[Report]:
        command = [sys.executable, "-m", "benchmarks.codegen", "--json", target]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return [
            Report(**{**x, "loops": [Loop(**loop) for loop in x["loops"]]})
            for x in json.loads(done.stdout)
        ]

    with ThreadPoolExecutor(jobs) as pool:
        return [report for reports in pool.map(run, targets) for report in reports]


def summary(report: Report) -> dict[str, Any]:
    """A report in the numbers that are published."""
    loops = report.main_loops()
    return {
        "target": report.target,
        "case": report.case,
        "registers": report.registers,
        "resident_programs": report.resident_programs(),
        "stack": report.stack,
        "shared": report.shared,
        "barriers": report.barriers,
        "per_element": {k: round(x.per_element(report.itemsize), 2) for k, x in loops.items()},
        "bits": sorted({b for x in loops.values() for b in x.loads + x.stores}),
    }


def save(reports: list[Report], path: Path = compiled.SAVED) -> None:
    rows = ",\n".join(json.dumps(summary(x)) for x in reports)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{rows}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", help="all by default")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--save", action="store_true", help=f"write {compiled.SAVED.name}")
    args = parser.parse_args()
    targets = args.targets or list(TARGETS)
    if args.json:
        reports = [inspect(case, target) for target in targets for case in CASES]
        json.dump([dataclasses.asdict(x) for x in reports], sys.stdout)
    else:
        reports = collect(targets)
        print(compiled.table(map(summary, reports)))
        if args.save:
            save(reports)


if __name__ == "__main__":
    main()
