"""List the checks of `benchmarks/run_all --smoke`, in groups: each group is a process."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import torch

from benchmarks.inputs.shapes import device
from benchmarks.run.smoke_checks import (
    BY_SEQUENCE,
    CUDA,
    PROMPT_MODELS,
    Errors,
    check_group_advantage,
    check_grpo,
    check_head,
    check_large,
    check_linear_logprob,
    check_logprob,
    check_metrics,
    check_on_chip,
    check_policy,
    check_prompts,
    check_same_bits,
    check_strided,
    check_waiting,
)
from grpo_fast import Objective
from grpo_fast.objective import KL
from grpo_fast.surrogates import SURROGATES

# Every schedule, with rows that start aligned and rows that do not: one tile, one program, many
# programs.
ALL = (100, 1000, 1024, 9001, 32_768, 40_000, 50_257, 128_264, 151_665, 152_064)
VOCABULARIES = ALL if CUDA else (100, 9001, 40_000)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RECURRENT = ("qwen3_next", "falcon_h1")
Group = Iterator[tuple[str, Callable[[], Errors]]]


def by_dtype(dtype: torch.dtype, odd: bool) -> Group:
    """List the checks of a dtype, of vocabularies that 8 divides or of those that it does not."""
    for V in (V for V in reversed(VOCABULARIES) if odd == (V % 8 > 0)):
        yield f"grpo {V}", partial(check_grpo, V, dtype)
        yield f"same bits {V}", partial(check_same_bits, V, dtype)
        yield f"logprob {V}", partial(check_logprob, V, dtype)
    for V in (VOCABULARIES[0], *[50_257] * CUDA) if odd else (40_000,):
        yield f"strided {V}", partial(check_strided, V, dtype)
    for V in (1000, 152_064) if CUDA and dtype != torch.float32 and not odd else ():
        yield f"on chip {V}", partial(check_on_chip, V, dtype)


def heads() -> Group:
    for V in (40_000, 50_257) if CUDA else (1003,):
        for name, dtype in DTYPES.items() if CUDA else [("float32", torch.float32)]:
            yield f"linear_grpo {V} {name}", partial(check_head, V, dtype)
            yield f"linear_logprob {V} {name}", partial(check_linear_logprob, V, dtype)
        for name, dtype, options in (
            ("bf16 logits", torch.bfloat16, {"logits_dtype": "bf16"}),
            ("soft cap", torch.float32, {"softcap": 30.0, "logit_scale": 0.5, "chunk_size": 5}),
            ("all rows", torch.float32, {"compact": False}),
        ):
            yield f"linear_grpo {V} {name}", partial(check_head, V, dtype, **options)


def objectives() -> Group:
    from_logits = partial(check_grpo, 1024, torch.float32)
    for surrogate, row in SURROGATES.items():
        if surrogate not in (*BY_SEQUENCE, "topr"):
            options: dict[str, Any] = {"quadratic_coef": 0.3} if row.has_quadratic else {}
            objective = Objective(surrogate=surrogate, beta=0.1, **options)  # type: ignore[arg-type]
            yield f"surrogate {surrogate}", partial(from_logits, objective)
    for kl in get_args(KL):
        yield f"kl {kl}", partial(from_logits, Objective(beta=0.3, kl=kl))
    by_sequence = {name: Objective(surrogate=name) for name in BY_SEQUENCE}  # type: ignore[arg-type]
    for name, objective in {"gspo": Objective.preset("gspo"), **by_sequence}.items():
        yield f"sequence {name}", partial(check_policy, objective)
        yield f"from logits {name}", partial(from_logits, objective)
    yield "policy_loss", partial(check_policy, Objective(beta=0.1, delta=1.5))
    yield "metrics", partial(check_metrics, 1024)
    scale = torch.tensor(0.3, device=device())
    yield "loss scale", partial(from_logits, Objective(beta=0.1), loss_scale=scale)
    yield "on policy", partial(from_logits, Objective(), old_logps=None)
    for kind in ("group", "batch", "none"):
        yield f"group_advantage {kind}", partial(check_group_advantage, kind)


def large() -> Group:
    for inplace in (False, True) if CUDA else ():
        yield f"large, {'' if inplace else 'not '}in place", partial(check_large, inplace)


def waiting() -> Group:
    for V in (152_064, 50_257) if CUDA else ():
        for name, dtype in DTYPES.items():
            yield f"waiting {V} {name}", partial(check_waiting, dtype, V)


def prompts() -> Group:
    for kind in PROMPT_MODELS:
        attention = "eager" if kind == "gpt_oss" else "sdpa"
        packed = ("packed",) if attention == "sdpa" else ()
        routes = ("fork", "bounded") if kind in RECURRENT else (*packed, "mask", "fork", "bounded")
        for route in routes:
            yield f"{kind} {route}", partial(check_prompts, kind, attention, route)
    for kind in ("llama", "gemma3_text") if CUDA else ():
        yield f"{kind} flex", partial(check_prompts, kind, "flex_attention", "flex")


GROUPS: dict[str, Callable[[], Group]] = {
    **{name: partial(by_dtype, dtype, odd=False) for name, dtype in DTYPES.items()},
    **{f"{name}-odd": partial(by_dtype, dtype, odd=True) for name, dtype in DTYPES.items()},
    **{"heads": heads, "objectives": objectives, "large": large, "waiting": waiting},
    "prompts": prompts,
}
