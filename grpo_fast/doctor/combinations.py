"""Known bad combinations of versions, hardware and switches, each with a name."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from grpo_fast.doctor.machine import RANGES, Machine
from grpo_fast.integrations.shared.packages import is_between
from grpo_fast.notices import VARIABLES

# Variables of the programs in benchmarks/, which are not installed.
OF_BENCHMARKS = {
    f"GRPO_FAST_{name}" for name in ("CALIBRATION", "COMMAND", "COMMIT", "FAILURES", "LIMIT")
}
MIXED = "2.10"  # PyTorch multiplies and adds halves into float32 from here on, under ROCm, too


class Combination(NamedTuple):
    """A combination that is known to be bad.

    Attributes:
        name: what people call it.
        severity: "error": something fails; "warning": slower than possible, or a part cannot be used.
        found: says what was found, or None where the machine does not have the combination.
        consequence: what happens then.
        cure: what to do.
    """

    name: str
    severity: Literal["error", "warning"]
    found: Callable[[Machine], str | None]
    consequence: str
    cure: str


class Finding(NamedTuple):
    """A bad combination that a machine has."""

    name: str
    severity: str
    found: str
    consequence: str
    cure: str


def diagnose(machine: Machine) -> list[Finding]:
    """Return the bad combinations of a machine, errors first."""
    found = [(x, x.found(machine)) for x in COMBINATIONS]
    findings = [
        Finding(x.name, x.severity, what, x.consequence, x.cure) for x, what in found if what
    ]
    return sorted(findings, key=lambda x: x.severity != "error")


def outside(name: str) -> Callable[[Machine], str | None]:
    """Return a condition: a distribution is installed in a version that is not supported."""
    at_least, below = RANGES[name]
    assert at_least is not None

    def found(machine: Machine) -> str | None:
        version = machine.versions.get(name)
        if version is None or is_between(version, at_least, below):
            return None
        return f"{name} {version}"

    return found


def runs_kernels(machine: Machine) -> bool:
    """Tell whether the kernels are compiled and run on a GPU."""
    ours = machine.variables.get("GRPO_FAST_BACKEND") != "torch" and not interprets(machine)
    return bool(machine.gpus) and ours and has_triton(machine)


def has_triton(machine: Machine) -> bool:
    """Tell whether a supported Triton is installed."""
    return machine.versions.get("triton") is not None and outside("triton")(machine) is None


def interprets(machine: Machine) -> bool:
    """Tell whether Triton's interpreter is switched on."""
    return machine.variables.get("TRITON_INTERPRET") == "1"


def _interpreter_and_numpy(m: Machine) -> str | None:
    triton, numpy = m.versions.get("triton"), m.versions.get("numpy")
    old = triton and numpy and not is_between(triton, "3.7") and is_between(numpy, "2.4")
    if interprets(m) and old:
        return f"TRITON_INTERPRET=1 with triton {triton} and numpy {numpy}"
    return None


def _gpu_without_triton(m: Machine) -> str | None:
    if not m.gpus or m.versions.get("triton") is not None:
        return None
    return f"{m.gpus[0].name}, and Triton is not installed"


def _old_gpu(m: Machine) -> str | None:
    old = [x for x in m.gpus if x.capability < (8, 0)]
    if not old or m.build.startswith("ROCm"):
        return None
    return f"{old[0].name} has compute capability {old[0].capability[0]}.{old[0].capability[1]}"


def _no_compiler(m: Machine) -> str | None:
    if not runs_kernels(m) or m.compiler:
        return None
    given = m.variables.get("CC")
    return "no gcc or clang on the PATH" if given is None else f"CC={given!r} is no program"


def _cpu_build(m: Machine) -> str | None:
    return f"PyTorch for CPUs, and a driver: {m.driver}" if m.driver and m.build == "CPU" else None


def _unseen_gpu(m: Machine) -> str | None:
    if not m.driver or m.gpus or m.gpu_error or m.build == "CPU":
        return None
    visible = m.variables.get("CUDA_VISIBLE_DEVICES")
    found = f"PyTorch for {m.build} sees no GPU"
    if visible is None:
        return found
    hides = visible.strip() in ("", "-1")
    return f"{found}: CUDA_VISIBLE_DEVICES={visible!r}" + (" hides them all" if hides else "")


def _forced_without_triton(m: Machine) -> str | None:
    forced = m.variables.get("GRPO_FAST_BACKEND") == "triton"
    if not forced or has_triton(m):
        return None
    return f"GRPO_FAST_BACKEND=triton with triton {m.versions.get('triton') or 'not installed'}"


def _kernels_on_a_cpu(m: Machine) -> str | None:
    forced = m.variables.get("GRPO_FAST_BACKEND") == "triton"
    bad = forced and has_triton(m) and not m.gpus and not interprets(m)
    return "GRPO_FAST_BACKEND=triton without a GPU" if bad else None


def _interpreter_on_a_gpu(m: Machine) -> str | None:
    return "TRITON_INTERPRET=1 on a machine with a GPU" if interprets(m) and m.gpus else None


def _copies(m: Machine) -> str | None:
    if m.build.startswith("ROCm") and not is_between(m.versions.get("torch") or "0", MIXED):
        return f"torch {m.versions['torch']} for {m.build}"
    return None


def _slabs(m: Machine) -> str | None:
    old = not is_between(m.versions.get("torch") or "0", MIXED)
    if m.gpus and old and not m.build.startswith("ROCm"):
        return f"torch {m.versions['torch']} on a GPU"
    return None


def _shadow(m: Machine) -> str | None:
    return f"{m.shadow} is not Hugging Face's package" if m.shadow else None


def _unknown_variable(m: Machine) -> str | None:
    known = {*VARIABLES, *OF_BENCHMARKS}
    unknown = [x for x in m.variables if x.startswith("GRPO_FAST_") and x not in known]
    return ", ".join(unknown) or None


def _wrong_value(m: Machine) -> str | None:
    for name, (choices, _) in VARIABLES.items():
        given = m.variables.get(name, "")
        if given and given not in choices:
            return f"{name}={given!r}"
    return None


COMBINATIONS = (
    Combination(
        "wrong-value", "error", _wrong_value,
        "The calls that read the variable raise a ValueError.",
        "The table of variables says which values each takes.",
    ),
    Combination(
        "unknown-variable", "warning", _unknown_variable,
        "No part of the library reads it.",
        f"Check the spelling: the library has {', '.join(VARIABLES)}.",
    ),
    Combination(
        "forced-kernels-without-triton", "error", _forced_without_triton,
        "Every operator raises a RuntimeError.",
        "pip install 'triton>=3.4', or unset GRPO_FAST_BACKEND.",
    ),
    Combination(
        "forced-kernels-on-a-cpu", "error", _kernels_on_a_cpu,
        "Operators on CPU tensors raise a RuntimeError.",
        "Unset GRPO_FAST_BACKEND, or set TRITON_INTERPRET=1 for the interpreter, which is for tests.",
    ),
    Combination(
        "interpreter-with-numpy", "error", _interpreter_and_numpy,
        "Triton's interpreter fails in the first kernel.",
        "pip install 'triton>=3.7', or 'numpy<2.4'.",
    ),
    Combination(
        "no-compiler", "error", _no_compiler,
        "Triton raises an error at the first launch: it compiles its launcher with a C compiler.",
        "Install gcc, or name a compiler in CC. An empty CC names none: unset it.",
    ),
    Combination(
        "gpu-fails", "error", lambda m: m.gpu_error or None,
        "PyTorch cannot use the GPU; the doctor looks at the CPU instead.",
        "Start nvidia-smi, and see whether another program or the driver is at fault.",
    ),
    Combination(
        "interpreter-on-a-gpu", "warning", _interpreter_on_a_gpu,
        "The kernels are interpreted, which takes thousands of times as long.",
        "Unset TRITON_INTERPRET.",
    ),
    Combination(
        "cpu-torch-on-a-gpu-machine", "warning", _cpu_build,
        "Everything runs on the CPU.",
        "Install PyTorch for CUDA: pytorch.org has the command.",
    ),
    Combination(
        "gpu-not-seen", "warning", _unseen_gpu,
        "Everything runs on the CPU.",
        "Unset CUDA_VISIBLE_DEVICES if it hides them. Else see whether the driver is new enough for this "
        "build of PyTorch.",
    ),
    Combination(
        "gpu-without-triton", "warning", _gpu_without_triton,
        "PyTorch's operators run in place of the kernels. The results are the same, but they take longer.",
        "pip install 'triton>=3.4'",
    ),
    Combination(
        "old-triton", "warning", outside("triton"),
        "PyTorch's operators run in place of the kernels, also on a GPU.",
        "pip install 'triton>=3.4'",
    ),
    Combination(
        "old-gpu", "warning", _old_gpu,
        "Triton supports compute capability 8.0 and newer, and the kernels were not compiled for older GPUs.",
        "GRPO_FAST_BACKEND=torch, if the kernels fail.",
    ),
    Combination(
        "float32-copies", "warning", _copies,
        "The head of half-precision models is multiplied in float32, which is right but slower.",
        "PyTorch 2.10 or newer, or logits_dtype='bf16'.",
    ),
    Combination(
        "sums-in-two-steps", "warning", _slabs,
        "The gradient of a half-precision head takes a product and an addition, which is right but slower.",
        "PyTorch 2.10 or newer.",
    ),
    Combination(
        "old-einops", "warning", outside("einops"),
        "The library was not tested with it.",
        "pip install 'einops>=0.8'",
    ),
    Combination(
        "old-transformers", "warning", outside("transformers"),
        "The included trainer and the GRPOTrainer for TRL refuse it. The losses do not need it.",
        "pip install 'transformers>=5.17'",
    ),
    Combination(
        "other-trl", "warning", outside("trl"),
        "The import of GRPOTrainer and patch() raise an ImportError.",
        "pip install 'trl>=1.15,<1.17'",
    ),
    Combination(
        "other-verl", "warning", outside("verl"),
        "Nothing is registered with verl.",
        "pip install 'verl>=0.9.1,<0.10'",
    ),
    Combination(
        "other-openrlhf", "warning", outside("openrlhf"),
        "patch() raises an ImportError.",
        "pip install 'openrlhf>=0.11.2,<0.12'",
    ),
    Combination(
        "other-nemo-rl", "warning", outside("nemo_rl"),
        "patch() raises an ImportError, except for a checkout that is newer than 0.7.0 and says 0.6.",
        "Check out NeMo-RL's tag v0.7.0.",
    ),
    Combination(
        "other-accelerate", "warning", outside("accelerate"),
        "The included trainer was not tested with it.",
        "pip install 'accelerate>=1.0'",
    ),
    Combination(
        "other-kernels-package", "warning", _shadow,
        "It hides Hugging Face's package `kernels`, which transformers imports.",
        "Rename it, or take its folder off the path.",
    ),
)  # fmt: skip
