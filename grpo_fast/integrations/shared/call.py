"""`LossCall`: one call of a host's policy loss, its average and its metrics, in this library's terms."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from grpo_fast import weights
from grpo_fast.diagnostics import TokenDiagnostics, token_diagnostics
from grpo_fast.integrations.shared.options import Entry, objective_of
from grpo_fast.loss import LossOutput, policy_loss
from grpo_fast.objective import Objective
from grpo_fast.sequences import sum_over_sequence


class Average(NamedTuple):
    """The way a host averages: a reduction, its denominator, and a factor on the loss."""

    reduction: dict[str, Any]  # options of `Objective`
    num_items: float | Tensor | None
    scale: float | Tensor


SUM = Average({"reduction": "token_mean"}, 1.0, 1.0)


def token_average(num_items: float | Tensor | None = None, scale: float = 1.0) -> Average:
    """Divide the sum by the live tokens, or by `num_items`, those of the global batch (may be below 1)."""
    if num_items is None:
        return Average({"reduction": "token_mean"}, None, scale)
    return SUM._replace(scale=scale / _not_zero(num_items))


def sequence_average(
    reduction: str, mask: Tensor, global_batch_size: float | Tensor | None, dp_size: float
) -> Average:
    """Divide the sum over sequences by those with a live token, here or in the global batch."""
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
    """Return the denominator, and 1 in place of 0: without a live token the loss is 0, not NaN."""
    return count.where(count != 0, 1) if isinstance(count, Tensor) else count or 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LossCall:
    """The arguments of one `policy_loss`, (B, T) or packed; loss and diagnostics are computed when read."""

    preset: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # override the preset
    average: Average
    logps: Tensor
    old_logps: Tensor | None
    advantages: Tensor
    mask: Tensor
    ref_logps: Tensor | None = None
    importance_weights: Tensor | None = None
    token_weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    kept: Tensor | None = None  # Clip-Cov: 1 for tokens that are kept, 0 for others
    config: Any = None  # the host's configuration
    names: Mapping[str, Entry] = dataclasses.field(
        default_factory=dict
    )  # where the host has each option

    def replace(self, **changes: Any) -> "LossCall":
        """Return a call with other arguments."""
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
        """The ratio, the KL and the clip flags of each token, by the same objective."""
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
        """log pi - log pi_old of each token, without a clamp; 0 on policy."""
        old = self.logps if self.old_logps is None else self.old_logps
        return (self.logps - old).detach()

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of x over live tokens."""
        return masked_mean(x, self.mask)

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest x of a live token; inf and -inf if there is none."""
        live = self.mask != 0
        return x.where(live, torch.inf).amin(), x.where(live, -torch.inf).amax()

    def clip_cov(self, **options: Any) -> "LossCall":
        """Return the call in which the tokens that Clip-Cov drops have the weight 0."""
        given = self.importance_weights
        kept = weights.clip_cov(
            self.logps.detach(),
            self.old,
            self.advantages,
            mask=self.mask,
            **self.options,
            **options,
        )
        return self.replace(kept=kept, importance_weights=kept if given is None else kept * given)

    def kl_cov(self, fraction: float) -> "LossCall":
        """Return the call with KL-Cov's penalty: the tokens of the highest covariance have a KL.

        Their reference is the old policy. That of the other tokens is the policy itself, so their KL is 0.
        """
        logps = self.logps.detach()
        chosen = weights.kl_cov(logps, self.advantages, mask=self.mask, fraction=fraction)
        return self.replace(ref_logps=torch.where(chosen, self.old, logps))

    def report(self, metrics: Mapping[str, "Metric"]) -> dict[str, float]:
        """Compute the host's metrics, by its names."""
        return as_floats({name: metric(self) for name, metric in metrics.items()})


Metric = Callable[[LossCall], Tensor | float]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of x over live tokens, detached; 0 if there are none.

    x is floating or bool. A floating mask is a weight, in the sum and in the count.
    """
    live = mask != 0
    weight = mask if mask.is_floating_point() else live
    total = (torch.where(live, x.detach(), 0) * weight).sum(dtype=torch.float32)
    return total / _not_zero(weight.sum(dtype=torch.float32))


def sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Give each token the mean of x over its sequence's live tokens; 0 if there are none.

    A floating mask is a weight.
    """
    live, weight = mask != 0, mask.to(x.dtype)
    total = sum_over_sequence(x * weight, live, cu_seqlens)
    return total / _not_zero(sum_over_sequence(weight, live, cu_seqlens))


def clip_fraction(call: LossCall) -> Tensor:
    """Return the share of tokens whose ratio is out of range on the side that the advantage bounds."""
    return call.out.metrics["clip_fraction_low"] + call.out.metrics["clip_fraction_high"]


def dual_fraction(call: LossCall) -> Tensor:
    """Return the share of tokens that the dual clip bounds."""
    return call.out.metrics["clip_fraction_dual"]


def outside(call: LossCall) -> Tensor:
    """Return the share of tokens beyond the bounds of the surrogate, whatever their advantage."""
    return call.mean(call.token.outside)


def changed_by_clamp(token: TokenDiagnostics) -> Tensor:
    """Return where a host finds `clamped != ratio`: the ratio is out of bounds, or NaN."""
    return token.outside | token.ratio.isnan()


def changed_fraction(call: LossCall) -> Tensor:
    """Return the share of tokens whose ratio the bounds change."""
    return call.mean(changed_by_clamp(call.token))


def dropped_fraction(call: LossCall) -> Tensor:
    """Return the share of tokens that Clip-Cov drops."""
    assert call.kept is not None
    return call.mean(call.kept == 0)


def nothing(call: LossCall) -> float:
    """Return 0: hosts log it where nothing is clipped."""
    return 0.0


def as_floats(metrics: dict[str, Tensor | float]) -> dict[str, float]:
    """Return metrics as Python numbers, with one host sync for all of them."""
    tensors = [torch.as_tensor(x, dtype=torch.float32) for x in metrics.values()]
    if not tensors:
        return {}
    device = max((x.device for x in tensors), key=lambda device: device.type != "cpu")
    values = torch.stack([x.detach().to(device) for x in tensors]).tolist()
    return dict(zip(metrics, values, strict=True))
