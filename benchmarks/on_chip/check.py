"""The batches of `on_chip.py`, and whether its kernel is right on them."""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.inputs import batches as inputs
from benchmarks.inputs import shapes
from benchmarks.on_chip.build import SHAPE
from benchmarks.on_chip.driver import Kernel
from grpo_fast import reference
from grpo_fast.kernels import grpo, on_chip
from grpo_fast.records import Rewards, Targets, Tokens
from grpo_fast.reference import kl_estimate

CHECKED = shapes.Shape(B=8, T=128, V=shapes.CUDA[SHAPE].V, G=4)
ROWS_AT_ONCE = 64  # whose float64 gradient is taken
FACTOR, FLOOR = 2.0, 1e-5  # as `grpo_fast.testing.assert_as_accurate` has them


@dataclasses.dataclass
class Rows:
    """A batch as both kernels take it: (N,) each, and (N, V) logits."""

    batch: inputs.Batch
    logits: Tensor
    ids: Tensor
    mask: Tensor
    weight: Tensor
    advantages: Tensor
    old_logp: Tensor
    ref_logp: Tensor

    @staticmethod
    def make(shape: shapes.Shape, variant: str, device: torch.device) -> "Rows":
        batch = inputs.make_batch(shape, variant, device, torch.bfloat16)
        assert batch.logits is not None
        given = batch.arguments
        mask = given["mask"]
        if mask is None:
            mask = torch.ones_like(batch.ids, dtype=torch.bool)
        weight = mask / (mask.sum(1, keepdim=True).clamp(min=1) * shape.B)
        advantages = given["advantages"][:, None].expand(shape.B, shape.T)
        return Rows(
            batch,
            batch.logits.flatten(0, 1),
            batch.ids.flatten(),
            mask.flatten().contiguous(),
            weight.float().flatten(),
            advantages.flatten().contiguous(),
            given["old_logps"].flatten(),
            given["ref_logps"].flatten(),
        )

    def run(self, kernel: Kernel, logits: Tensor, dlogits: Tensor) -> dict[str, Tensor]:
        """Launch the kernel that keeps rows on the chip; loss, log-prob and KL of each row."""
        with mock.patch.object(on_chip, "_on_chip_kernel", kernel):
            return self.launch(on_chip.grpo_fwd_bwd, logits, dlogits)

    def run_own(self, logits: Tensor, dlogits: Tensor) -> dict[str, Tensor]:
        """Launch the kernel that reads rows twice on the same rows; its loss, log-prob and KL of each."""
        return self.launch(grpo.grpo_fwd_bwd, logits, dlogits)

    def launch(
        self, launcher: Callable[..., Any], logits: Tensor, dlogits: Tensor
    ) -> dict[str, Tensor]:
        shape = self.batch.shape
        given = (self.weight, self.advantages, self.old_logp, self.ref_logp)
        out = launcher(
            logits.view(shape.B, shape.T, shape.V),
            Targets(self.ids, self.mask, None, 1.0),
            Tokens(*given, importance=None, score=None, entropy_weight=None, coefficient=None),
            Rewards(None, shape.G, None),
            return_entropy=False,
            objective=self.batch.objective,
            dlogits=dlogits.view(shape.B, shape.T, shape.V),
        )
        return {"loss": out.loss, "logp": out.logp, "kl": out.kl}

    def expected(self, rows: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        """The reference's results for some rows in `dtype`; the gradient in the logits' dtype or float64."""
        objective, live = self.batch.objective, self.mask[rows]
        z = self.logits[rows].to(dtype).requires_grad_()
        given = (self.weight, self.advantages, self.old_logp, self.ref_logp)
        weight, advantages, old, ref = (x[rows].to(dtype) for x in given)
        logp = reference.logprob(z, self.ids[rows])
        terms = reference.policy_terms(logp, advantages, objective, old, ref)
        kl = kl_estimate(logp, ref, (logp - old).exp(), objective)
        loss = torch.where(live, weight * terms, 0)
        (grad,) = torch.autograd.grad(loss.sum(), z)
        grad = torch.where(live[:, None], grad, 0)
        values = {"loss": loss, "logp": logp, "kl": kl}
        values = {name: torch.where(live, x, 0).detach() for name, x in values.items()}
        return {**values, "gradient": grad if dtype == torch.float64 else grad.bfloat16()}


def check(kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Whether the kernel is right, in place and not: errors against float64 beside plain PyTorch's."""
    rows = Rows.make(CHECKED, "padded", device)
    sure = torch.arange(0, CHECKED.N, 16, device=device)  # tokens with p next to 1
    rows.logits[sure, rows.ids[sure]] += 12.0
    poisoned = torch.where(rows.mask[:, None], rows.logits, torch.nan)
    apart, within = torch.full_like(poisoned, torch.nan), poisoned.clone()
    results = {
        "apart": {**rows.run(kernel, poisoned, apart), "gradient": apart},
        "within": {**rows.run(kernel, within, within), "gradient": within},
    }
    own = poisoned.clone()
    results["grpo_fast"] = {**rows.run_own(own, own), "gradient": own}
    torch.cuda.synchronize()
    report: dict[str, Any] = {
        "masked_rows": int((~rows.mask).sum()),
        "same_bits": all(
            torch.equal(results["apart"][name], x)  # noqa: TID251 (the answer is a result)
            for name, x in results["within"].items()
        ),
        "errors": {},
    }
    report["errors"] = errors(rows, results)
    report["right"] = report["same_bits"] and all(
        entry[name] <= FACTOR * entry["plain"] + FLOOR * entry["largest"] + 1e-15
        for entry in report["errors"].values()
        for name in ("apart", "within")
    )
    return report


def errors(rows: Rows, results: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """The largest error of each result, by quantity.

    "scored" is the gradient of the scored logits in units of the weight times 1 - p, which is all that is
    left of it where a token is confident.
    """
    found: dict[str, dict[str, float]] = {}

    def note(quantity: str, who: str, x: Tensor) -> None:
        entry = found.setdefault(quantity, {})
        worst = x.nan_to_num(nan=torch.inf).max().item()
        entry[who] = max(entry.get(who, 0.0), worst)

    for start in range(0, len(rows.ids), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        truth = rows.expected(some, torch.float64)
        scored = rows.ids[some, None]
        unit = rows.weight[some].double() * -torch.expm1(truth["logp"])
        unit = torch.where(rows.mask[some], unit, 1.0)[:, None]
        everyone = {"plain": rows.expected(some, torch.float32)}
        everyone |= {
            who: {name: x[some] for name, x in result.items()} for who, result in results.items()
        }
        for name, true in truth.items():
            note(name, "largest", true.abs())
            for who, result in everyone.items():
                error = (result[name].double() - true).abs()
                note(name, who, error)
                if name == "gradient":
                    note("scored", who, error.gather(1, scored) / unit)
        note("scored", "largest", truth["gradient"].gather(1, scored).abs() / unit)
    return found
