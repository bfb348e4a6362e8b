"""The worst relative error of every objective against float64, as the table in docs/objectives.md has it.

    python -m tests.support.accuracy                                              # prints the rows
    TRITON_INTERPRET=1 GRPO_FAST_BACKEND=triton python -m tests.support.accuracy  # of the kernels
    python -m tests.support.accuracy topr "kl='k3'"                               # these rows alone

The numbers are twice the errors, rounded to one digit.

Of the loss: abs(error) / abs(truth). Of the gradient: the largest error of an element over the largest
element of the truth. float32 logits, ragged rows, one of them empty; per-token advantages, all of one sign in
a batch, since a loss whose terms cancel has no relative error; the worst of several batches.
"""

import sys
from typing import get_args

import torch
from torch import Tensor

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss
from grpo_fast.objective import KL, Surrogate

BATCHES = 5
CASES: dict[str, Objective] = {
    **{name: Objective(surrogate=name) for name in get_args(Surrogate)},
    "ratio='sequence'": Objective(ratio="sequence"),
    "ratio='sequence_token'": Objective(ratio="sequence_token"),
    **{f"kl='{name}'": Objective(kl=name, beta=0.5) for name in get_args(KL)},
    "entropy_coef": Objective(entropy_coef=0.1),
    "top_entropy_quantile": Objective(top_entropy_quantile=0.3),
}


def batch(seed: int, B: int = 4, T: int = 6, V: int = 500) -> tuple[Tensor, Tensor, dict]:
    """(logits, ids, arguments), drawn from `seed`; of peaked rows, off policy."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    logits = 4 * normal(B, T, V)
    ids = logits.add(normal(B, T, V)).argmax(-1)  # a likely token, as a sample is
    lengths = torch.randint(1, T + 1, (B,), generator=rng)
    lengths[1] = 0
    logp = reference.logprob(logits, ids)
    arguments = {
        "mask": torch.arange(T) < lengths[:, None],
        "advantages": normal(B, T).abs() * (-1) ** seed,
        "old_logps": logp + 0.2 * normal(B, T),
        "ref_logps": logp + 0.2 * normal(B, T),
    }
    return logits, ids, arguments


def errors(objective: Objective, device: str | torch.device = "cpu") -> tuple[float, float]:
    """(of the loss, of the gradient), the worst of `BATCHES` batches."""
    worst = [0.0, 0.0]
    for seed in range(BATCHES):
        logits, ids, arguments = batch(seed)
        logits, ids = logits.to(device), ids.to(device)
        arguments = {name: x.to(device) for name, x in arguments.items()}
        ours = logits.clone().requires_grad_()
        loss = grpo_loss(ours, ids, **arguments, objective=objective).loss
        (grad,) = torch.autograd.grad(loss, ours)
        exact = logits.double().requires_grad_()
        arguments = {k: x.double() if x.is_floating_point() else x for k, x in arguments.items()}
        truth = reference.grpo_loss(exact, ids, **arguments, objective=objective)
        (want,) = torch.autograd.grad(truth, exact)
        worst[0] = max(worst[0], ((loss - truth) / truth).abs().item())
        worst[1] = max(worst[1], ((grad - want).abs().max() / want.abs().max()).item())
    return worst[0], worst[1]


def ceiling(x: float) -> float:
    """`x` with room for another machine's rounding, and as one digit."""
    return float(f"{2 * x + 1e-9:.0e}")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = sys.argv[1:] or list(CASES)
    for name in names:
        if name not in CASES:
            sys.exit(f"accuracy: {name!r} is unknown; choose from {', '.join(CASES)}")
    print("| objective | loss | gradient |\n|---|---|---|")
    for name in names:
        loss, grad = (ceiling(x) for x in errors(CASES[name], device))
        print(f"| `{name}` | {loss:.0e} | {grad:.0e} |")


if __name__ == "__main__":
    main()
