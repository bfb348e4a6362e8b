"""The launches that `codegen` compiles: every kernel, in the variants that differ as code.

Tensors are without storage (device "meta"): nothing is computed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
import triton

from grpo_fast.kernels import (
    chunks,
    group_advantage,
    grpo,
    logprob,
    policy_loss,
    reduction_weights,
    scaling,
    sequence_loss,
)
from grpo_fast.objective import KL, Objective, Surrogate
from grpo_fast.records import (
    Grouping,
    Incoming,
    Outgoing,
    Outputs,
    Rewards,
    RowStatistics,
    Sequences,
    SoftCap,
    Standardization,
    Targets,
    Tokens,
    Weighing,
)

B, T_LEN = 4, 16
N = B * T_LEN
V_SMALL, V_ROW, V_SPLIT = 1024, 32_768, 152_064  # one per schedule
CAP, HIGH_CAP = SoftCap(30.0, 0.5), SoftCap(100.0, 0.5)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def vector(given: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    return tensor(N, dtype=dtype) if given else None


def targets(mask: bool, temperature: bool) -> Targets:
    return Targets(vector(dtype=torch.int64), vector(mask, torch.bool), vector(temperature), 1.0)


def tokens(**given: bool) -> Tokens:
    """Make `Tokens` with a weight, and with those of the other fields that are given."""
    return Tokens(**{name: vector(given.get(name, name == "weight")) for name in Tokens._fields})


def logits(V: int, dtype: torch.dtype, stride: int = 0) -> torch.Tensor:
    """Make logits with this stride, else with one that 16 divides: Triton knows such rows to be aligned."""
    return tensor(B, T_LEN, stride or triton.cdiv(V, 16) * 16, dtype=dtype)[..., :V]


def overlapping(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Make a gradient of smaller elements that lies over the logits (`schedules.overlaps`)."""
    return x.view(dtype)[..., : x.shape[-1]]


def launch_logprob_fwd(
    V: int = V_ROW,
    dtype: torch.dtype = torch.bfloat16,
    entropy: bool = False,
    extras: bool = False,
    cap: SoftCap | None = None,
    stride: int = 0,
) -> None:
    logprob.logprob_fwd(logits(V, dtype, stride), targets(extras, extras), entropy, cap)


def launch_logprob_bwd(
    V: int = V_ROW,
    dtype: torch.dtype = torch.bfloat16,
    entropy: bool = False,
    extras: bool = False,
    over: torch.dtype | None = None,
    **more: Any,
) -> None:
    """Launch `logprob_bwd`; `more` may be cap and stride."""
    x = logits(V, dtype, more.get("stride", 0))
    dlogits = x if over is None else overlapping(x, over)
    statistics = RowStatistics(vector(), vector(entropy), vector(), vector())
    upstream = vector(), vector(entropy)
    logprob.logprob_bwd(*upstream, x, targets(extras, extras), statistics, dlogits, more.get("cap"))


def launch_grpo(
    V: int = V_ROW,
    dtype: torch.dtype = torch.bfloat16,
    *,
    stride: int = 0,
    out: torch.dtype | None = None,
    over: torch.dtype | None = None,
    cap: SoftCap | None = None,
    objective: Objective | None = None,
    launcher: Callable[..., Any] = grpo.grpo_fwd_bwd,
    **given: bool,
) -> None:
    """Launch `grpo`; `given` may be entropy (in the loss), returned (entropy), rewards, packed, extras.

    It may be bare as well: without a mask, old and reference log-probs.
    """
    entropy, rewards, packed, extras, bare = (
        given.get(name, False) for name in ("entropy", "rewards", "packed", "extras", "bare")
    )
    x = logits(V, dtype, stride)
    written = x if out is None else logits(V, out)
    rest = ("importance", "score", "entropy_weight", "coefficient")
    launcher(
        x,
        targets(not bare, extras),
        tokens(
            advantages=not rewards,
            old_logp=not bare,
            ref_logp=not bare,
            **dict.fromkeys(rest, extras),
        ),
        Rewards(tensor(B) if rewards else None, 2, vector(packed, torch.int64)),
        return_entropy=given.get("returned", False),
        objective=objective or Objective(beta=0.04 * (not bare), entropy_coef=0.01 * entropy),
        dlogits=written if over is None else overlapping(x, over),
        **({} if cap is None else {"softcap": cap}),
    )


def launch_scale_rows(V: int = V_ROW, dtype: torch.dtype = torch.bfloat16, stride: int = 0) -> None:
    scaling.scale_rows(tensor().expand(N), logits(V, dtype, stride))


def launch_scale(dtype: torch.dtype | None = None) -> None:
    x = tensor(152_064, 3584)
    scaling.scale(x, tensor(), x if dtype is None else tensor(*x.shape, dtype=dtype))


def launch_weigh_rows() -> None:
    x = tensor(N, 3584, dtype=torch.bfloat16)
    scaling.weigh_rows(x, tensor(N), tensor(N, 3584, dtype=torch.bfloat16))


def launch_move_rows() -> None:
    stage, h = tensor(N, 3584), tensor(N, 3584, dtype=torch.bfloat16)
    rows = tensor(N, dtype=torch.int64)
    chunks.move_rows(
        Outgoing(stage, tensor(*h.shape, dtype=h.dtype), rows, N), Incoming(h, rows, None, N, h)
    )


def launch_policy_loss(extras: bool = True, objective: Objective | None = None) -> None:
    rest = dict.fromkeys(("old_logp", "ref_logp", "importance", "score"), extras)
    policy_loss.policy_loss_fwd(
        vector(),
        vector(extras, torch.bool),
        tokens(advantages=True, **rest),
        objective or Objective(beta=0.04),
    )


def launch_sequence_loss(objective: Objective, packed: bool) -> None:
    given = ("advantages", "old_logp", "ref_logp", "importance", "score")
    boundaries = tensor(B + 1, dtype=torch.int64) if packed else None
    sequence_loss.sequence_loss_fwd(
        vector(),
        vector(dtype=torch.bool),
        tokens(**dict.fromkeys(given, True)),
        Sequences(boundaries, T_LEN, share=None, log_importance=vector()),
        objective,
    )


def launch_token_statistics(extras: bool = True) -> None:
    outputs = Outputs(vector(), vector(), vector(extras), vector(extras), vector(dtype=torch.int8))
    policy_loss.token_statistics_fwd(
        outputs,
        vector(extras, torch.bool),
        share=None,
        old_logp=vector(extras),
        importance=vector(extras),
    )


def launch_reduction_weights(reduction: str = "sequence_mean", packed: bool = False) -> None:
    like = tensor(N) if packed else tensor(B, T_LEN)
    boundaries = tensor(B + 1, dtype=torch.int32) if packed else None
    weighing = Weighing(
        mask=vector(dtype=torch.bool),
        floating=vector(not packed, torch.bfloat16),
        token_weights=vector(),
        boundaries=boundaries,
        num_items=tensor(dtype=torch.int64) if packed else None,
        loss_scale=tensor(),
    )
    reduction_weights.reduction_weights_fwd(like, weighing, reduction, 0, not packed)


def grouping(labels: bool) -> Grouping:
    return Grouping(16, tensor(256, dtype=torch.int64) if labels else None)


def launch_group_advantage(scale: str = "group", labels: bool = False, **more: bool) -> None:
    standardization = Standardization(scale, 1e-4, **more)
    group_advantage.group_advantage_fwd(tensor(256), grouping(labels), standardization)


def launch_combine_rewards(normalize: bool, labels: bool = False) -> None:
    scored = Standardization("group", 1e-4, skip_nan=True, raw_singletons=labels)
    group_advantage.combine_rewards_fwd(
        tensor(256, 3), tensor(3), grouping(labels), normalize, scored
    )


# Every surrogate and every KL estimator once; each is a compile-time choice of the same kernels.
OBJECTIVES = {
    **{x: Objective(surrogate=x, beta=0.04) for x in get_args(Surrogate)},
    **{x: Objective(kl=x, beta=0.04) for x in get_args(KL) if x != "k3"},
    "k3+": Objective(beta=0.04, kl_gradient="k2"),
    "k3 where not clamped": Objective(beta=0.04, kl_value_clip=10.0, kl_gradient="k2_clipped"),
    "dppo_tv ratio": Objective(surrogate="dppo_tv", beta=0.04, dppo_value="ratio"),
    "dppo_kl ratio": Objective(surrogate="dppo_kl", beta=0.04, dppo_value="ratio"),
}
BY_TOKEN = {
    x: {"objective": o} for x, o in OBJECTIVES.items() if not o.needs_sequences and x != "clip"
}
BY_SEQUENCE = {
    "gspo": Objective(ratio="sequence", beta=0.04, kl="k3_unbiased"),
    "gspo_token": Objective(ratio="sequence_token", beta=0.04),
    "off_policy_mask": Objective(off_policy_threshold=0.1, beta=0.04),
    **{x: o for x, o in OBJECTIVES.items() if o.needs_sequences},
}
Options = dict[str, Any]
FP32: Options = {"dtype": torch.float32}
SPLIT: Options = {"V": V_SPLIT}
OVER: Options = {**SPLIT, **FP32, "over": torch.bfloat16}
TO_BF16: Options = {**SPLIT, **FP32, "out": torch.bfloat16}
# What a word in the name of a case says of the launch, unless the case has options of its own.
WORDS: dict[str, Options] = {
    **{word: {word: True} for word in ("entropy", "extras", "rewards", "packed", "labels")},
    **{scale: {"scale": scale} for scale in ("batch", "none")},
    **{"split": SPLIT, "fp32": FP32, "overlap": OVER},
    **{
        "capped": {"cap": CAP},
        "high": {"cap": HIGH_CAP},
    },  # "capped high": both, and the last counts
    **{"small": {"V": V_SMALL}, "padded": {"V": 50_257}, "151665": {"V": 151_665}},
    "variants": {"leave_one_out": True, "skip_nan": True, "raw_singletons": True},
    "bare": {"extras": False},
}
BARE: dict[str, Options] = {"bare": {"bare": True}, "split bare": {"bare": True}}
OVERLAPS = ("overlap", "overlap entropy", "overlap capped", "overlap 151665")


def cases(
    kernel: str, launch: Callable[..., None], *names: str, **more: Options
) -> dict[str, Callable[[], None]]:
    """Name launches by their kernel and what is special about them; `more` have options as well."""
    found: dict[str, Callable[[], None]] = {}
    for name in (*names, *more):
        options: Options = {}
        for word in name.split():
            options |= WORDS.get(word, {})
        found[f"{kernel} {name}".strip()] = partial(launch, **(options | more.get(name, {})))
    return found


# Rows one after the other that do not all start at 16 bytes (GPT-2's vocabulary, Qwen2.5's without
# padding), or do so although 16 does not divide their stride (Llama 3's with 8 more). First the
# case that each is like.
EVEN: dict[str, tuple[Callable[..., None], Options]] = {
    "grpo": (launch_grpo, {}),
    "grpo fp16": (launch_grpo, {"dtype": torch.float16}),
    "grpo fp32": (launch_grpo, FP32),
    "logprob_fwd": (launch_logprob_fwd, {}),
    "logprob_bwd": (launch_logprob_bwd, {}),
    "scale_rows": (launch_scale_rows, {}),
    "logprob_fwd fp32 split": (launch_logprob_fwd, FP32),
    "grpo fp32 split entropy": (launch_grpo, {**FP32, "entropy": True}),
}
UNEVEN = {
    f"{case} {V}": (case, partial(launch, V, stride=V, **options))
    for V in (50_257, 151_665, 128_264)
    for case, (launch, options) in list(EVEN.items())[: None if V == 151_665 else 3]
}
# Clip, k3, old and reference log-probs, bfloat16: what most runs launch.
COMMON = ("grpo", "grpo split")
CASES: dict[str, Callable[[], None]] = {
    **cases("logprob_fwd", launch_logprob_fwd, "", "entropy", "split", "split entropy extras"),
    **cases("logprob_fwd", launch_logprob_fwd, "fp32 split", "fp32 split entropy"),
    **cases("logprob_bwd", launch_logprob_bwd, "", "entropy", "split entropy extras"),
    **cases("grpo", launch_grpo, "", "split", "entropy", "split entropy extras", "small", "padded"),
    **cases("grpo", launch_grpo, "rewards", **{"rewards packed": SPLIT, **BARE}),
    **cases("grpo", launch_grpo, fp16=SPLIT | {"dtype": torch.float16}, fp32=SPLIT),
    **cases("grpo", launch_grpo, "fp32 split entropy", "fp32 entropy", **{"fp32 to bf16": TO_BF16}),
    **cases("grpo", launch_grpo, *OVERLAPS),
    **cases("logprob_bwd", launch_logprob_bwd, *OVERLAPS),
    **cases("grpo", launch_grpo, capped=TO_BF16),
    **cases("grpo", launch_grpo, "capped entropy", "capped high", "split capped high"),
    **cases("grpo", launch_grpo, "capped high entropy", "overlap capped high"),
    **cases("logprob_fwd", launch_logprob_fwd, "capped high"),
    **cases("logprob_bwd", launch_logprob_bwd, "capped high"),
    **cases("logprob_fwd", launch_logprob_fwd, capped=SPLIT | FP32),
    **cases("logprob_bwd", launch_logprob_bwd, capped=SPLIT | {"entropy": True}),
    **cases("grpo", launch_grpo, **BY_TOKEN),
    **{name: launch for name, (_, launch) in UNEVEN.items()},
    **cases("scale_rows", launch_scale_rows, "", "split fp32"),
    "linear_grpo scale": launch_scale,
    "linear_grpo scale to bf16": partial(launch_scale, torch.bfloat16),
    "linear_logprob weigh_rows": launch_weigh_rows,
    "linear move_rows": launch_move_rows,
    **cases("policy_loss", launch_policy_loss, "", "bare", **BY_TOKEN),
    **{
        f"sequence_loss {name}": partial(launch_sequence_loss, x, packed=name == "gspo")
        for name, x in BY_SEQUENCE.items()
    },
    **cases("token_statistics", launch_token_statistics, "", "bare"),
    "reduction_weights": launch_reduction_weights,
    "reduction_weights packed": partial(launch_reduction_weights, "token_mean", packed=True),
    **cases("group_advantage", launch_group_advantage, "", "labels", "batch", "none"),
    **cases("group_advantage", launch_group_advantage, "variants", "variants labels"),
    "combine_rewards": partial(launch_combine_rewards, False),
    "combine_rewards normalize": partial(launch_combine_rewards, True),
    "combine_rewards normalize labels": partial(launch_combine_rewards, True, labels=True),
}
