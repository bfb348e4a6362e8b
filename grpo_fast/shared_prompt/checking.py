"""`check`: the shared forward against the unshared one, on a user's own model and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.integrations.shared.model_head import Head
from grpo_fast.integrations.transformers import causal_lm, is_sharded, text_config
from grpo_fast.ops.linear_logprob import linear_logprob
from grpo_fast.shared_prompt.choice import active_dropout, choose
from grpo_fast.shared_prompt.passes import with_head
from grpo_fast.shared_prompt.plans import Plan
from grpo_fast.shared_prompt.trial import precision

TOLERANCE = 1e-5  # in float32


@dataclasses.dataclass(frozen=True)
class Report:
    """How far the shared forward is from the unshared one.

    Attributes:
        route: the route that was compared, and in `reason` why it was chosen.
        log_prob: the largest difference of a log-prob, in nats.
        gradient: the norm of the difference of the gradients, divided by the norm of the gradient.
        by_padding: the largest difference of a log-prob between the unshared forwards of the padded batch
            and of its sequences one at a time: what the model's own rounding and padding change.
        tolerance: of log-probs and of the gradient.
        cause: what explains a difference beyond the tolerance; None if there is none.
    """

    route: str
    reason: str
    log_prob: float
    gradient: float
    by_padding: float
    tolerance: float
    cause: str | None

    @property
    def exact(self) -> bool:
        """Whether both differences are within the tolerance."""
        return max(self.log_prob, self.gradient) <= self.tolerance

    def __str__(self) -> str:
        lines = [
            f"shared prompts, route {self.route} ({self.reason}):",
            f"  largest difference of a log-prob: {self.log_prob:.1e} nats",
            f"  difference of the gradient: {self.gradient:.1e} of its norm",
            f"  within the tolerance of {self.tolerance:.1e}"
            if self.exact
            else f"  beyond the tolerance of {self.tolerance:.1e}: {self.cause}",
        ]
        return "\n".join(lines)


def check(model: nn.Module, plan: Plan, *, route: str = "auto", verbose: bool = True) -> Report:
    """Compare the shared forward with the unshared one: log-probs and gradient.

    The gradient is that of the sum of the log-probs times fixed random weights. The parameters and their
    `.grad` do not change. It needs the memory of the unshared forward and backward, and two copies of the
    gradient.

        >>> lm = tiny_causal_lm()
        >>> plan = shared_prompt.plan(torch.full((4, 30), 5), torch.full((4, 3), 6))
        >>> assert shared_prompt.check(lm, plan, verbose=False).exact

    Args:
        model, plan: as in `forward`. Of DDP the model inside is compared.
        route: as in `forward`.
        verbose: print the report.

    Returns:
        A `Report`; `exact` says whether both differences are within its tolerance.

    Raises:
        TypeError: the weights are sharded (FSDP, ZeRO-3): compare before they are.
        ValueError: as in `forward`; or the plan has no targets.
    """
    lm = causal_lm(model)
    if is_sharded(model):
        raise TypeError("shared_prompt.check: the weights are sharded: compare before they are")
    if not plan.targets.numel():
        raise ValueError("shared_prompt.check: plan: it has no targets")
    choice = choose(model, plan, route)
    want, whole = _log_probs(lm, plan, "unshared")
    got, shared = _log_probs(lm, plan, choice.route)
    norm = sum(float(x.double().square().sum()) for x in whole) ** 0.5
    other = sum(float((x - y).double().square().sum()) for x, y in zip(whole, shared, strict=True))
    alone = torch.cat([_alone(lm, plan, b) for b in range(len(plan.completion_lengths))])
    tolerance = TOLERANCE * max(1.0, precision(lm) / torch.finfo(torch.float32).eps)
    report = Report(
        route=choice.route,
        reason=choice.reason,
        log_prob=float((got - want).abs().max()),
        gradient=other**0.5 / max(norm, 1e-30),
        by_padding=float((alone - want).abs().max()),
        tolerance=tolerance,
        cause=None,
    )
    if not report.exact:
        report = dataclasses.replace(report, cause=_cause(lm, report))
    if verbose:
        print(report)
    return report


def _score(plan: Plan) -> Callable[[Tensor, Head], Tensor]:
    def score(hidden: Tensor, head: Head) -> Tensor:
        return linear_logprob(hidden, head.weight, plan.targets, **head.options)

    return score


def _log_probs(lm: nn.Module, plan: Plan, route: str) -> tuple[Tensor, list[Tensor]]:
    """Compute the log-probs of a plan by one route, and the gradient of their weighted sum."""
    parameters = [x for x in lm.parameters() if x.requires_grad]
    weights = torch.randn(len(plan.targets), generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        found = with_head(lm, plan, _score(plan), route=route)
        total = (found * weights.to(found)).sum()
        gradient = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
    zeros = (torch.zeros_like(x) for x in parameters)
    return found.detach(), [z if g is None else g for g, z in zip(gradient, zeros, strict=True)]


@torch.no_grad()
def _alone(lm: nn.Module, plan: Plan, b: int) -> Tensor:
    """Compute the log-probs of one completion without other sequences beside it, and without padding."""
    own = plan.completions(torch.tensor([b]))
    part, _ = own.prompt(int(own.prompt_of[0]))
    return with_head(lm, part, _score(part), route="unshared")


def _cause(lm: Any, report: Report) -> str:
    """Name what is known to make the two forwards differ."""
    dropout = active_dropout(lm)
    if dropout:
        return f"{dropout}: each forward draws another one; use model.eval()"
    config = text_config(lm)
    noise = 4 * report.by_padding
    if report.log_prob <= noise:
        return (
            f"rounding of the model: the same sequences without padding differ by {report.by_padding:.1e} "
            "nats in the unshared forward, too"
        )
    if getattr(config, "num_experts_per_tok", None):
        return "rounding can send a token to other experts where two of them have almost the same score"
    if lm.dtype != torch.float32:
        return f"perhaps rounding in {lm.dtype}: compare in float32, where it is small"
    return (
        "unknown: the code of this model may look at the batch as a whole. Use route='unshared', and "
        "report it"
    )
