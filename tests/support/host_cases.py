"""Cases in which an adapter is compared with the loss function of its host's own sources.

Each host has a table `CASES[host]` of functions of its imported modules (`tests.support.host_sources`). The
batches are ragged, with an empty row, NaN in the padding for the adapter, and ratios beyond every bound. The
host's function in float64 is the truth for loss and gradient, and in float32 the error that is allowed.
"""

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_fast.integrations import (
    areal,
    miles,
    nemo_rl,
    openrlhf,
    prime_rl,
    skyrl,
    slime,
    verl,
    xtuner,
)
from grpo_fast.testing import assert_as_accurate
from tests.support import nemo_rl as nemo
from tests.support import slime as packed
from tests.support.host_sources import Source, imported
from tests.support.hosts import (
    CORRECTIONS,
    FRACTIONS,
    agrees,
    fractional_batch,
    host_batch,
    parameters,
)
from tests.support.oracles import verl_core_algos
from tests.support.verl import AGGREGATIONS, configuration

CPU = torch.device("cpu")
Case = Callable[[dict[str, Any]], None]
CASES: dict[str, dict[str, Case]] = {}


def case(host: str, name: str, function: Callable[..., None], *arguments: Any) -> None:
    """Add a case to the table of a host."""
    table = CASES.setdefault(host, {})
    assert name not in table, (host, name)
    table[name] = functools.partial(function, *arguments)


def same(ours: Any, theirs: Any, b: Any, until: Any = (), without: Any = ()) -> dict[str, Any]:
    """Compare loss, gradient and metrics; return the metrics of `ours`.

    Both are functions of (x, batch) that return (loss, metrics).

    Args:
        without: metrics that are another value on purpose, or missing in one of the two.
    """
    (metrics,) = agrees(ours, lambda x, b: theirs(x, b)[0], b, until)
    exact = {
        name: torch.where(b.mask, x, 0).double() if x.is_floating_point() else x
        for name, x in vars(b).items()
    }
    x = exact.pop("logp").requires_grad_()
    _, want = theirs(x, SimpleNamespace(**exact))
    got = {name: y for name, y in metrics.items() if name not in without}
    want = {name: y for name, y in want.items() if name not in without}
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_same_metric(got[name], value, b.mask, name)
    return metrics


def assert_same_metric(got: Any, want: Any, mask: Any, name: str) -> None:
    """Compare a metric: a number, or values of tokens where these are live."""
    if want is None:
        assert got is None, name
        return
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double().detach()
    if want.dim():
        live = mask.expand(want.shape) if want.shape != mask.shape else mask
        got, want = got.expand(want.shape)[live], want[live]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


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


# xtuner


def run_xtuner(changes: dict[str, Any], modules: Any) -> None:
    home = modules["xtuner.v1.rl.loss.loss_fn"]
    batch = host_batch(CPU)
    torch.manual_seed(1)
    share = torch.where(batch.mask, torch.rand_like(batch.A), 0).reshape(1, -1)
    config = {"cliprange_low": 0.2, "cliprange_high": 0.28} | changes

    def run(loss: Any) -> Any:
        def called(x: Any, b: Any) -> Any:
            x, old, A = (y.reshape(1, -1) for y in (x, b.old, b.A))
            return loss(x, old, A, share.to(x), config), {}

        return called

    ours = home.get_policy_loss_fn("grpo_fast.integrations.xtuner.policy_loss")
    assert ours is xtuner.policy_loss
    same(run(ours), run(home.get_policy_loss_fn("vanilla")), batch)


for _name, _changes in {
    "vanilla": {},
    "dual": {"clip_ratio_c": 1.5},
    "clamp": {"log_prob_diff_min": -1.0, "log_prob_diff_max": 1.0},
    "clamp from above": {"log_prob_diff_min": -torch.inf},
    "no clamp": {"log_prob_diff_min": -torch.inf, "log_prob_diff_max": torch.inf},
}.items():
    case("xtuner", _name, run_xtuner, _changes)


# prime-rl


def run_prime_rl(kind: str, options: dict[str, float], weighed: bool, modules: Any) -> None:
    home = modules["prime_rl.trainer.rl.loss"]
    whole = host_batch(CPU)
    batch = SimpleNamespace(**{name: x.reshape(-1) for name, x in vars(whole).items()})
    torch.manual_seed(1)
    weights = 2 * torch.rand(len(batch.A)) if weighed else None
    config = SimpleNamespace(**options)

    def run(loss: Any) -> Any:
        def called(x: Any, b: Any) -> Any:
            inputs = home.LossInputs(
                trainer_logprobs=x,
                inference_logprobs=b.rollout,
                ref_logprobs=b.old,
                advantages=b.A,
                loss_mask=b.mask,
                loss_weights=None if weights is None else weights.to(x),
            )
            out = loss(inputs)
            assert type(out) is home.LossOutputs
            return out.loss, out.metrics

        return called

    theirs, ours = getattr(home, f"{kind}_loss_fn"), getattr(prime_rl, f"{kind}_loss")
    same(run(lambda i: ours(i, **options)), run(lambda i: theirs(i, config)), batch)


for _weighed in (False, True):
    for _name, _options in {
        "default": {"dppo_mask_low": 0.2, "dppo_mask_high": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3},
        "default, narrow": {
            "dppo_mask_low": 0.05,
            "dppo_mask_high": 0.1,
            "adv_tau": 0.7,
            "kl_tau": 0.02,
        },
        "default, without advantages": {  # which the metrics see
            "dppo_mask_low": 0.05,
            "dppo_mask_high": 0.1,
            "adv_tau": 0.0,
            "kl_tau": 0.02,
        },
        "ipo": {"ipo_threshold": 0.1, "adv_tau": 1.0, "kl_tau": 1e-3},
        "ipo, narrow": {"ipo_threshold": 0.05, "adv_tau": 0.7, "kl_tau": 0.02},
    }.items():
        _kind = _name.partition(",")[0]
        _name += ", weighed" if _weighed else ""
        case("prime_rl", _name, run_prime_rl, _kind, _options, _weighed)


# NeMo-RL


def run_nemo_rl(
    options: dict[str, Any], sample_mask: list[float], weighed: bool, modules: Any
) -> None:
    home = modules[nemo_rl.HOME]
    theirs = getattr(home, "theirs", home.ClippedPGLossFn)
    nemo_rl.patch()
    home.theirs, ours = theirs, home.ClippedPGLossFn
    assert issubclass(ours, theirs)
    assert ours is not theirs
    batch = nemo.with_reference(fractional_batch(CPU) if weighed else host_batch(CPU))
    chosen = dict(options)
    if weighed and chosen.get(nemo.RATIO.replace("_ratio", "_type")) == "seq-mask-tis":
        chosen |= nemo.corrected("seq-mask-tis", 1.0, 1.2)  # one sequence is within these
    by_token = chosen.pop("loss_type", nemo.BY_TOKEN).name == "TOKEN_LEVEL"
    config = home.ClippedPGLossConfig(
        **{"ratio_clip_max": 0.28, "reference_policy_kl_penalty": 0.0} | chosen,
        token_level_loss=by_token,
    )

    def run(loss: Any) -> Any:
        def called(x: Any, b: Any) -> Any:
            data = nemo.data_of(b, sample_mask)
            if weighed:
                data["token_mask"] = nemo.shifted(FRACTIONS).to(x)
            data = {k: y.to(x) if y.is_floating_point() else y for k, y in data.items()}
            return loss(x, data, nemo.SEQS, nemo.TOKS)

        return called

    without = (
        ["sampling_importance_ratio"] if chosen.get("sequence_level_importance_ratios") else []
    )
    same(run(ours(config)), run(theirs(config)), batch, without=without)


for _name, _options in nemo.CASES.items():
    case("nemo_rl", _name, run_nemo_rl, _options, nemo.WHOLE, False)
    case("nemo_rl", f"{_name}, weighed samples", run_nemo_rl, _options, nemo.PARTS, False)
    case("nemo_rl", f"{_name}, a mask of fractions", run_nemo_rl, _options, nemo.WHOLE, True)


# slime and miles


def log_probs_in_any_dtype(
    logits: Any, *, unconcat_tokens: Any, with_entropy: bool, **_: Any
) -> Any:
    """Stands for the hosts' function, which needs Megatron and refuses float64."""
    logp, entropy = packed.scored(logits, {"unconcat_tokens": unconcat_tokens})
    found = {"log_probs": logp} | ({"entropy": entropy} if with_entropy else {})
    return {name: list(x.split(packed.RESPONSES)) for name, x in found.items()}


def compare_packed(
    ours: Any, theirs: Any, reduce: Any, args: Any, b: Any, until: Any, without: Any
) -> None:
    """Call both with a batch of slime; all entries of the logits are live."""
    logits = b.pop("logits")

    def in_dtype(x: torch.Tensor) -> dict[str, Any]:
        def convert(y: Any) -> Any:
            floating = isinstance(y, torch.Tensor) and y.is_floating_point()
            return y.to(x) if floating else y

        return {k: [convert(y) for y in v] for k, v in b.items()}

    whole = torch.ones_like(logits, dtype=torch.bool)
    same(
        lambda x, _: ours(args, in_dtype(x), 1.0 * x, reduce),
        lambda x, _: theirs(args, in_dtype(x), 1.0 * x, reduce),
        SimpleNamespace(logp=logits, mask=whole),
        until,
        without,
    )


def packed_args(changes: dict[str, Any]) -> SimpleNamespace:
    args = SimpleNamespace(**packed.ARGS | changes)
    if args.eps_clip_high is None:  # so the hosts' own command lines do
        args.eps_clip_high = args.eps_clip
    return args


def run_slime(changes: dict[str, Any], masks: Any, modules: Any) -> None:
    home = modules[slime.LOSS]
    sys.modules["megatron.core"].mpu = home.mpu = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: 1,
        get_context_parallel_world_size=lambda: 1,
        get_context_parallel_group=lambda: None,
    )
    for part in ("cp_utils", "loss"):
        sys.modules[f"slime.backends.megatron_utils.{part}"].mpu = home.mpu
    home.get_log_probs_and_entropy = lambda *a, **k: (None, log_probs_in_any_dtype(*a, **k))
    args, b = packed_args({"rollout_top_p": 1.0} | changes), packed.make_batch(CPU, masks)
    reduce = home.get_sum_of_sample_mean(
        b["total_lengths"],
        b["response_lengths"],
        b["loss_masks"],
        b["rollout_mask_sums"],
        args.calculate_per_token_loss,
    )
    without = [] if args.entropy_coef else ["entropy_loss"]  # see docs/trainers/slime.md
    compare_packed(slime.policy_loss, home.policy_loss_function, reduce, args, b, (), without)


def run_miles(changes: dict[str, Any], masks: Any, modules: Any, far: bool = False) -> None:
    """Compare with miles.

    Args:
        far: a token has a log-ratio beyond the clamp, on the side where the advantage pulls.
    """
    home, losses = modules[miles.LOSS], modules[f"{miles.HUB}.losses"]
    one = SimpleNamespace(size=1, rank=0, group=None)
    modules[f"{miles.UTILS}.parallel"].set_parallel_state(SimpleNamespace(tp=one, cp=one))
    home.get_log_probs_and_entropy = losses.get_log_probs_and_entropy = log_probs_in_any_dtype
    args, b = packed_args(packed.MILES | changes), packed.make_batch(CPU, masks)
    if far:
        b["log_probs"][0][2] -= 21
        b["advantages"][0][2] = -1.0
    reduce = home.get_sum_of_sample_mean(
        b["total_lengths"],
        b["response_lengths"],
        b["loss_masks"],
        args.calculate_per_token_loss,
        args.qkv_format,
        None,
        denominators=b["rollout_mask_sums"],
    )
    until = ["CatBackward"] if changes.get("kl_loss_type") == "k2" else ()  # of miles' entropies
    compare_packed(miles.policy_loss, losses.policy_loss_function, reduce, args, b, until, [])


TIS = {"use_tis": True, "tis_clip": 1.1, "tis_clip_low": 0.9}
for _host, _run, _cases in (
    ("slime", run_slime, packed.SLIME_CASES),
    ("miles", run_miles, packed.MILES_CASES),
):
    _more = {"tis": TIS, "all tokens": {"calculate_per_token_loss": True}}
    _more["mismatch"] = {"get_mismatch_metrics": True, **{k: TIS[k] for k in TIS if k != "use_tis"}}
    for _name, _changes in (_cases | _more).items():
        case(_host, _name, _run, _changes, packed.MASKS)
        case(_host, f"{_name}, masks of fractions", _run, _changes, packed.FRACTIONS)
for _name in ("grpo", "dual", "low_var_kl"):
    _far = functools.partial(run_miles, far=True)
    case("miles", f"{_name}, beyond the clamp", _far, packed.MILES_CASES[_name], packed.MASKS)


ABSENT = "not in this release: "


def is_wrong(what: str) -> bool:
    """Tell whether a result of `run_all` is an error."""
    return bool(what) and not what.startswith(ABSENT)


def outcome(function: Case, modules: dict[str, Any]) -> str:
    """Run a case: "", "not in this release: ...", or the error."""
    try:
        function(modules)
    except pytest.skip.Exception as error:
        return f"{ABSENT}{error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_all(source: Source) -> dict[str, str]:
    """Run the cases of a host with the sources of one release: of each case its `outcome`."""
    # miles compiles parts of its loss, which takes minutes and changes nothing.
    with imported(source) as modules, torch.compiler.set_stance("force_eager"):
        return {name: outcome(run, modules) for name, run in CASES[source.host].items()}
