"""Cases of the hosts that need a checkout: xtuner, prime-rl, NeMo-RL, slime and miles."""

import functools
import sys
from types import SimpleNamespace
from typing import Any

import torch

from grpo_fast.integrations import miles, nemo_rl, prime_rl, slime, xtuner
from tests.support import nemo_rl as nemo
from tests.support import slime as packed
from tests.support.host_table import CPU, case, same
from tests.support.hosts import FRACTIONS, fractional_batch, host_batch

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
