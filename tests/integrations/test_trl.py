"""TRL's own `_compute_loss`, run in float64 on a stubbed trainer, as an independent oracle."""

import importlib.metadata
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_fast import Objective, notices, reference
from grpo_fast.integrations import trl as adapter
from grpo_fast.integrations.trl import objective
from grpo_fast.integrations.trl import options as table
from grpo_fast.integrations.trl.options import BY_ITEMS, LOSS_TYPES
from grpo_fast.loss import grpo_loss
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import batch, in_double, loss_and_grad

pytest.importorskip("trl", "1.15", reason="the oracle is TRL's own code")
pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's imports

GAS, SPG, MAX_LENGTH = 4, 2, 9  # gradient accumulation, steps per generation, Dr. GRPO's constant


def accelerator():
    return SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
    )


DEFAULTS = {
    "level": "token",
    "beta": 0.0,
    "delta": None,
    "bias_correction": False,
    "entropy_coef": 0.0,
    "epsilon_high": 0.2,
    "off_policy": None,
}


def trainer(loss_type, logits, ids, options):
    """Return what `GRPOTrainer._compute_loss` reads of its trainer, for a model with these logits."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    outputs = (reference.logprob(logits, ids), reference.entropy(logits), None)
    args = SimpleNamespace(
        use_bias_correction_kl=options["bias_correction"],
        delta=options["delta"],
        steps_per_generation=SPG,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: outputs,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=options["off_policy"],
        importance_sampling_level=options["level"],
        beta=options["beta"],
        args=args,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=options["epsilon_high"],
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=GAS,
        max_completion_length=MAX_LENGTH,
        accelerator=accelerator(),
        _entropy_bonus_enabled=options["entropy_coef"] != 0,
        use_adaptive_entropy=False,
        entropy_coef=options["entropy_coef"],
        _metrics={"train": defaultdict(list)},
    )


def theirs(logits, ids, inputs, loss_type, options):
    from trl.trainer.grpo_trainer import GRPOTrainer

    stub = trainer(loss_type, logits, ids, options)
    loss = GRPOTrainer._compute_loss(stub, None, inputs)
    return loss, stub._metrics["train"]


def objective_of(loss_type, options):
    """Return the objective that the adapter makes of the options of a GRPOConfig."""
    return objective(
        SimpleNamespace(
            loss_type=loss_type,
            importance_sampling_level=options["level"],
            beta=options["beta"],
            use_bias_correction_kl=options["bias_correction"],
            epsilon=0.2,
            epsilon_high=options["epsilon_high"],
            delta=options["delta"],
            max_completion_length=MAX_LENGTH,
            off_policy_mask_threshold=options["off_policy"],
            entropy_coef=options["entropy_coef"],
        )
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"beta": 0.3},
        {"beta": 0.3, "bias_correction": True},
        {"delta": 1.4},
        {"beta": 0.3, "bias_correction": True, "delta": 1.4, "epsilon_high": 1.28},
        {"beta": 0.3, "off_policy": 0.02},
    ],
    ids=lambda change: "-".join(change) or "defaults",
)
def test_loss_gradient_and_metrics(loss_type, level, change, backend, device):
    logits, ids, arguments = batch(5, 6, 40, device, drift=0.5, garbage=False)
    options = DEFAULTS | {"level": level} | change
    mask = arguments["mask"]
    weights = torch.where(mask, torch.rand(5, 6, device=device) * 2, 1)  # TRL's are 1 on padding
    double = in_double(arguments)
    num_items = torch.tensor(61.0, device=device)  # of the whole generation batch
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.double(),
        "advantages": double["advantages"],
        "old_per_token_logps": double["old_logps"],
        "ref_per_token_logps": double["ref_logps"],
        "importance_sampling_ratio": weights.double(),
        "num_items_in_batch": num_items,
    }

    def trl_loss(x):
        return theirs(x, ids, inputs, loss_type, options)[0]

    arguments |= {"importance_weights": weights, "objective": objective_of(loss_type, options)}
    scale = 1 / GAS
    if loss_type in BY_ITEMS:
        arguments["num_items"] = num_items * GAS / SPG
        scale = 1.0

    def our_loss(x):
        return scale * grpo_loss(x, ids, **arguments).loss

    truth = loss_and_grad(trl_loss, logits.double())
    baseline = loss_and_grad(lambda x: scale * reference.grpo_loss(x, ids, **arguments), logits)
    for name, a, b, t in zip(
        ("loss", "gradient"), loss_and_grad(our_loss, logits), baseline, truth, strict=True
    ):
        assert_as_accurate(a, b, t, name=name)

    names = {}
    if level == "token":  # per sequence TRL counts sequences, empty ones too; we count tokens
        if loss_type == "cispo":
            names["cispo_clip_ratio"] = "clip_fraction_high"
        elif arguments["objective"].surrogate == "clip":
            names["clip_ratio/low_mean"] = "clip_fraction_low"
            if not options["delta"] or options["delta"] > 1 + options["epsilon_high"]:
                names["clip_ratio/high_mean"] = "clip_fraction_high"  # TRL counts after its clamp
    if options["beta"]:
        names["kl"] = "kl"
    metrics = grpo_loss(logits, ids, **arguments).metrics
    reported = theirs(logits.double(), ids, inputs, loss_type, options)[1]
    for theirs_name, ours in names.items():
        assert metrics[ours].item() == pytest.approx(reported[theirs_name][0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - set(BY_ITEMS)))
def test_entropy_bonus(loss_type, backend, device):
    """TRL's bonus is a mean over the micro-batch's tokens, whatever the loss type."""
    logits, ids, arguments = batch(5, 6, 40, device, garbage=False)
    double = in_double(arguments)
    options = DEFAULTS | {"entropy_coef": 0.1}
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": double["mask"].double(),
        "advantages": double["advantages"],
        "old_per_token_logps": double["old_logps"],
        "importance_sampling_ratio": torch.ones(5, 1, device=device),
    }
    truth = loss_and_grad(lambda x: theirs(x, ids, inputs, loss_type, options)[0], logits.double())
    del arguments["ref_logps"]
    arguments["objective"] = objective_of(loss_type, options)
    ours = loss_and_grad(lambda x: grpo_loss(x, ids, **arguments).loss / GAS, logits)
    for a, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-4, atol=1e-7)


class TestObjective:
    def test_defaults_are_those_of_trl(self):
        from trl import GRPOConfig

        fields = GRPOConfig.__dataclass_fields__
        assert {name: fields[name].default for name in table.DEFAULTS} == table.DEFAULTS
        dapo = Objective(reduction="token_mean", kl="k3_unbiased")
        assert objective(SimpleNamespace()) == dapo

    def test_own_options_of_the_surrogates(self):
        sapo = objective(SimpleNamespace(loss_type="sapo", sapo_temperature_neg=1.5))
        assert (sapo.surrogate, sapo.tau_pos, sapo.tau_neg) == ("sapo", 1.0, 1.5)
        vespo = objective(SimpleNamespace(loss_type="vespo", vespo_lambda_neg=0.0))
        assert (vespo.vespo_k_pos, vespo.vespo_lambda_neg) == (2.0, 1e-4)  # TRL's floor
        fixed = objective(SimpleNamespace(loss_type="dr_grpo", max_completion_length=77))
        assert fixed.max_length == 77

    @pytest.mark.parametrize(
        "args, match",
        [
            ({"loss_type": "ppo"}, "loss_type='ppo' is unknown; TRL has grpo, bnpo"),
            ({"importance_sampling_level": "batch"}, "importance_sampling_level='batch'"),
            ({"beta": -0.1}, r"beta=-0\.1: .* away from the reference, without a bound"),
        ],
    )
    def test_refused(self, args, match):
        with pytest.raises(ValueError, match=match):
            objective(SimpleNamespace(**args))


class TestVersion:
    @pytest.mark.parametrize("name", ["GRPOTrainer", "patch"])
    @pytest.mark.parametrize("found", ["1.14.3", "1.17.0", "2.0.0", None])
    def test_another_one_is_named(self, name, found, monkeypatch):
        def version(package):
            assert package == "trl"
            if found is None:
                raise importlib.metadata.PackageNotFoundError
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setitem(sys.modules, "trl", None)
        state = f"; trl {found} is installed" if found else ", which is not installed"
        match = re.escape(f"this needs trl >= 1.15, < 1.17{state}: pip install 'trl>=1.15,<1.17'")
        with pytest.raises(ImportError, match=match):
            getattr(adapter, name)()

    def test_a_transformers_that_is_too_old_is_named(self, monkeypatch):
        versions = {"trl": "1.16.0", "transformers": "4.57.1"}
        monkeypatch.setattr(importlib.metadata, "version", versions.get)
        match = "this needs transformers >= 5.17; transformers 4.57.1 is installed: pip install"
        with pytest.raises(ImportError, match=match):
            adapter.GRPOTrainer  # noqa: B018

    def test_the_objective_needs_no_trl(self):
        import subprocess

        code = (
            "import sys; sys.modules['trl'] = None\n"
            "from types import SimpleNamespace\n"
            "from grpo_fast.integrations.trl import objective\n"
            "print(objective(SimpleNamespace(loss_type='cispo', epsilon_high=5.0)).epsilon_high)"
        )
        root = str(Path(adapter.__file__).parents[3])
        environment = {**os.environ, "PYTHONPATH": root}
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert out.stdout.strip() == "4.0", out.stderr

    def test_nothing_else_in_there(self):
        with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
            adapter.Trainer  # noqa: B018


class TestPatch:
    @pytest.fixture
    def utils(self, monkeypatch):
        from trl.trainer import utils

        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
        notices.forget()
        adapter.patch()
        return utils

    @pytest.mark.parametrize("softcap, scale, with_bias", [(None, 1.0, False), (2.0, 0.5, True)])
    def test_agrees_with_trls_head(self, utils, softcap, scale, with_bias, device):
        from trl.kernels import ChunkedLogProbFunction

        hidden = torch.randn(7, 8, device=device)
        weight, bias = torch.randn(30, 8, device=device), torch.randn(30, device=device)
        targets = torch.randint(30, (7,), device=device)
        upstream = torch.randn(2, 7, device=device)

        def run(function):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
            logps, entropy, *rest = function.apply(
                *leaves[:2],
                leaves[2] if with_bias else None,
                *(targets, 0.8, 13, softcap, scale, ("log_probs", "entropy")),
            )
            assert rest == [None, None, None]
            grads = torch.autograd.grad(
                (logps * upstream[0] + entropy * upstream[1]).sum(), leaves[: 2 + with_bias]
            )
            return [logps, entropy, *grads]

        ours, theirs = run(utils._ChunkedLogProbFunction), run(ChunkedLogProbFunction)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_is_what_trls_trainers_call(self, utils):
        """TRL's own patched forward calls it, which RLOO and the asynchronous trainer use."""
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=20,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        )
        utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
        ids = torch.randint(20, (2, 6))
        out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        want = reference.logprob(model(input_ids=ids).logits[:, :-1] / 0.9, ids[:, 1:])
        torch.testing.assert_close(out.log_probs, want, rtol=1e-4, atol=1e-5)

    def test_more_outputs_are_trls(self, utils):
        """Other outputs than log-probs and entropy are TRL's, and have no gradient, as in TRL."""
        from trl.kernels import ChunkedLogProbFunction

        weight = torch.randn(9, 4)
        arguments = (weight, None, torch.tensor([1, 2, 3]), 0.7, 9, 2.0, 0.5)
        outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        hidden = torch.randn(3, 4, requires_grad=True)
        theirs = ChunkedLogProbFunction.apply(hidden, *arguments, outputs)
        plain = utils._ChunkedLogProbFunction.apply(hidden, *arguments, outputs[:1])
        assert plain[1:] == (None, None, None, None)
        some = utils._ChunkedLogProbFunction.apply(hidden, *arguments, (outputs[0], outputs[3]))
        assert [x is None for x in some] == [False, True, True, False, True]
        ours = utils._ChunkedLogProbFunction.apply(hidden, *arguments, outputs)
        torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=0)  # whatever else is asked for
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert [x.requires_grad for x in ours] == [True, True, False, False, False]

    def test_what_trls_head_is_not_asked_for_runs_without_it(self, utils, monkeypatch):
        """TRL 1.15's needs Triton, which exists for Linux alone."""
        monkeypatch.setitem(sys.modules, "trl.kernels", None)
        scored = torch.randn(3, 4), torch.randn(9, 4), None, torch.tensor([1, 2, 3])
        logps, *_ = utils._ChunkedLogProbFunction.apply(*scored, 1.0, 9, outputs=("entropy",))
        assert logps.isfinite().all()

    def test_8_bit_weights_go_to_trls_head(self, utils):
        from trl.kernels import ChunkedLogProbFunction

        weight = torch.randn(9, 4).to(torch.float8_e4m3fn)
        scored = (torch.randn(3, 4), weight, None, torch.tensor([1, 2, 3]))
        arguments = (*scored, 1.0, 9, None, 1.0, ("entropy",))
        match = r"own log-prob head runs: .* torch.float8_e4m3fn.*\['lm_head'\]"
        with pytest.warns(UserWarning, match=match):
            got = utils._ChunkedLogProbFunction.apply(*arguments)
        want = ChunkedLogProbFunction.apply(*arguments)
        torch.testing.assert_close(got, want, rtol=0, atol=0)

    def test_under_zero_3_trls_head_runs(self, utils):
        weight = torch.randn(9, 4)
        weight.ds_id = 0
        arguments = (torch.randn(3, 4), weight, None, torch.tensor([1, 2, 3]), 1.0, 9)
        with pytest.warns(UserWarning, match="own log-prob head runs: the head is sharded"):
            out = utils._ChunkedLogProbFunction.apply(*arguments, outputs=("is_top1",))
        assert out[4].dtype == torch.bool
