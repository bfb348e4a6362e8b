"""A batch for the tests of the adapters, and the comparison of an adapter with its host's formula."""

import inspect
from types import SimpleNamespace

import torch

from grpo_fast.testing import assert_as_accurate

B, T = 5, 6


def host_batch(device):
    """Tensors (B, T): ragged, one row empty, one without an advantage, ratios beyond every bound."""
    torch.manual_seed(11)
    mask = torch.arange(T) < torch.tensor([6, 0, 3, 5, 1])[:, None]
    logp = -2 * torch.rand(B, T) - 0.05
    old = (logp - 0.5 * torch.randn(B, T)).clamp(max=-0.01)  # a log-prob: below 0
    old[0, 0], old[0, 1], old[3, 0] = logp[0, 0] - 21, logp[0, 1] - 1.5, logp[3, 0] - 2.5
    advantages = torch.randn(B, T)
    advantages[2] = 0
    advantages[0, 0] = -0.5
    rollout = old + 0.4 * torch.randn(B, T)
    tensors = {"logp": logp, "old": old, "A": advantages, "rollout": rollout, "mask": mask}
    return SimpleNamespace(**{name: x.to(device) for name, x in tensors.items()})


# A mask of fractions. A row that has any sums to 1 at least: below that, trainers differ.
FRACTIONS = torch.tensor(
    [
        [1.0, 0.5, 0.25, 2.0, 0.0, 0.75],
        [0.0] * 6,
        [0.5, 0.5, 0.75, 0.0, 0.0, 0.0],
        [0.3, 0.9, 0.0, 0.6, 0.2, 0.0],
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)


def fractional_batch(device):
    """`host_batch` with `weights`, a mask of fractions, and with `mask` where it is not 0."""
    b = host_batch(device)
    b.weights = FRACTIONS.to(device)
    b.mask = b.weights != 0
    return b


def with_fractions(formula):
    """`formula(x, batch)` with the mask of fractions in the place of the mask."""
    return lambda x, b: formula(x, SimpleNamespace(**vars(b) | {"mask": b.weights}))


# Options of OpenRLHF: its corrections of the mismatch between trainer and sampler.
CORRECTIONS = [
    {},
    {"is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_mode": "clip"},
    {"is_correction_level": "token", "is_correction_threshold": (-1.0, 1.2)},
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.1)},
    {
        "is_correction_level": "token",
        "is_correction_gating": "tv",
        "is_correction_threshold": (-1.0, 0.1),
    },
    {
        "is_correction_level": "seq",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (-1.0, 0.05),
    },
]

# How autograd's nodes of this library begin, and those of what is linear in one tensor.
OURS = (
    "GeneratedBackwardFor_grpo_fast_",  # of the operators where something traces
    "grpo_fast_",
    "_AnchoredBackward",
    "_OverwriteBackward",
    "_SumOfBackward",
    "WithGradientOfBackward",
)
LINEAR = ("Sum", "View", "Where", "Mul", "Div")


def assert_adapter_only_scales(loss, until=()):
    """All that an adapter does to a loss of this library, before it returns it, is linear.

    Args:
        until: autograd's nodes where what the host itself computes begins.

    Raises:
        AssertionError: it has mathematics of its own between the loss and what that is a function of.
    """
    assert loss.grad_fn is not None, "the loss has no gradient"
    ahead, seen = [loss.grad_fn], []
    while ahead:
        node = ahead.pop()
        name = node.name()
        seen.append(name)
        if name.startswith((*OURS, *until)):
            continue
        following = [n for n, _ in node.next_functions if n is not None]
        summed = name.startswith(("AddBackward", "SubBackward"))
        linear = name.startswith(tuple(f"{operator}Backward" for operator in LINEAR))
        assert summed or (linear and len(following) == 1), f"{name}, in the adapter's {seen}"
        ahead += following


def agrees(ours, theirs, b, until=()):
    """Loss and gradient of `ours(logp, batch)` on float32 with NaN in the padding against float64 without.

    `theirs` in float32 is the plain PyTorch whose error is allowed. `ours` only scales what this library
    computes, see above. Returns what else it returned.
    """
    results, rest = [], None
    for fn, dtype, fill in (
        (ours, torch.float32, torch.nan),
        (theirs, torch.float32, 0.0),
        (theirs, torch.float64, 0.0),
    ):
        given = {
            name: torch.where(b.mask, x, fill).to(dtype) if x.is_floating_point() else x
            for name, x in vars(b).items()
        }
        x = given.pop("logp").requires_grad_()
        out = fn(x, SimpleNamespace(**given))
        loss, *others = out if isinstance(out, tuple) else (out,)
        if rest is None:
            assert_adapter_only_scales(loss, until)
            rest = others
        (grad,) = torch.autograd.grad(0.7 * loss, x)
        results.append((loss, torch.where(b.mask, grad, 0)))
    for name, (a, plain, truth) in zip(
        ("loss", "gradient"), zip(*results, strict=True), strict=True
    ):
        assert_as_accurate(a, plain, truth, name=name)
    assert results[2][1].abs().max() > 0
    return rest


def parameters(fn):
    return list(inspect.signature(fn).parameters)


def clipped(d, A, low, high, dual=None):
    r = d.exp()
    loss = torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + high))
    return loss if dual is None else torch.where(A < 0, torch.minimum(loss, -A * dual), loss)


def sequence_mean(x, mask):
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def mean(x, mask):
    return (torch.where(mask, x.double(), 0).sum() / mask.sum()).item()


def with_options(config, **changes):
    return SimpleNamespace(**(vars(config) | changes))
