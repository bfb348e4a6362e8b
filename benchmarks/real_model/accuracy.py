"""Errors of losses and gradients on the hidden states of a real model, against float64.

The completions are the model's own, with their rewards. The old and the reference log-probs are those of
copies of the model with noise on their weights. Every provider gets the same tensors; the truth is the
specification in float64 from these tensors, so a rounding of the inputs is nobody's error.

    error(ours) <= 2 x error(plain PyTorch, same dtype) + 1e-5 of the largest entry

is the project's criterion (`grpo_fast.testing.assert_as_accurate`). Only this project is held to it.
"""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import ROOT, providers
from benchmarks.measuring import gate, machine
from benchmarks.providers import trl as trl_provider
from benchmarks.real_model import plain, setup
from benchmarks.real_model.sheet import Sheet
from grpo_fast import Objective, reference, shared_prompt
from grpo_fast.testing import assert_as_accurate
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.rollout import completion_logits

OBJECTIVE = Objective(reduction="token_mean", beta=0.04)
NOISE = {"old_logps": 0.01, "ref_logps": 0.02}  # of the weights, in standard deviations
KIND = "real_accuracy"
DTYPES = (torch.float32, torch.bfloat16)
PLAIN, OWN = "eager", "grpo_fast"
PROVIDERS = (PLAIN, OWN, "trl", "trl-logits", "liger-chunked", "liger-scaled-ce")
INTERPRETED = "grpo_fast, kernels interpreted"
SLICE = (8, 8)  # completions and tokens of the interpreter's share
WHOLE_GROUPS = 2  # for the gradient of all weights: float64 through the whole model is slow
Results = dict[str, Tensor]  # "log-probs", "loss", "d hidden", "d head"


class Case(NamedTuple):
    """The operands of a loss from hidden states, completions padded on the right."""

    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    ids: Tensor  # (B, T)
    given: dict[str, Tensor]  # mask, advantages, old_logps, ref_logps

    def rounded(self, dtype: torch.dtype) -> "Case":
        """Return the case with hidden states and weight in a dtype."""
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def part(self, rows: int, columns: int) -> "Case":
        """Return the first tokens of the first completions that have an advantage."""
        chosen = (self.given["advantages"] != 0).nonzero()[:rows, 0]
        given = {
            name: x[chosen] if x.ndim == 1 else x[chosen, :columns]
            for name, x in self.given.items()
        }
        return Case(self.hidden[chosen, :columns], self.weight, self.ids[chosen, :columns], given)


def case_of(config: TrainConfig, given: setup.Sampled) -> Case:
    """Compute the hidden states, the old and the reference log-probs of completions."""
    forward, batch = setup.planned(config, given)
    model, plan = given.policy.model, batch.plan
    assert plan is not None
    with torch.no_grad():
        hidden = shared_prompt.with_head(model, plan, lambda hidden, _: hidden, route="unshared")
    values: dict[str, Tensor] = {"mask": given.rollout.mask, "advantages": given.advantages}
    for seed, (name, size) in enumerate(NOISE.items()):
        values[name] = forward.log_probs(setup.perturbed(model, size, seed), batch)
    weight = model.get_output_embeddings().weight.detach()
    return Case(plan.padded(hidden), weight, given.rollout.completion_ids, values)


def compute(case: Case, loss: Callable[..., Tensor] | None, scores: Any = None) -> Results:
    """Run a loss, its backward pass and a function for log-probs, as far as they are given."""
    found: Results = {}
    mask = case.given["mask"]
    if scores is not None:
        with torch.no_grad():
            found["log-probs"] = scores(case.hidden, case.weight, case.ids)[mask]
    if loss is not None:
        hidden, weight = (x.detach().clone().requires_grad_() for x in case[:2])
        value = loss(hidden, weight, case.ids, objective=OBJECTIVE, **case.given)
        value.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        found |= {"loss": value.detach(), "d hidden": hidden.grad, "d head": weight.grad}
    return found


def truth(case: Case) -> Results:
    """Compute the specification in float64."""

    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, **given: Any) -> Tensor:
        given.pop("objective")
        return plain.loss_of_logits(hidden @ weight.mT, ids, given, OBJECTIVE)

    def scores(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return reference.logprob(hidden @ weight.mT, ids)

    return compute(case.rounded(torch.float64), loss, scores)


def results_of(provider: str, case: Case) -> Results:
    """Run a provider.

    Raises:
        UnavailableError: it cannot run here.
    """
    if provider == "trl-logits":
        return compute(case, _trl_logits(), _trl_scores())
    found = []
    for stem in ("linear_grpo", "linear_logprob"):
        known = provider in providers.PROVIDERS[stem]
        found.append(providers.load(stem, provider) if known else None)
    return compute(case, *found)


def _trl_scores() -> Callable[..., Tensor]:
    """Load TRL's log-probs from logits that are all in memory."""
    trl_provider.policy_loss()  # or it says why not
    from trl.trainer.utils import selective_log_softmax

    return lambda hidden, weight, ids: selective_log_softmax(hidden @ weight.mT, ids)


def _trl_logits() -> Callable[..., Tensor]:
    scores, loss = _trl_scores(), trl_provider.policy_loss()
    return lambda hidden, weight, ids, **given: loss(scores(hidden, weight, ids), **given)


def rows_of(
    who: str, dtype: torch.dtype, found: Results, baseline: Results, exact: Results, size: Tensor
) -> list[dict[str, Any]]:
    """Write one row for each result: its errors, those of plain PyTorch, and the criterion.

    Args:
        size: the mean size of an advantage, beside which the error of a loss is seen: its terms cancel.
    """
    rows = []
    for name, actual in found.items():
        trio = (gate.with_scale(x, size) for x in (actual, baseline[name], exact[name]))
        got, plainly, want = (x.double() for x in trio)
        errors, others = got - want, plainly - want
        try:
            assert_as_accurate(got, plainly, want, gate.FACTOR, name=name)
            within = True
        except AssertionError:
            within = False
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "provider": who,
                "result": name,
                "entries": actual.numel(),
                "largest": want.abs().max().item(),
                "max_error": errors.abs().max().item(),
                "rms_error": errors.square().mean().sqrt().item(),
                "plain_max_error": others.abs().max().item(),
                "plain_rms_error": others.square().mean().sqrt().item(),
                "within": within,
            }
        )
    return rows


def interpreted(case: Case) -> Results:
    """Run this project's kernels in Triton's interpreter, in a process of its own.

    Raises:
        UnavailableError: the process failed; the message has its last line.
    """
    variables = {"TRITON_INTERPRET": "1", "GRPO_FAST_BACKEND": "triton"}
    with tempfile.TemporaryDirectory() as folder:
        there, back = Path(folder, "case.pt"), Path(folder, "results.pt")
        torch.save(tuple(case), there)
        command = [sys.executable, "-m", "benchmarks.real_model.interpreted", str(there), str(back)]
        environment = machine.environment() | variables
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise providers.UnavailableError((ran.stderr.strip() or "no message").splitlines()[-1])
        return torch.load(back)


def measure(config: TrainConfig, sheet: Sheet) -> bool:
    """Measure all providers, and tell whether this project is within its criterion everywhere."""
    given = setup.sampled(config)
    with setup.backend("torch"):
        case = case_of(config, given)
        sheet.document["batch"] = described(case)
        print(sheet.document["batch"], flush=True)
        for row in heads(case, sheet):
            sheet.append(row)
        for row in whole_model(config, given, case):
            sheet.append(row)
    own = [row for row in sheet.rows if row["provider"].startswith(OWN)]
    return bool(own) and all(row["within"] for row in own)


def described(case: Case) -> dict[str, Any]:
    """Describe a batch: its sizes, and how far the old and the reference policies are."""
    mask, advantages = case.given["mask"], case.given["advantages"]
    logps = reference.logprob(case.hidden[mask] @ case.weight.mT, case.ids[mask])
    ratios = (logps - case.given["old_logps"][mask]).exp()
    outside = (ratios < 1 - OBJECTIVE.epsilon_low) | (ratios > 1 + OBJECTIVE.epsilon_high)
    B, T, D = case.hidden.shape
    return {
        "completions": B,
        "tokens": int(mask.sum()),
        "longest": T,
        "shortest": int(mask.sum(1).min()),
        "hidden_size": D,
        "vocabulary": len(case.weight),
        "with_advantage": int((advantages != 0).sum()),
        "mean_log_prob": logps.mean().item(),
        "ratio_min": ratios.min().item(),
        "ratio_max": ratios.max().item(),
        "outside_clip_range": outside.float().mean().item(),
        "mean_gap_to_reference": (case.given["ref_logps"][mask] - logps).abs().mean().item(),
        "beta": OBJECTIVE.beta,
    }


def heads(case: Case, sheet: Sheet) -> Iterator[dict[str, Any]]:
    """Yield the rows of the loss from hidden states, in each dtype, and of the interpreted kernels."""
    size = case.given["advantages"].abs().mean()
    for dtype in DTYPES:
        here = case.rounded(dtype)
        exact, baseline = truth(here), results_of(PLAIN, here)
        for provider in PROVIDERS:
            try:
                found = baseline if provider == PLAIN else results_of(provider, here)
            except (providers.UnavailableError, ImportError) as reason:
                sheet.skip(provider, str(reason))
                continue
            yield from rows_of(provider, dtype, found, baseline, exact, size)
            del found
    part = case.part(*SLICE)
    try:
        found = interpreted(part)
    except providers.UnavailableError as reason:
        sheet.skip(INTERPRETED, str(reason))
        return
    size = part.given["advantages"].abs().mean()
    yield from rows_of(
        INTERPRETED, torch.float32, found, results_of(PLAIN, part), truth(part), size
    )


def whole_model(config: TrainConfig, given: setup.Sampled, case: Case) -> Iterator[dict[str, Any]]:
    """Yield the rows of the gradient of all weights, through the whole model in float32.

    Plain PyTorch is the model's own logits and the specification; the truth is the same in float64.
    """
    some = torch.arange(WHOLE_GROUPS * config.group_size)
    values = {name: x[some] for name, x in case.given.items()}
    part = given._replace(
        rollout=given.rollout[some],
        rewards=given.rewards[some],
        advantages=given.advantages[some],
    )
    model = given.policy.model
    size = values["advantages"].abs().mean()

    def of_logits(dtype: torch.dtype) -> Results:
        model.to(dtype)
        exactly = norms_in_float64(model) if dtype is torch.float64 else contextlib.nullcontext()
        try:
            with exactly:
                logits = completion_logits(model, part.rollout)
                ids = part.rollout.completion_ids
                return _gradients(model, plain.loss_of_logits(logits, ids, values, OBJECTIVE))
        finally:
            model.float()  # which rounds nothing: the weights were float32

    exact, baseline = of_logits(torch.float64), of_logits(torch.float32)
    yield from rows_of("plain model", torch.float32, baseline, baseline, exact, size)
    routes: tuple[Literal["off", "auto"], ...] = ("off", "auto")
    for route in routes:
        config.share_prompts = route
        forward, batch = setup.planned(config, part)
        forward.objective = OBJECTIVE
        batch.old_logps, batch.ref_logps = values["old_logps"], values["ref_logps"]
        found = _gradients(model, forward.loss(batch, with_entropy=False).loss)
        who = f"{OWN}, share_prompts={route}"
        yield from rows_of(who, torch.float32, found, baseline, exact, size)


@contextlib.contextmanager
def norms_in_float64(model: Any) -> Iterator[None]:
    """Let the RMS norms of a model compute in the dtype of their input: transformers' own use float32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        variance = x.square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    kinds = {type(m) for m in model.modules() if hasattr(m, "variance_epsilon")}
    with contextlib.ExitStack() as patches:
        for kind in kinds:
            patches.enter_context(mock.patch.object(kind, "forward", forward))
        yield


def _gradients(model: Any, loss: Tensor) -> Results:
    """Return a loss and the gradients of all weights in one row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters)
    return {"loss": loss.detach(), "d weights": torch.cat([g.flatten() for g in grads])}
