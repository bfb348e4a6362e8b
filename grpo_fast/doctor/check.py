"""The self-check: values and gradients of each operator against the specification in float64."""

import contextlib
import importlib.util
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import Objective, reference
from grpo_fast.doctor.paths import lenient, tiny_model
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob
from grpo_fast.ops.backend import interprets, path_of
from grpo_fast.testing import compared
from grpo_fast.torch_kernels.rows import compiles_rows

SECONDS = 30.0
B, T, D = 4, 5, 24
# Entries of a row: for Triton's interpreter, for one program, and for several on a GPU; all odd.
FEW, SHORT, LONG = 203, 2003, 33_001
Values = dict[str, Tensor]
Function = Callable[..., Values]


class Case(NamedTuple):
    """An operator on a small ragged batch.

    Attributes:
        name: what the report calls it.
        leaves: the tensors that get gradients, in float64.
        given: other arguments, in float32; in float64 for the truth.
        ours, specified: compute {name: value}; "loss" is differentiated.
        halves: whether it is also checked in half precision.
    """

    name: str
    leaves: Values
    given: dict[str, Any]
    ours: Function
    specified: Function
    halves: bool = True


class Checked(NamedTuple):
    """The result of a case: the largest error, as a share of what is allowed, and where it is.

    Attributes:
        share: error / (2 * error of plain PyTorch + floor), at most 1 where it is right; None without
            a result.
        detail: the value or gradient with this error, and the errors. Or why the case did not run.
        right: None where it did not run.
    """

    name: str
    dtype: str
    share: float | None
    detail: str
    right: bool | None
    seconds: float


def check(device: torch.device, seconds: float = SECONDS) -> list[Checked]:
    """Check every operator on a device, in float32 and half precision, within a time limit."""
    interpreted = compiled = False
    with contextlib.suppress(
        RuntimeError, ValueError
    ):  # kernels that cannot run: each case says it
        interpreted = interprets() and path_of(torch.empty(0, device=device)).kernels
        compiled = compiles_rows(torch.empty(1, 1, LONG, device=device))
    # Triton's interpreter truncates to bfloat16 where hardware rounds.
    half = torch.float16 if interpreted else torch.bfloat16
    end, found = time.perf_counter() + seconds, []
    with lenient(), one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for case in cases(interpreted, compiled):
            for dtype in (torch.float32, half) if case.halves else (torch.float32,):
                kind = str(dtype).removeprefix("torch.")
                if time.perf_counter() > end:
                    late = f"not run: {seconds:g} s are over"
                    found.append(Checked(case.name, kind, None, late, None, 0.0))
                else:
                    found.append(run(case, dtype, device))
    return found


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread: with so little work, several would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(case: Case, dtype: torch.dtype, device: torch.device) -> Checked:
    """Run a case in a dtype."""
    start, kind = time.perf_counter(), str(dtype).removeprefix("torch.")
    try:
        leaves = {name: x.to(device, dtype) for name, x in case.leaves.items()}
        given = {name: _moved(x, device) for name, x in case.given.items()}
        doubled = {name: x.double() for name, x in leaves.items()}
        precise = {name: _precise(x) for name, x in given.items()}
        got, plain = (_values(f, leaves, given) for f in (case.ours, case.specified))
        truth = _values(case.specified, doubled, precise)
        share: float | None
        share, detail = max(_share(name, got[name], plain[name], truth[name]) for name in truth)
    except Exception as error:  # of whatever does not work here; the doctor goes on
        share, detail = None, " ".join(f"{type(error).__name__}: {error}".split())
    seconds = time.perf_counter() - start
    return Checked(case.name, kind, share, detail, share is not None and share <= 1, seconds)


def _share(name: str, got: Tensor, plain: Tensor, truth: Tensor) -> tuple[float, str]:
    """Return the error as a share of what is allowed, and all errors in words."""
    scale = 0.0 if truth.ndim else 0.1  # the terms of a sum are of the size of 1, and cancel
    found = compared(got, plain, truth, scale=scale, name=name)
    return found.error / found.allowed if found.allowed else 0.0, f"{name}: {found.words}"


def _moved(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def _precise(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _values(function: Function, leaves: Values, given: dict[str, Any]) -> Values:
    """Return the values of a function, and the gradients of its loss."""
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    found = function(leaves, **given)
    if leaves:
        grads = torch.autograd.grad(found["loss"], list(leaves.values()))
        found |= {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    return found


def cases(interpreted: bool = False, compiled: bool = False) -> Iterator[Case]:
    """Yield the cases, those of long rows last.

    Args:
        interpreted: Triton's interpreter runs the kernels, which then get few entries.
        compiled: inductor compiles long rows, some seconds for each way to call it.
    """
    V = FEW if interpreted else SHORT
    yield from _of_logits(V)
    yield from _of_log_probs()
    yield from _of_hidden_states(V)
    rewards = {"rewards": torch.randn(2 * B), "group_size": B}
    ours, plain = _advantages(group_advantage), _advantages(reference.group_advantage)
    yield Case("group_advantage", {}, rewards, ours, plain, halves=False)
    if importlib.util.find_spec("transformers") is not None:
        yield _of_shared_prompts()
    if not interpreted:
        yield from itertools.islice(_of_logits(LONG), 2 if compiled else None)


def _batch(V: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return logits, ids, a ragged mask, and the other arguments of a loss: NaN where nothing counts."""
    lengths = torch.tensor([T, 0, 2, 4])
    mask = torch.arange(T) < lengths[:, None]
    logits = 3 * torch.randn(B, T, V, dtype=torch.float64)
    ids = torch.randint(V, (B, T))
    logp = reference.logprob(logits, ids, temperature).float()
    old, ref = (torch.where(mask, logp + 0.3 * torch.randn(B, T), torch.nan) for _ in range(2))
    given = {"advantages": torch.randn(B), "old_logps": old, "ref_logps": ref}
    return torch.where(mask[..., None], logits, torch.nan), ids, mask, given


def _of_logits(V: int) -> Iterator[Case]:
    logits, ids, mask, _ = _batch(V)
    upstream = torch.randn(2, B, T)

    def scored(function: Callable[..., tuple[Tensor, Tensor]]) -> Function:
        def values(leaves: Values, upstream: Tensor) -> Values:
            # Of the rows that count alone: the others are unspecified.
            live = mask.to(upstream.device)
            logp, entropy = function(leaves["logits"], ids.to(upstream.device), live)
            found = {"logp": logp[live], "entropy": entropy[live]}
            weights = upstream[:, live]
            return found | {
                "loss": (found["logp"] * weights[0] + found["entropy"] * weights[1]).sum()
            }

        return values

    def ours(x: Tensor, ids: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        return logprob(x, ids, mask=live, return_entropy=True)

    def plain(x: Tensor, ids: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.where(live[..., None], x, 0)
        return reference.logprob(x, ids), reference.entropy(x)

    yield Case(
        f"logprob, V = {V:,}", {"logits": logits}, {"upstream": upstream}, scored(ours), scored(plain)
    )  # fmt: skip
    yield from _of_grpo_loss(V)


def _of_grpo_loss(V: int) -> Iterator[Case]:
    size = f"V = {V:,}"

    def in_place(logits: Tensor, **more: Any) -> Any:
        return grpo_loss(logits * 1, inplace=True, **more)

    for name, function, objective, temperature, upstream in (
        ("token", grpo_loss, OBJECTIVES["token"], 1.0, 1.0),
        ("sequence", grpo_loss, OBJECTIVES["sequence"], 1.0, 1.0),
        ("temperature 0.7", grpo_loss, OBJECTIVES["token"], 0.7, 1.0),
        ("in place, gradient scaled", in_place, OBJECTIVES["sequence"], 1.0, 0.5),
    ):
        logits, ids, mask, given = _batch(V, temperature)
        arguments = given | {
            "mask": mask,
            "completion_ids": ids.where(mask, -100),
            "objective": objective,
            "temperature": temperature,
        }
        yield Case(
            f"grpo_loss, {name}, {size}", {"logits": logits}, arguments,
            _loss(function, upstream, return_entropy=True),
            _specified(reference.grpo_loss, lambda x: x, upstream),
        )  # fmt: skip


OBJECTIVES = {
    "token": Objective(beta=0.1, entropy_coef=0.01),
    "sequence": Objective(ratio="sequence", beta=0.1),
}


METRICS = ("ratio_mean", "approx_kl_k1", "kl", "entropy")


def _loss(function: Callable[..., Any], upstream: float = 1.0, **options: Any) -> Function:
    """Return what a loss returns; its first arguments are the leaves, by position."""

    def values(leaves: Values, **given: Any) -> Values:
        out, live = function(*leaves.values(), **given, **options), given["mask"]
        found = {"loss": upstream * out.loss, "logps": out.logps[live]}
        if out.entropy is not None:
            found["entropy"] = out.entropy[live]
        return found | {f"metric {x}": out.metrics[x] for x in METRICS if x in out.metrics}

    return values


def _specified(
    function: Callable[..., Tensor], logits_of: Callable[..., Tensor] | None, upstream: float = 1.0
) -> Function:
    """Return the same values by the specification.

    Args:
        logits_of: computes the logits from the leaves; None: the leaves are log-probs.
    """

    def values(leaves: Values, **given: Any) -> Values:
        found = {"loss": upstream * function(*leaves.values(), **given)}
        live, T = given["mask"], given.get("temperature", 1.0)
        with torch.no_grad():
            if logits_of is None:
                (logp,) = (x[live] for x in leaves.values())
            else:
                logits = logits_of(*leaves.values())[live]
                logp = reference.logprob(logits, given["completion_ids"][live], T)
                found["entropy"] = reference.entropy(logits, T)
                found["metric entropy"] = found["entropy"].mean()
            old, ref = given["old_logps"][live], given["ref_logps"][live]
            ratio = (logp - old).exp()
            kl = reference.kl_estimate(logp, ref, ratio, given["objective"])
        found |= {"logps": logp, "metric ratio_mean": ratio.mean()}
        return found | {"metric approx_kl_k1": (old - logp).mean(), "metric kl": kl.mean()}

    return values


def _of_log_probs() -> Iterator[Case]:
    logits, ids, mask, given = _batch(11)
    logps = torch.where(mask, reference.logprob(logits, ids), torch.nan)
    for name, objective in (("token", Objective(beta=0.1)), ("sequence", OBJECTIVES["sequence"])):
        arguments = given | {"mask": mask, "objective": objective}
        ours, plain = _loss(policy_loss), _specified(reference.policy_loss, None)
        yield Case(f"policy_loss, {name}", {"logps": logps}, arguments, ours, plain)


def _of_hidden_states(V: int) -> Iterator[Case]:
    _, ids, mask, given = _batch(V)
    leaves = {
        "hidden": torch.randn(B, T, D, dtype=torch.float64),
        "weight": torch.randn(V, D, dtype=torch.float64) / math.sqrt(D),
    }
    upstream = torch.randn(B, T)

    def scored(function: Callable[..., Any]) -> Function:
        def values(leaves: Values, upstream: Tensor) -> Values:
            live, device = mask.to(upstream.device), upstream.device
            logp = function(*leaves.values(), ids.to(device), mask=live)[live]
            return {"logp": logp, "loss": (logp * upstream[live]).sum()}

        return values

    yield Case(
        "linear_logprob", leaves, {"upstream": upstream},
        scored(linear_logprob), scored(reference.linear_logprob),
    )  # fmt: skip
    arguments = given | {"mask": mask, "completion_ids": ids.where(mask, -100)}
    for name, objective in OBJECTIVES.items():
        yield Case(
            f"linear_grpo_loss, {name}", leaves, arguments | {"objective": objective},
            _loss(linear_grpo_loss, return_entropy=True),
            _specified(reference.linear_grpo, reference.head_logits),
        )  # fmt: skip
    leaves = leaves | {
        "bias": torch.randn(V, dtype=torch.float64),
        "lora_a": torch.randn(4, D, dtype=torch.float64) / math.sqrt(D),
        "lora_b": torch.randn(V, 4, dtype=torch.float64),
    }
    yield Case(
        "linear_grpo_loss, bias, LoRA, soft cap", leaves,
        arguments | {"objective": OBJECTIVES["token"], "temperature": 0.7},
        _loss(_with_options(linear_grpo_loss), return_entropy=True),
        _specified(_with_options(reference.linear_grpo), _with_options(reference.head_logits)),
    )  # fmt: skip


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a head that has everything a head may have."""

    def call(
        hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, **more: Any
    ) -> Any:
        return function(
            hidden, weight, bias=bias, lora=(a, b, 0.5), softcap=3.0, logit_scale=1.5, **more
        )

    return call


def _advantages(function: Callable[..., Tensor]) -> Function:
    return lambda leaves, **given: {"advantages": function(**given)}


def _of_shared_prompts() -> Case:
    """Return the states of completions that share prompts, against rows of their own."""
    from grpo_fast import shared_prompt

    prompts, answers = torch.randint(61, (2, 20)), torch.randint(61, (8, 9))
    lengths = torch.tensor([9, 3, 1, 9, 5, 9, 2, 7])

    def states(route: str) -> Function:
        def values(leaves: Values, like: Tensor) -> Values:
            model = tiny_model(
                like.device, torch.float64 if like.dtype == torch.float64 else torch.float32
            )
            plan = shared_prompt.plan(
                prompts.to(like.device),
                answers.to(like.device),
                completion_mask=torch.arange(9, device=like.device)
                < lengths.to(like.device)[:, None],
                group_size=4,
            )
            with torch.no_grad():
                return {"states": shared_prompt.forward(model, plan, route=route)}

        return values

    like = {"like": torch.zeros(1)}
    return Case("shared prompts", {}, like, states("auto"), states("unshared"), halves=False)
