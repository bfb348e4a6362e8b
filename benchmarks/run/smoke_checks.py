"""Check one kernel or function at a time: return its errors against float64, or raise.

A result may be twice as far from float64 as plain PyTorch's in the same dtype.
`smoke_groups.py` lists the checks that run.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.inputs.shapes import device
from benchmarks.measuring.gate import in_dtype, relative_error
from grpo_fast import Objective, reference
from grpo_fast.kernels import on_chip, schedules
from grpo_fast.loss import grpo_loss, linear_grpo_loss, metrics_from, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob
from grpo_fast.surrogates import SURROGATES
from grpo_fast.testing import assert_as_accurate

CUDA = torch.cuda.is_available()
BY_SEQUENCE = tuple(name for name, row in SURROGATES.items() if row.by_sequence)
LARGE = (16_384, 152_064)  # more than 2**31 elements
# Of the tiny models that share prompts. Windows are shorter than the prompts.
TINY: dict[str, Any] = {
    **{"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128},
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
DELTA |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
PROMPT_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": {"sliding_window": 8, **EXPERTS},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        **DELTA,
        **EXPERTS,
    },
    "falcon_h1": {
        **{"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
        **{"mamba_n_groups": 1, "mamba_chunk_size": 16},
    },
}
Errors = dict[str, float]
Results = tuple[Tensor, ...]


class Batch:
    """Three sequences of four tokens with old and reference policies; masked logits are NaN."""

    def __init__(self, V: int, dtype: torch.dtype, D: int = 64) -> None:
        B, T = 3, 4
        torch.manual_seed(V)
        new = partial(torch.randn, device=device())
        logits = (3 * new(B, T, V)).to(dtype)
        self.ids = torch.randint(V, (B, T), device=device())
        lengths = torch.tensor([T, 1, T - 1], device=device())
        self.mask = torch.arange(T, device=device()) < lengths[:, None]
        self.logits = torch.where(self.mask[..., None], logits, torch.nan)
        self.logps = reference.logprob(self.logits.nan_to_num().float(), self.ids)
        self.arguments: dict[str, Any] = {
            "mask": self.mask,
            "advantages": new(B),
            "old_logps": self.logps + 0.3 * new(B, T),
            "ref_logps": self.logps + 0.3 * new(B, T),
        }
        self.hidden = new(B, T, D).to(dtype)
        self.weight = (new(V, D) * 3 * D**-0.5).to(dtype)


def graded(
    fn: Callable[..., Any], leaves: Sequence[Tensor], upstream: Any = 3.0, live: Any = ...
) -> Results:
    """Return value and gradients; values of `live` tokens get different upstream gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = fn(*leaves)
    value = getattr(out, "loss", out)
    if value.ndim:
        value = value[live]
        upstream = torch.linspace(-1, 2, value.numel(), device=value.device).view_as(value)
    grads = torch.autograd.grad(value, leaves, torch.as_tensor(upstream).to(value))
    return value.detach(), *grads


def held(
    own: Callable[..., Any],
    spec: Callable[..., Any],
    b: Batch,
    leaves: Sequence[Tensor],
    names: str,
    live: Any = ...,
) -> Errors:
    """Return the errors of values and gradients; raise where one is above twice plain PyTorch's.

    Both functions take the leaves, and the batch's arguments as keywords.
    """
    exact = in_dtype(b.arguments, torch.float64)
    plain = graded(partial(spec, **b.arguments), leaves, live=live)
    truth = graded(partial(spec, **exact), [x.double() for x in leaves], live=live)
    actual = graded(partial(own, **b.arguments), leaves, live=live)
    return accurate(actual, plain, truth, names, live)


def accurate(
    actual: Results, plain: Results, truth: Results, names: str, live: Any = ...
) -> Errors:
    errors = {}
    for name, a, p, t in zip(names.split(), actual, plain, truth, strict=True):
        if name == "dlogits" and live is not ...:
            assert a[~live].eq(0).all(), "a masked token has a gradient"
            a, p, t = a[live], p[live], t[live]
        assert_as_accurate(a, p, t, scale=0.02 * (name == "entropy"), name=name)
        errors[name] = relative_error(a, t)
    return errors


def check_logprob(V: int, dtype: torch.dtype) -> Errors:
    """Check log-probs, then the entropy, each with its gradient."""
    b = Batch(V, dtype)
    b.arguments = {}

    def ours(x: Tensor, which: int) -> Tensor:
        return logprob(x, b.ids, temperature=0.7, mask=b.mask, return_entropy=True)[which]

    specs = (
        lambda x: reference.logprob(x, b.ids, 0.7),
        lambda x: reference.entropy(x, 0.7),
    )
    errors: Errors = {}
    for which, name in enumerate(("logp", "entropy")):
        first = partial(ours, which=which)
        found = held(first, specs[which], b, [b.logits], f"{name} dlogits", b.mask)
        errors |= {name: found[name], f"dlogits of {name}": found["dlogits"]}
    return errors


def check_grpo(
    V: int,
    dtype: torch.dtype,
    objective: Objective = Objective(beta=0.1, entropy_coef=0.02),
    **changes: Any,
) -> Errors:
    """Check loss and gradient under an upstream gradient of 3; in place the bits are the same."""
    b = Batch(V, dtype)
    b.arguments |= {"objective": objective, **changes}

    def ours(x: Tensor, **arguments: Any) -> Any:
        return grpo_loss(x, b.ids, **arguments)

    def inplace(x: Tensor, **arguments: Any) -> Any:
        return grpo_loss(x.clone(), b.ids, inplace=True, **arguments)

    def spec(x: Tensor, **arguments: Any) -> Tensor:
        return reference.grpo_loss(x, b.ids, **arguments)

    held(inplace, spec, b, [b.logits], "loss dlogits", b.mask)
    errors = held(ours, spec, b, [b.logits], "loss dlogits", b.mask)
    others = {"again": ours}
    if objective.ratio == "token" and objective.surrogate not in BY_SEQUENCE:
        others["in place"] = inplace  # the others take their factor at another place
    actual = graded(partial(ours, **b.arguments), [b.logits])
    for how, other in others.items():
        found = graded(partial(other, **b.arguments), [b.logits])
        for one, two in zip(actual, found, strict=True):
            assert (one.nan_to_num() == two.nan_to_num()).all(), f"other bits {how}"
    return errors


def check_same_bits(V: int, dtype: torch.dtype) -> Errors:
    """Check that `logprob` and `grpo_loss` give the same bits, and one row alone if 8 divides V."""
    b = Batch(V, dtype)
    one = logprob(b.logits, b.ids, mask=b.mask)[b.mask]
    two = grpo_loss(b.logits.clone(), b.ids, **b.arguments).logps[b.mask]
    single = logprob(b.logits[2, :1], b.ids[2, :1])
    assert (one == two).all(), f"{int((one != two).sum())} log-probs differ"
    row = one[int(b.mask[:2].sum())]
    nearly = (single - row).abs() <= 1e-6 * row.abs()
    assert (nearly if V % 8 else single == row).all(), "depends on the batch"
    return {}


def check_strided(V: int, dtype: torch.dtype) -> Errors:
    """Check that a slice of a model's logits is read where it is, wherever its rows start."""
    b = Batch(V, dtype)
    wide = torch.nn.functional.pad(b.logits, (0, 16, 1, 1), value=torch.nan)
    one = graded(lambda x: grpo_loss(x, b.ids, **b.arguments), [b.logits])
    two = graded(lambda x: grpo_loss(x[:, 1:-1, :V], b.ids, **b.arguments), [wide])
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for x, y in zip(one, (two[0], two[1][:, 1:-1, :V]), strict=True):
        # Where 8 does not divide V the sums run in another order.
        allowed = rounding * x.abs() + 1e-6 * x.abs().max() if V % 8 else torch.zeros_like(x)
        assert ((x - y).abs() <= allowed).all()
    return {}


def check_metrics(V: int) -> Errors:
    """Check what the kernel of the statistics makes of them."""
    b = Batch(V, torch.float32)
    out = grpo_loss(b.logits, b.ids, return_entropy=True, **b.arguments)
    want = metrics_from(out.statistics)
    for name, x in out.metrics.items():
        assert torch.isclose(x, want[name], rtol=1e-6), f"{name}: {x.item()}, {want[name].item()}"
    return {"kl": relative_error(out.metrics["kl"], want["kl"])}


def check_on_chip(V: int, dtype: torch.dtype) -> Errors:
    """Check the other kernel, where there is one for this GPU and this Triton."""
    if on_chip.unavailable(device()):
        return {}
    with mock.patch.dict(os.environ, {"GRPO_FAST_ON_CHIP": "1"}):
        return check_grpo(V, dtype)


def check_head(V: int, dtype: torch.dtype, **options: Any) -> Errors:
    """Check loss, dhidden and dweight from hidden states."""
    b = Batch(V, dtype)
    b.arguments["objective"] = Objective(beta=0.1)
    known = {k: x for k, x in options.items() if k in ("softcap", "logit_scale")}
    return held(
        lambda h, w, **given: linear_grpo_loss(h, w, b.ids, **given, **options),
        lambda h, w, **given: reference.linear_grpo(h, w, b.ids, **given, **known),
        *(b, [b.hidden, b.weight], "loss dhidden dweight"),
    )


def check_linear_logprob(V: int, dtype: torch.dtype) -> Errors:
    b = Batch(V, dtype)
    b.arguments = {}
    return held(
        lambda h, w: linear_logprob(h, w, b.ids),
        lambda h, w: reference.linear_logprob(h, w, b.ids),
        *(b, [b.hidden, b.weight], "logp dhidden dweight"),
    )


def check_policy(objective: Objective) -> Errors:
    b = Batch(100, torch.float32)
    b.arguments["objective"] = objective
    return held(policy_loss, reference.policy_loss, b, [b.logps], "loss dlogps")


def check_group_advantage(scale: Any) -> Errors:
    rewards = torch.randn(64, device=device())
    rewards[8:16] = 1.0
    given = {"group_size": 8, "scale": scale}
    want = reference.group_advantage(rewards.cpu(), **given)
    truth = reference.group_advantage(rewards.cpu().double(), **given)
    actual = group_advantage(rewards, **given).cpu()
    return accurate((actual,), (want,), (truth,), "advantages")


def check_large(inplace: bool) -> Errors:
    """Check offsets beyond 2**31: the first and the last rows of logits of a 7B model's size."""
    N, V = LARGE
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(N, V, device="cuda", dtype=torch.bfloat16)
    logits.normal_(0, 2, generator=generator)
    ids = torch.randint(V, (N,), device="cuda", generator=generator)
    rows = torch.tensor([0, 1, 7062, 14_122, 14_123, N - 2, N - 1], device="cuda")
    sample = logits[rows].clone()
    old = torch.full((N,), -14.0, device="cuda")
    given: dict[str, Any] = {"advantages": torch.ones(N, device="cuda"), "old_logps": old}
    given["objective"] = Objective(reduction="sequence_sum", epsilon_high=1e9)
    given["cu_seqlens"] = torch.arange(0, N + 1, 1024, device="cuda")
    leaf = logits.requires_grad_()
    out = grpo_loss(leaf * 1.0 if inplace else leaf, ids, inplace=inplace, **given)
    (grad,) = torch.autograd.grad(out.loss, leaf)

    def spec(x: Tensor) -> Results:
        logp = reference.logprob(x.requires_grad_(), ids[rows])
        scale = -(logp.detach() - old[rows]).exp() / (N // 1024)
        return logp.detach(), torch.autograd.grad(logp, x, scale)[0]

    (logp, near), truth = spec(sample.float()), spec(sample.double())
    plain = logp, near.to(grad.dtype)
    return accurate((out.logps[rows], grad[rows]), plain, truth, "logp dlogits")


def check_waiting(dtype: torch.dtype, V: int) -> Errors:
    """Check that who writes a row changes no bit, where many rows are under way at the same time.

    The programs of a row wait for each other; or look once, so that many leave their part to the
    last; or leave all of it to the last. What is written over the logits is the same, too.
    """
    N = 4096
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(N, V, device="cuda", dtype=dtype).normal_(0, 2, generator=generator)
    ids = torch.randint(V, (N,), device="cuda", generator=generator)
    given: dict[str, Any] = {
        "advantages": torch.randn(N, device="cuda", generator=generator),
        "old_logps": torch.full((N,), -14.0, device="cuda"),
        "mask": torch.rand(N, device="cuda", generator=generator) < 0.9,
        "cu_seqlens": torch.arange(0, N + 1, 1024, device="cuda"),
    }

    def run(polls: int, inplace: bool) -> Results:
        with mock.patch.object(schedules, "POLLS", polls):
            leaf = logits.detach().clone().requires_grad_()
            out = grpo_loss(leaf * 1.0 if inplace else leaf, ids, inplace=inplace, **given)
            (grad,) = torch.autograd.grad(out.loss, leaf)
        return out.logps, out.loss.detach(), grad

    first = run(schedules.POLLS, inplace=False)
    for polls in (schedules.POLLS, 1, 0):
        for inplace in (False, True):
            for x, y in zip(first, run(polls, inplace), strict=True):
                assert (x == y).all(), f"other bits: {polls} polls, in place: {inplace}"
    return {}


def check_prompts(kind: str, attention: str, route: str) -> Errors:
    """Hold shared prompts against a row for each completion, on a tiny model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from grpo_fast import shared_prompt

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TINY, **PROMPT_MODELS[kind])
    with device():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    new = partial(torch.randint, 3, 61, device=device())
    lengths = torch.tensor([6, 1, 0, 4, 5, 2], device=device())
    plan = shared_prompt.plan(
        new((2, 40)),
        new((6, 6)),
        prompt_mask=torch.arange(40) >= torch.tensor([[0], [13]]),
        completion_mask=torch.arange(6, device=device()) < lengths[:, None],
        group_size=3,
    )
    report = shared_prompt.check(model.float(), plan, route=route, verbose=False)
    assert report.exact, str(report)
    return {"log_prob": report.log_prob, "gradient": report.gradient}
