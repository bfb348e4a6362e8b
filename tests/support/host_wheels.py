"""Cases of the hosts whose wheels `make` puts beside the environment: verl, SkyRL, OpenRLHF and AReaL."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_fast.integrations import areal, openrlhf, skyrl, verl
from grpo_fast.testing import assert_as_accurate
from tests.support.host_table import CPU, case, same
from tests.support.hosts import CORRECTIONS, fractional_batch, host_batch, parameters
from tests.support.oracles import verl_core_algos
from tests.support.verl import AGGREGATIONS, configuration

# verl


def run_verl(mode: str, aggregation: str, modules: Any) -> None:
    """A loss with verl's own masked means; tests/integrations/test_verl.py has more of their options."""
    core = modules["verl.trainer.ppo.core_algos"]
    if not hasattr(core, "theirs"):
        core.theirs = dict(core.POLICY_LOSS_REGISTRY)
        verl.register()
    core.ActorConfig = verl_core_algos().ActorConfig
    core.AlgoConfig = type("AlgoConfig", (), {})
    config = configuration()

    def run(loss: Any) -> Any:
        return lambda x, b: loss(b.old, x, b.A, b.mask, aggregation, config)

    ours = core.get_policy_loss_fn(mode)
    assert ours is verl.POLICY_LOSSES[mode]
    same(run(ours), run(core.theirs[mode]), host_batch(CPU))


def patch_verl(modules: Any) -> None:
    """`patch_logprobs()` finds verl's functions, which have the arguments of ours."""
    tools = modules["verl.utils.torch_functional"]
    fused = modules["verl.utils.kernel.linear_cross_entropy"]
    theirs, kernel = tools.logprobs_from_logits, fused.linear_cross_entropy.__self__
    verl.patch_logprobs()
    ours = tools.logprobs_from_logits
    assert ours is verl.logprobs_from_logits
    assert fused.linear_cross_entropy is verl.linear_cross_entropy
    assert parameters(ours) == parameters(theirs)
    assert parameters(verl.linear_cross_entropy) == parameters(kernel.forward)[1:]
    torch.manual_seed(2)
    logits, ids = 3 * torch.randn(2, 5, 31), torch.randint(31, (2, 5))
    upstream = torch.randn(2, 5)
    results = []
    for function, dtype in (
        (ours, torch.float32),
        (theirs, torch.float32),
        (theirs, torch.float64),
    ):
        x = logits.to(dtype).requires_grad_()
        y = function(1.0 * x, ids)
        results.append((y, torch.autograd.grad(y, x, upstream.to(dtype))[0]))
    for name, values in zip(("log-probs", "gradient"), zip(*results, strict=True), strict=True):
        assert_as_accurate(*values, name=name)


for _mode in verl.POLICY_LOSSES:
    for _aggregation in AGGREGATIONS:
        case("verl", f"{_mode}, {_aggregation}", run_verl, _mode, _aggregation)
case("verl", "patch_logprobs()", patch_verl)


# SkyRL


def skyrl_config(modules: Any, name: str, changes: dict[str, Any]) -> Any:
    config = modules["skyrl.train.config"].AlgorithmConfig()
    config.policy_loss_type, config.eps_clip_high = name, 0.28
    config.loss_reduction = "sequence_mean"  # read to warn alone
    # All candidates, so that nothing depends on a draw; a share of kl_cov that takes some tokens.
    chosen = {"clip_cov.clip_ratio": 1.0, "clip_cov.clip_cov_lb": 0.0, "kl_cov.kl_cov_frac": 0.3}
    for path, value in (chosen | changes).items():
        *parents, last = path.split(".")
        holder = functools.reduce(getattr, parents, config)
        if not hasattr(holder, last):
            pytest.skip(path)
        setattr(holder, last, value)
    return config


def run_skyrl(name: str, changes: dict[str, Any], weighed: bool, modules: Any) -> None:
    utils = modules["skyrl.backends.skyrl_train.utils.ppo_utils"]
    config = skyrl_config(modules, name, changes)
    batch = fractional_batch(CPU) if weighed else host_batch(CPU)
    weights = getattr(batch, "weights", batch.mask.float())

    def run(loss: Any) -> Any:
        return lambda x, b: loss(
            x, b.old, b.A, config, loss_mask=weights.to(x), rollout_logprobs=b.rollout
        )

    if f"grpo_fast/{name}" not in utils.PolicyLossRegistry._functions:
        skyrl.register()
    ours = utils.PolicyLossRegistry.get(f"grpo_fast/{name}")
    assert ours is skyrl.POLICY_LOSSES[name]
    # 0.3.0 reports the clip ratio of CISPO alone: see docs/trainers/skyrl.md.
    newer = hasattr(config.cispo, "cispo_anchor")
    without = [] if newer else [key for key in skyrl.METRICS[name] if key.startswith("cispo/")]
    same(run(ours), run(utils.PolicyLossRegistry.get(name)), batch, without=without)


OFF_POLICY = {
    "tis token": {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2},
    "tis sequence": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.1},
    "geometric": {
        "sequence_mask_metric": "geometric",
        "geo_mask_low": 0.9,
        "geo_mask_high": 1.1,
    },
    "product": {"sequence_mask_metric": "product"},
    "tokens": {"token_mask_is_threshold_low": 0.8, "token_mask_is_threshold_high": 1.3},
    "outliers": {
        "tis_ratio_type": "token",
        "outlier_token_is_threshold_low": 0.6,
        "outlier_token_is_threshold_high": 2.5,
    },
}

for _name in skyrl.POLICY_LOSSES:
    case("skyrl", _name, run_skyrl, _name, {}, False)
    case("skyrl", f"{_name}, a mask of fractions", run_skyrl, _name, {}, True)
for _name, _changes in {
    "dppo": {"dppo.dppo_type": "binary_kl"},
    "cispo": {"cispo.cispo_anchor": "rollout"},
    "sapo": {"sapo.tau_pos": 0.7, "sapo.tau_neg": 1.6},
    "kl_cov": {"kl_cov.ppo_kl_coef": 0.2},
}.items():
    case("skyrl", f"{_name}, {next(iter(_changes))}", run_skyrl, _name, _changes, False)
for _kind, _options in OFF_POLICY.items():
    _changes = {f"off_policy_correction.{key}": value for key, value in _options.items()}
    for _name in ("regular", "dual_clip", "gspo", "sapo", "cispo", "dppo"):
        case("skyrl", f"{_name}, {_kind}", run_skyrl, _name, _changes, False)


# OpenRLHF


def run_openrlhf(
    options: dict[str, Any], info: dict[str, Any], weighed: bool, modules: Any
) -> None:
    batch = fractional_batch(CPU) if weighed else host_batch(CPU)
    weights = getattr(batch, "weights", batch.mask.float())

    def run(loss: Any) -> Any:
        def called(x: Any, b: Any) -> Any:
            out = loss(x, b.old, b.A, weights.to(x), b.rollout, **info)
            return out[0], dict(zip(("clip", "kl", "rollout_kl", "dropped"), out[1:], strict=True))

        return called

    theirs = modules["openrlhf.models.loss"].PolicyLoss(**options)
    # Of the share of sequences, the one that is empty counts otherwise: see docs/trainers/openrlhf.md.
    without = ["dropped"] if options.get("is_correction_level") == "seq" else []
    same(run(openrlhf.PolicyLoss(**options)), run(theirs), batch, without=without)


def patch_openrlhf(modules: Any) -> None:
    """`patch()` finds the class, and the actor builds our loss from the arguments of OpenRLHF's."""
    home = modules["openrlhf.trainer.ray.ppo_actor"]
    theirs = home.ActorPPOTrainer
    openrlhf.patch()
    assert issubclass(home.ActorPPOTrainer, theirs)
    assert home.ActorPPOTrainer is not theirs
    built = []

    class Loss(openrlhf.PolicyLoss):
        def __init__(self, **options: Any) -> None:
            built.append(options)
            super().__init__(**options)

    args = SimpleNamespace(
        train=SimpleNamespace(max_epochs=1, dynamic_batch_enable=False, colocate_all=False),
        actor=SimpleNamespace(
            eps_clip_low_high=[0.1, 0.3],
            dual_clip=3.0,
            loss_agg_mode="seq-mean",
            policy_loss_type="ppo",
            aux_loss_coef=0.0,
        ),
        algo=SimpleNamespace(
            advantage=SimpleNamespace(
                is_correction_level="token",
                is_correction_mode="clip",
                is_correction_gating="ratio",
                is_correction_threshold=[0.8, 1.2],
            )
        ),
        ds=SimpleNamespace(packing_samples=False),
        vllm=SimpleNamespace(sync_backend="gloo"),
    )
    home.torch_dist_barrier_and_cuda_sync = lambda: None
    home.NaiveReplayBuffer = lambda *arguments: None  # of CUDA tensors
    home.PolicyLoss = lambda **options: built.append(options)
    home.ActorPPOTrainer.loss_of_grpo_fast = Loss
    strategy = SimpleNamespace(args=args)
    trainer = home.ActorPPOTrainer(strategy, None, None, None, None)
    assert type(trainer.actor_loss_fn) is Loss
    assert built[0] == built[1], "OpenRLHF builds its loss with other arguments"


GLOBAL = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 7}
for _kind in ("ppo", "gspo"):
    for _correction in CORRECTIONS:
        _words = " ".join(str(x) for x in _correction.values())
        _base = {"policy_loss_type": _kind, "clip_eps_high": 0.28, **_correction}
        for _extra, _more in (
            ("", {}),
            (" dual", {"dual_clip": 3.0}),
            (" by sequence", {"token_level_loss": False}),
        ):
            _name = f"{_kind} {_words}{_extra}"
            case("openrlhf", _name, run_openrlhf, _base | _more, {}, False)
        case("openrlhf", f"{_kind} {_words}, of several ranks", run_openrlhf, _base, GLOBAL, False)
        if _kind == "ppo":  # in GSPO OpenRLHF's mask is also a factor of the ratio
            _name = f"{_kind} {_words}, a mask of fractions"
            case("openrlhf", _name, run_openrlhf, _base, {}, True)
case("openrlhf", "patch()", patch_openrlhf)


# AReaL


def areal_options(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    if kind == "sapo_loss_fn":
        return {"tau_pos": 1.0, "tau_neg": 1.05} | changes
    return {"eps_clip": 0.2, "eps_clip_higher": 0.28} | changes


def pack(b: Any) -> tuple[Any, torch.Tensor]:
    """Put the live tokens of the rows end to end; return them with their boundaries."""
    lengths = b.mask.sum(1)
    boundaries = torch.nn.functional.pad(lengths[lengths > 0].cumsum(0), (1, 0)).int()
    return SimpleNamespace(**{k: x[b.mask] for k, x in vars(b).items()}), boundaries


def run_areal(kind: str, changes: dict[str, Any], flat: bool, modules: Any) -> None:
    """AReaL's own function and ours, both called as the actor calls them."""
    batch, boundaries = host_batch(CPU), None
    if flat:
        batch, boundaries = pack(batch)
    options = areal_options(kind, changes)

    def run(home: Any) -> Any:
        def called(x: Any, b: Any) -> Any:
            given = {"logprobs": x, "loss_mask": b.mask, "advantages": b.A}
            given |= {"cu_seqlens": boundaries, **options}
            if kind == "sapo_loss_fn":
                return getattr(home, kind)(old_logprobs=b.old, **given)
            return getattr(home, kind)(proximal_logprobs=b.old, old_logprobs=b.rollout, **given)

        return called

    theirs = modules["areal.utils.functional.functional"]
    # main reports the counts, and of a rejected token its ratio and clips: see docs/trainers/areal.md.
    counts = {"n_total_tokens", "n_valid_tokens", "n_masked_tokens", "masked_token_ratio"}
    if changes.get("rejection_sampling") is not None:
        counts |= {"importance_weight", "clip_mask", "dual_clip_mask"}
    same(run(areal), run(theirs), batch, without=counts)


def patch_areal(modules: Any) -> None:
    """`patch()` reaches the names that AReaL's actor calls."""
    actor = modules["areal.trainer.ppo.actor"]
    assert actor.grpo_loss_fn.__globals__ is vars(actor)
    assert {"ppo_actor_loss_fn", "sapo_loss_fn"} <= set(actor.grpo_loss_fn.__code__.co_names)
    areal.patch()
    assert actor.ppo_actor_loss_fn is areal.ppo_actor_loss_fn
    assert actor.sapo_loss_fn is areal.sapo_loss_fn


def rejection(**changes: Any) -> Any:
    defaults = {"level": "token", "action": "mask", "metric": "ratio", "agg": "mean"}
    return SimpleNamespace(**defaults | {"upper": 1.3, "lower": 0.8} | changes)


for _flat in (False, True):
    for _level in ("token", "sequence"):
        _where = f"{_level}{', packed' if _flat else ''}"
        _by = {"importance_sampling_level": _level}
        case("areal", f"ppo, {_where}", run_areal, "ppo_actor_loss_fn", _by, _flat)
        for _more_name, _more in {
            "dual": {"c_clip": 2.0},
            "one range": {"eps_clip_higher": None},
            "rejected": {"rejection_sampling": rejection()},
            "truncated": {"rejection_sampling": rejection(action="clamp")},
            "sequences rejected": {"rejection_sampling": rejection(level="sequence")},
            "sequences rejected by their largest": {
                "rejection_sampling": rejection(level="sequence", agg="max", upper=1.6)
            },
        }.items():
            _name = f"ppo, {_where}, {_more_name}"
            case("areal", _name, run_areal, "ppo_actor_loss_fn", _by | _more, _flat)
        case("areal", f"sapo, {_where}", run_areal, "sapo_loss_fn", _by, _flat)
case("areal", "patch()", patch_areal)
