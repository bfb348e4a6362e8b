"""What the adapters share: reading a host's configuration, its ways to average, its version."""

import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from grpo_fast.diagnostics import TokenDiagnostics, token_diagnostics
from grpo_fast.loss import LossOutput, policy_loss
from grpo_fast.objective import Objective
from grpo_fast.weights import clip_cov, kl_cov

REQUIRED: Any = object()


def read(config: Any, path: str, default: Any = REQUIRED) -> Any:
    """`config.a.b` for the path "a.b": of objects, mappings and OmegaConf nodes alike.

    Raises:
        AttributeError: nothing of that name and no default.
    """
    for name in path.split("."):
        # A dict has methods of its own; a configuration class may be a mapping as well as an object.
        value = REQUIRED if isinstance(config, dict) else getattr(config, name, REQUIRED)
        if value is REQUIRED and isinstance(config, Mapping):
            value = config.get(name, REQUIRED)
        if value is REQUIRED:
            if default is REQUIRED:
                raise AttributeError(f"the configuration has no {path!r}: {config!r}")
            return default
        config = value
    return config


def bounds(config: Any, low: str, high: str, both: str) -> dict[str, float]:
    """`epsilon_low` and `epsilon_high` where a host has a common one for those that are None."""
    common = read(config, both)
    given = {"epsilon_low": read(config, low, None), "epsilon_high": read(config, high, None)}
    return {name: common if value is None else value for name, value in given.items()}


class Average(NamedTuple):
    """How a host averages, as a reduction and its denominator, and a factor on the loss."""

    reduction: dict[str, Any]
    num_items: float | Tensor | None
    scale: float | Tensor


def sequence_average(
    reduction: str, mask: Tensor, global_batch_size: float | Tensor | None, dp_size: float
) -> Average:
    """The mean over the sequences that have a live token, here or in the global batch."""
    if global_batch_size is None:
        global_batch_size = (mask != 0).any(-1).sum().clamp(min=1)
    # The reduction counts every sequence at hand.
    return Average({"reduction": reduction}, None, len(mask) / global_batch_size * dp_size)


def averaged_loss(
    average: Average, preset: str, options: dict[str, Any], **arguments: Any
) -> LossOutput:
    """`policy_loss` of a preset with the host's options, averaged as the host does."""
    objective = Objective.preset(preset, **{**average.reduction, **options})
    out = policy_loss(**arguments, num_items=average.num_items, objective=objective)
    return out._replace(loss=out.loss * average.scale)


SUM = Average({"reduction": "token_mean"}, 1.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a host's policy loss, tensors (B, T): what verl and SkyRL, its heir, have in common."""

    host: ClassVar[str]  # whose presets

    logp: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    config: Any
    weights: Tensor | None = None  # on the surrogate

    def averaged(self, how: Average, preset: str, options: dict, **extra: Any) -> LossOutput:
        """The loss of a preset with the host's options."""
        return averaged_loss(
            how,
            f"{self.host}/{preset}",
            options,
            logps=self.logp,
            old_logps=self.old,
            advantages=self.advantages,
            mask=self.mask,
            **({"importance_weights": self.weights} | extra),
        )

    def diagnose(self, preset: str, options: dict) -> TokenDiagnostics:
        """What the same objective makes of each token."""
        objective = Objective.preset(f"{self.host}/{preset}", **options)
        return token_diagnostics(
            self.logp, self.old, self.advantages, mask=self.mask, objective=objective
        )

    def mean(self, x: Tensor) -> Tensor:
        return masked_mean(x, self.mask)

    def clip_cov(self, **options: Any) -> Tensor:
        """Which tokens Clip-Cov keeps, as weights."""
        return clip_cov(self.logp.detach(), self.old, self.advantages, mask=self.mask, **options)

    def kl_cov(self, how: Average, fraction: float, coef: float, **extra: Any) -> LossOutput:
        """KL-Cov: a penalty on the distance to the old policy where the covariance is highest."""
        logp = self.logp.detach()
        chosen = kl_cov(logp, self.advantages, mask=self.mask, fraction=fraction)
        ref = torch.where(chosen, self.old, logp)  # elsewhere the distance to itself: 0
        return self.averaged(how, "kl_cov", {"beta": coef}, ref_logps=ref, **extra)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x, floating or bool, over live tokens, detached; 0 without any."""
    live = mask != 0
    return torch.where(live, x.detach(), 0).sum(dtype=torch.float32) / live.sum().clamp(min=1)


def clip_fraction(out: LossOutput) -> Tensor:
    """The share of tokens whose ratio is out of the range on the side that their advantage bounds."""
    return out.metrics["clip_fraction_low"] + out.metrics["clip_fraction_high"]


def as_floats(metrics: dict[str, Tensor | float]) -> dict[str, float]:
    """The same as Python numbers, for hosts that want them: one host sync for all."""
    tensors = [torch.as_tensor(x, dtype=torch.float32) for x in metrics.values()]
    if not tensors:
        return {}
    device = max((x.device for x in tensors), key=lambda device: device.type != "cpu")
    values = torch.stack([x.detach().to(device) for x in tensors]).tolist()
    return dict(zip(metrics, values, strict=True))


def require(package: str, at_least: str, below: str | None = None) -> None:
    """Check that a host is installed in a version this adapter was written for.

    Raises:
        ImportError: it is not installed, older, or as new as `below`.
    """
    wanted = f"this needs {package} >= {at_least}" + (f", < {below}" if below else "")
    found: str | None
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path says it itself
        found = getattr(sys.modules.get(package), "__version__", None)
    if found is None:
        raise ImportError(f"{wanted}, which is not installed")

    def numbers(version: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", version)[:3]]

    if numbers(found) < numbers(at_least) or (below and numbers(found) >= numbers(below)):
        raise ImportError(f"{wanted}; {package} {found} is installed")


def replace(package: str, theirs: Any, ours: Any) -> None:
    """Put `ours` wherever a loaded module of the package has the name of `theirs` bound to it."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for key, value in list(vars(module).items()):
                if value is theirs:
                    setattr(module, key, ours)
