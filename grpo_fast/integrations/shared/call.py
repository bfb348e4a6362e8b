"""One call of a host's policy loss in this library's terms: tensors, objective, average; what comes of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from grpo_fast import weights
from grpo_fast.diagnostics import TokenDiagnostics, token_diagnostics
from grpo_fast.integrations.shared.options import At, objective_of
from grpo_fast.loss import LossOutput, policy_loss
from grpo_fast.objective import Objective
from grpo_fast.sequences import sum_over_sequence


class Average(NamedTuple):
    """How a host averages, as a reduction and its denominator, and a factor on the loss."""

    reduction: dict[str, Any]
    num_items: float | Tensor | None
    scale: float | Tensor


SUM = Average({"reduction": "token_mean"}, 1.0, 1.0)


def token_average(num_items: float | Tensor | None = None, scale: float = 1.0) -> Average:
    """The mean over live tokens, or by the `num_items` of the global batch, which may be below 1."""
    if num_items is None:
        return Average({"reduction": "token_mean"}, None, scale)
    return SUM._replace(scale=scale / _not_zero(num_items))


def sequence_average(
    reduction: str, mask: Tensor, global_batch_size: float | Tensor | None, dp_size: float
) -> Average:
    """The mean over the sequences that have a live token, here or in the global batch."""
    if global_batch_size is None:
        global_batch_size = (mask != 0).any(-1).sum()
    # The reduction counts every sequence at hand.
    scale = len(mask) / _not_zero(global_batch_size) * dp_size
    return Average({"reduction": reduction}, None, scale)


@overload
def _not_zero(count: Tensor) -> Tensor: ...
@overload
def _not_zero(count: float | Tensor) -> float | Tensor: ...
def _not_zero(count: float | Tensor) -> float | Tensor:
    """A denominator, 1 in place of 0: without a live token the loss is 0, not NaN."""
    return count.where(count != 0, 1) if isinstance(count, Tensor) else count or 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """Arguments of `policy_loss`, tensors (B, T) or packed; loss and diagnostics when they are asked for."""

    preset: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # over the preset's
    average: Average
    logps: Tensor
    old_logps: Tensor | None
    advantages: Tensor
    mask: Tensor
    ref_logps: Tensor | None = None
    importance_weights: Tensor | None = None
    token_weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    kept: Tensor | None = None  # by Clip-Cov, as weights
    config: Any = None  # the host's
    names: Mapping[str, At] = dataclasses.field(default_factory=dict)  # of the options there

    def but(self, **changes: Any) -> "Call":
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def objective(self) -> Objective:
        return objective_of(self.preset, {**self.average.reduction, **self.options}, self.names)

    @functools.cached_property
    def out(self) -> LossOutput:
        """The loss, averaged as the host does."""
        scale = self.average.scale
        return policy_loss(
            self.logps,
            advantages=self.advantages,
            mask=self.mask,
            old_logps=self.old_logps,
            ref_logps=self.ref_logps,
            importance_weights=self.importance_weights,
            token_weights=self.token_weights,
            num_items=self.average.num_items,
            loss_scale=scale.detach().reshape(()) if isinstance(scale, Tensor) else float(scale),
            cu_seqlens=self.cu_seqlens,
            objective=self.objective,
        )

    @functools.cached_property
    def token(self) -> TokenDiagnostics:
        """What the same objective makes of each token."""
        return token_diagnostics(
            self.logps,
            self.old_logps,
            self.advantages,
            mask=self.mask,
            ref_logps=self.ref_logps,
            cu_seqlens=self.cu_seqlens,
            objective=self.objective,
        )

    @property
    def old(self) -> Tensor:
        if self.old_logps is None:
            raise ValueError(f"{self.preset}: the old policy's log-probs are needed")
        return self.old_logps

    @property
    def change(self) -> Tensor:
        """log pi - log pi_old of each token, as it is; 0 on policy."""
        old = self.logps if self.old_logps is None else self.old_logps
        return (self.logps - old).detach()

    def mean(self, x: Tensor) -> Tensor:
        return masked_mean(x, self.mask)

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest over live tokens, inf and -inf without any."""
        live = self.mask != 0
        return x.where(live, torch.inf).amin(), x.where(live, -torch.inf).amax()

    def clip_cov(self, **options: Any) -> "Call":
        """The same with the tokens that Clip-Cov drops weighing nothing."""
        given = self.importance_weights
        kept = weights.clip_cov(
            self.logps.detach(),
            self.old,
            self.advantages,
            mask=self.mask,
            **self.options,
            **options,
        )
        return self.but(kept=kept, importance_weights=kept if given is None else kept * given)

    def kl_cov(self, fraction: float) -> "Call":
        """The same with a reference: where the covariance is highest the old policy, else itself."""
        logps = self.logps.detach()
        chosen = weights.kl_cov(logps, self.advantages, mask=self.mask, fraction=fraction)
        return self.but(ref_logps=torch.where(chosen, self.old, logps))

    def report(self, metrics: Mapping[str, "Metric"]) -> dict[str, float]:
        """The host's metrics, by its names."""
        return as_floats({name: metric(self) for name, metric in metrics.items()})


Metric = Callable[[Call], Tensor | float]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x, floating or bool, over live tokens, detached; 0 without any.

    A floating mask weighs, in the sum and in the count.
    """
    live = mask != 0
    weight = mask if mask.is_floating_point() else live
    total = (torch.where(live, x.detach(), 0) * weight).sum(dtype=torch.float32)
    return total / _not_zero(weight.sum(dtype=torch.float32))


def sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Per token: the mean of x over the live tokens of its sequence, 0 without any; fractions weigh."""
    live, weight = mask != 0, mask.to(x.dtype)
    total = sum_over_sequence(x * weight, live, cu_seqlens)
    return total / _not_zero(sum_over_sequence(weight, live, cu_seqlens))


def clip_fraction(call: Call) -> Tensor:
    """The share of tokens whose ratio is out of the range on the side that their advantage bounds."""
    return call.out.metrics["clip_fraction_low"] + call.out.metrics["clip_fraction_high"]


def dual_fraction(call: Call) -> Tensor:
    return call.out.metrics["clip_fraction_dual"]


def outside(call: Call) -> Tensor:
    """The share beyond what the surrogate bounds, whatever the advantage."""
    return call.mean(call.token.outside)


def changed_by_clamp(token: TokenDiagnostics) -> Tensor:
    """Where a clamp to the bounds changes the ratio, or the ratio is NaN: `clamped != ratio` of a host."""
    return token.outside | token.ratio.isnan()


def changed_fraction(call: Call) -> Tensor:
    """The share of tokens whose ratio the bounds change."""
    return call.mean(changed_by_clamp(call.token))


def dropped_fraction(call: Call) -> Tensor:
    """The share that Clip-Cov drops."""
    assert call.kept is not None
    return call.mean(call.kept == 0)


def nothing(call: Call) -> float:
    return 0.0


def as_floats(metrics: dict[str, Tensor | float]) -> dict[str, float]:
    """The same as Python numbers, for hosts that want them: one host sync for all."""
    tensors = [torch.as_tensor(x, dtype=torch.float32) for x in metrics.values()]
    if not tensors:
        return {}
    device = max((x.device for x in tensors), key=lambda device: device.type != "cpu")
    values = torch.stack([x.detach().to(device) for x in tensors]).tolist()
    return dict(zip(metrics, values, strict=True))
