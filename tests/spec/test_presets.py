"""Presets mean what their trainers compute: the same name is not the same loss everywhere.

One test per trap, each against the trainer's formula, written out here in float64 from its sources. What can
be run as it is serves as an oracle elsewhere: TRL and verl in tests/integrations.
"""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import policy_loss
from grpo_fast.objective import OPTIONS
from grpo_fast.ops import group_advantage
from grpo_fast.presets import CALLER, PAPERS, PRESETS, TRAINERS
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import in_double, loss_and_grad

B, T = 4, 6
LENGTHS = torch.tensor([6, 3, 0, 4])
CLIPPED = ("verl/vanilla", "skyrl/regular", "openrlhf/ppo", "xtuner/vanilla")
UNCLAMPED = ("trl/dapo", "nemo_rl/grpo", "areal/grpo", "slime/grpo")


@pytest.fixture
def batch(device):
    """(log-probs (B, T), the other arguments): ragged, an empty row, NaN in the padding."""
    torch.manual_seed(3)
    mask = torch.arange(T) < LENGTHS[:, None]
    logps = -3 * torch.rand(B, T)
    arguments = {
        "advantages": torch.randn(B, T),
        "old_logps": logps + 0.6 * torch.randn(B, T),
        "ref_logps": logps + 0.6 * torch.randn(B, T),
    }
    arguments = {k: torch.where(mask, x, torch.nan).to(device) for k, x in arguments.items()}
    return torch.where(mask, logps, torch.nan).to(device), arguments | {"mask": mask.to(device)}


def agrees(objective, formula, logps, arguments):
    """Loss and gradient of `policy_loss` against `formula` on float64 arguments with 0 in the padding."""
    mask, double = arguments["mask"], in_double(arguments)
    clean = {
        name: torch.where(mask, x, 0) if torch.is_tensor(x) and x.shape == mask.shape else x
        for name, x in double.items()
    }
    truth = loss_and_grad(lambda x: formula(torch.where(mask, x, 0), **clean), logps.double())
    ours = loss_and_grad(policy_loss, logps, objective=objective, **arguments)
    plain = loss_and_grad(reference.policy_loss, logps, objective=objective, **arguments)
    for name, a, b, t in zip(("loss", "gradient"), ours, plain, truth, strict=True):
        a, b, t = (torch.where(mask, x, 0) if x.ndim else x for x in (a, b, t))
        assert_as_accurate(a, b, t, name=name)
    return truth[1]


def token_mean(loss, mask):
    return (loss * mask).sum() / mask.sum()


def sequence_mean(loss, mask):
    return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def ppo(d, advantages, low=0.2, high=0.2, dual=None, clamp=None):
    """max(-A r, -A clip(r)), bounded by the dual clip where A < 0."""
    r = (d if clamp is None else d.clamp(-clamp, clamp)).exp()
    loss = torch.maximum(-advantages * r, -advantages * r.clamp(1 - low, 1 + high))
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)
    return loss


def preset(name, **overrides):
    extra = {"max_length": 9} if "dr_grpo" in name else {}
    return Objective.preset(name, **extra, **overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_legal_and_stands_alone(name):
    assert isinstance(preset(name), Objective)
    assert set(PRESETS[name]) <= set(OPTIONS)
    assert name in PAPERS or name.split("/")[0] in TRAINERS


def test_remarks_belong_to_presets():
    assert set(CALLER) <= set(PRESETS)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"'verl/grpo' is unknown.*verl/vanilla"):
        Objective.preset("verl/grpo")


@pytest.mark.parametrize(
    "name, dual",
    [
        ("verl/vanilla", 3.0),
        ("skyrl/dual_clip", 3.0),
        ("xtuner/vanilla", 3.0),
        ("skyrl/regular", None),
        ("openrlhf/ppo", None),
        ("nemo_rl/grpo", None),
        ("areal/grpo", None),
        ("trl/bnpo", None),
    ],
)
def test_dual_clip_is_always_on_in_some_and_off_in_others(name, dual, batch, backend):
    logps, arguments = batch
    arguments["old_logps"][0, :3] -= 3.0  # ratios far above 3, whatever the advantage
    arguments["advantages"][0, 0] = -1.0
    del arguments["ref_logps"]

    def formula(x, advantages, old_logps, mask):
        return token_mean(ppo(x - old_logps, advantages, dual=dual), mask)

    grad = agrees(preset(name, beta=0.0), formula, logps, arguments)
    assert (grad[0, 0] == 0) == (dual is not None)


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("verl/cispo", 0.8, 1.2),
        ("slime/cispo", 0.8, 1.2),
        ("nemo_rl/cispo", 0.8, 1.2),
        ("skyrl/cispo", 0.0, 5.0),
        ("areal/cispo", 0.0, 5.0),
        ("trl/cispo", None, 0.2),  # the bound itself, 0.2 unless `epsilon_high` is given
    ],
)
def test_cispo_bounds_are_distances_or_the_bound_itself(name, low, high, batch, backend):
    logps, arguments = batch
    arguments["old_logps"][0, :3] -= 2.0
    del arguments["ref_logps"]
    reduce = sequence_mean if name.startswith("slime") else token_mean

    def formula(x, advantages, old_logps, mask):
        r = (x - old_logps).exp().clamp(low, high).detach()
        return reduce(-r * advantages * x, mask)

    agrees(preset(name, beta=0.0), formula, logps, arguments)


def sequence_log_ratio(d, mask):
    return (d * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("name", ["verl/gspo", "skyrl/gspo"])
def test_gspo_with_a_detached_ratio(name, batch, backend):
    """Bounded at e^10 from above, where nothing flows any more, and not from below."""
    logps, arguments = batch
    del arguments["ref_logps"]
    arguments["old_logps"][0] -= 12
    arguments["old_logps"][1] += 12
    arguments["advantages"][0], arguments["advantages"][1] = -1.0, 1.0  # not clipped

    def formula(x, advantages, old_logps, mask):
        mean = sequence_log_ratio(x - old_logps, mask)
        d = (mean.detach() + x - x.detach()).clamp(max=10)
        return token_mean(ppo(d, advantages), mask)

    grad = agrees(preset(name), formula, logps, arguments)
    assert (grad[0] == 0).all()
    assert grad[1, 0] != 0


@pytest.mark.parametrize(
    "name, reduce",
    [
        ("nemo_rl/gspo", sequence_mean),
        ("openrlhf/gspo", sequence_mean),
        ("slime/gspo", sequence_mean),
        ("trl/grpo/sequence", sequence_mean),
        ("areal/gspo", token_mean),
    ],
)
def test_gspo_through_the_mean(name, reduce, batch, backend):
    logps, arguments = batch
    del arguments["ref_logps"]
    if name == "areal/gspo":  # one advantage per sequence: the mean of its own
        mask = arguments["mask"]
        advantages = torch.where(mask, arguments["advantages"], 0)
        arguments["advantages"] = advantages.sum(1) / mask.sum(1).clamp(min=1)

    def formula(x, advantages, old_logps, mask):
        advantages = advantages.view(len(mask), -1)
        return reduce(ppo(sequence_log_ratio(x - old_logps, mask), advantages), mask)

    agrees(preset(name, beta=0.0), formula, logps, arguments)


def test_gspo_gradients_differ_only_where_advantages_do(batch):
    logps, arguments = batch
    del arguments["ref_logps"]
    through, detached = (
        preset(name, reduction="sequence_mean", beta=0.0)
        for name in ("trl/grpo/sequence", "verl/gspo")
    )
    mask = arguments["mask"]

    def gap():
        grads = [
            loss_and_grad(policy_loss, logps, objective=o, **arguments)[1][mask]
            for o in (through, detached)
        ]
        return (grads[0] - grads[1]).abs().max()

    assert gap() > 1e-3
    arguments["advantages"] = torch.randn(B, device=logps.device)
    assert gap() < 1e-7


@pytest.mark.parametrize("name", CLIPPED + UNCLAMPED)
def test_log_ratio_clamp(name, batch, backend):
    """Beyond 20 nats some trainers let nothing through; in the others the token keeps its gradient."""
    logps, arguments = batch
    arguments["old_logps"][0, 0] = logps[0, 0] - 22
    arguments["advantages"][0, 0] = -0.5  # A < 0 keeps a high ratio
    del arguments["ref_logps"]
    clamp = 20 if name in CLIPPED else None
    reduce = sequence_mean if name.startswith("slime") else token_mean
    overrides = {"dual_clip": None} if PRESETS[name].get("dual_clip") else {}

    def formula(x, advantages, old_logps, mask):
        return reduce(ppo(x - old_logps, advantages, clamp=clamp), mask)

    grad = agrees(preset(name, beta=0.0, **overrides), formula, logps, arguments)
    assert (grad[0, 0] == 0) == (clamp is not None)


@pytest.mark.parametrize(
    "name, gap, most",
    [
        ("verl/vanilla", 20, 10),
        ("skyrl/regular", 20, 10),
        ("xtuner/vanilla", 20, 10),
        ("trl/bnpo", None, None),
        ("slime/grpo", None, None),
    ],
)
def test_k3_clamps(name, gap, most, batch, backend):
    logps, arguments = batch
    arguments["advantages"] *= 0
    arguments["ref_logps"][0, :4] = logps[0, :4] + torch.tensor([3.0, 21.0, -12.0, -21.0]).to(logps)
    objective = preset(name, beta=0.3, kl="k3")
    reduce = sequence_mean if name.startswith("slime") else token_mean

    def formula(x, ref_logps, mask, **_):
        q = ref_logps - x
        q = q if gap is None else q.clamp(-gap, gap)
        k3 = q.exp() - q - 1
        return reduce(0.3 * (k3 if most is None else k3.clamp(-most, most)), mask)

    grad = agrees(objective, formula, logps, arguments)
    # 3 nats below the reference, k3 is 16: cut off and not pulled back, or pulled back with e^3 - 1.
    assert (grad[0, 0] == 0) == (most is not None)


@pytest.mark.parametrize("name", ["verl/dppo_tv", "verl/dppo_kl"])
def test_dppo_takes_a_detached_capped_ratio(name, batch, backend):
    logps, arguments = batch
    arguments["old_logps"][0, :3] -= 2.0
    del arguments["ref_logps"]

    def formula(x, advantages, old_logps, mask):
        new, old = x.detach().exp(), old_logps.exp()
        tv = new - old
        kl = old * (old_logps - x.detach())
        kl = kl + (1 - old) * ((1 - old + 1e-8) / (1 - new + 1e-8)).log()
        if name.endswith("tv"):
            keep = torch.where(advantages > 0, tv <= 0.2, tv >= -0.2)
        else:
            keep = (kl <= 0.2) | torch.where(advantages > 0, tv <= 0, tv >= 0)
        r = (x.detach() - old_logps).exp().clamp(max=3.0)
        return token_mean(-advantages * r * keep * x, mask)

    agrees(preset(name), formula, logps, arguments)


@pytest.mark.parametrize("name", ["skyrl/dppo_tv", "skyrl/dppo_kl", "prime_rl/default"])
def test_dppo_takes_the_plain_ratio(name, batch, backend):
    """Its loss value is not verl's, and has no cap. SkyRL clamps it; prime-rl adds a quadratic term."""
    logps, arguments = batch
    arguments["old_logps"][0, :3] -= 2.0
    arguments["old_logps"][0, 0] -= 20.0
    arguments["advantages"][0, 0] = -1.0
    del arguments["ref_logps"]

    def formula(x, advantages, old_logps, mask):
        new, old = x.detach().exp(), old_logps.exp()
        tv = new - old
        rest = (1 - old) * ((1 - old + 1e-8) / (1 - new + 1e-8)).log()
        kl = (old * (old_logps - x.detach()) + rest) * tv.sign()
        change = kl if name.endswith("kl") else tv
        drop = ((advantages > 0) & (change > 0.2)) | ((advantages < 0) & (change < -0.2))
        d = x - old_logps
        if name == "prime_rl/default":
            return token_mean(-advantages * d.exp() * ~drop + 1e-3 * d**2, mask)
        return token_mean(-advantages * d.clamp(-20, 20).exp() * ~drop, mask)

    grad = agrees(preset(name), formula, logps, arguments)
    assert (grad[0, 0] == 0) == name.startswith("skyrl")


def test_nemo_rls_kl_goes_through_the_sampling_probability(batch, backend):
    """NeMo-RL multiplies k3 by exp(x - sg(x)), which is 1, inside both clamps."""
    logps, arguments = batch
    arguments["advantages"] *= 0
    arguments["ref_logps"][0, :3] = logps[0, :3] + torch.tensor([3.0, 21.0, -21.0]).to(logps)

    def formula(x, ref_logps, mask, **_):
        q = (ref_logps - x).clamp(-20, 20)
        weight = (x - x.detach()).exp()
        weight = torch.where((ref_logps - x).abs() > 20, weight.detach(), weight)
        return token_mean(0.01 * (weight * (q.exp() - q - 1)).clamp(max=10), mask)

    grad = agrees(preset("nemo_rl/grpo"), formula, logps, arguments)
    assert (grad[0, :3] == 0).all()


WITHOUT_ADVANTAGE = [
    name
    for name, options in PRESETS.items()
    if options.get("surrogate") != "dro" and "quadratic_coef" not in options
]


@pytest.mark.parametrize("name", WITHOUT_ADVANTAGE)
def test_no_advantage_no_gradient(name, batch):
    logps, arguments = batch
    arguments["advantages"] *= 0
    arguments["old_logps"][0, 0] = logps[0, 0] - 100  # an infinite ratio is no exception
    del arguments["ref_logps"]
    objective = preset(name, beta=0.0)
    loss, grad = loss_and_grad(policy_loss, logps, objective=objective, **arguments)
    assert loss == 0
    assert (grad[arguments["mask"]] == 0).all()


@pytest.mark.parametrize(
    "eps, unbiased",
    [(1e-6, True), (1e-4, True), (1e-9, True), (1e-5, False)],
    ids=["verl-slime", "trl", "openrlhf", "population"],
)
def test_standard_deviation(eps, unbiased, backend, device):
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.25, 0.5, 0.5, 0.5, 0.5], device=device)
    groups = rewards.double().view(2, 4)
    std = ((groups - groups.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / (4 - unbiased)
    expected = (groups - groups.mean(1, keepdim=True)) / (std.sqrt() + eps)
    ours = group_advantage(rewards, group_size=4, eps=eps, unbiased=unbiased)
    torch.testing.assert_close(ours.double(), expected.flatten(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "num_items", [None, 37, torch.tensor(37.0)], ids=["batch", "number", "tensor"]
)
def test_token_mean_denominator(num_items, batch, backend):
    """The live tokens at hand, or those of the whole step."""
    logps, arguments = batch
    del arguments["ref_logps"]

    def formula(x, advantages, old_logps, mask, num_items):
        loss = (ppo(x - old_logps, advantages, clamp=20, dual=3.0) * mask).sum()
        return loss / (mask.sum() if num_items is None else num_items)

    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(logps.device)
    agrees(preset("verl/vanilla"), formula, logps, arguments | {"num_items": num_items})


@pytest.mark.parametrize("name", ["verl/vanilla", "openrlhf/ppo", "skyrl/regular"])
def test_importance_weights_leave_the_kl_alone(name, batch, backend):
    logps, arguments = batch
    weights = torch.where(arguments["mask"], 2 * torch.rand(B, T, device=logps.device), torch.nan)
    objective = (
        preset(name, beta=0.3, kl="k2") if name == "openrlhf/ppo" else preset(name, beta=0.3)
    )

    def formula(x, advantages, old_logps, ref_logps, mask, importance_weights):
        q = ref_logps - x
        kl = q**2 / 2 if name == "openrlhf/ppo" else q.exp() - q - 1
        dual = PRESETS[name].get("dual_clip")
        loss = importance_weights * ppo(x - old_logps, advantages, clamp=20, dual=dual)
        return token_mean(loss + 0.3 * kl, mask)

    agrees(objective, formula, logps, arguments | {"importance_weights": weights})


@pytest.mark.parametrize("name", ["trl/dapo", "trl/cispo", "trl/vespo", "verl/vanilla", "dapo"])
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.tensor(0)], ids=repr)
def test_no_items_are_counted_as_one(name, zero, batch, backend):
    """TRL's max(num_items, 1): a sum, neither an infinity nor, without a live token, a NaN."""
    logps, arguments = batch
    del arguments["ref_logps"]
    objective = preset(name, beta=0.0)
    one, grad_of_one = loss_and_grad(
        policy_loss, logps, objective=objective, num_items=1, **arguments
    )
    if isinstance(zero, torch.Tensor):
        zero = zero.to(logps.device)
    for fn in (policy_loss, reference.policy_loss):
        loss, grad = loss_and_grad(fn, logps, objective=objective, num_items=zero, **arguments)
        torch.testing.assert_close(loss, one)
        mask = arguments["mask"]
        torch.testing.assert_close(grad[mask], grad_of_one[mask])
    nothing = arguments | {"mask": torch.zeros_like(arguments["mask"])}
    loss, grad = loss_and_grad(policy_loss, logps, objective=objective, num_items=zero, **nothing)
    assert loss == 0
    assert (grad == 0).all()
