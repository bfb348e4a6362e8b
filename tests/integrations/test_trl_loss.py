"""One `_compute_loss` of `GRPOTrainer` and of TRL's own on the same inputs: loss, gradients, metrics."""

import copy
import logging
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="it is a subclass of TRL's trainer")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of TRL and its libraries
    pytest.mark.usefixtures("torch_backend"),
]

import transformers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM  # noqa: E402
from trl import GRPOTrainer as Stock  # noqa: E402

from grpo_fast import notices  # noqa: E402
from grpo_fast.integrations.trl import GRPOTrainer, metrics  # noqa: E402
from grpo_fast.notices import FallbackError  # noqa: E402
from tests.support.trl_losses import LOSS_TYPES, SIZES, B, P, T, compute, inputs_of, make  # noqa: E402


def assert_same(trainers, options, change=(), mode="train", prepare=None):
    stock, ours = trainers
    inputs = inputs_of(stock, change)
    want, their_gradients, their_metrics = compute(stock, options, inputs, mode, prepare)
    got, gradients, metrics = compute(ours, options, inputs, mode, prepare)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        if gradient is None:
            assert gradients[name] is None
            continue
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=2e-6)
    assert metrics.keys() == their_metrics.keys()
    for name, value in their_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
    return their_metrics


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss_type(loss_type, level, trainers):
    """Each with KL plain and corrected, clamps, masks, per-token advantages, and every kind of ratio."""
    base = {"loss_type": loss_type, "importance_sampling_level": level}
    if loss_type == "cispo":
        base["epsilon_high"] = 1.2
    vllm = {"use_vllm": True}
    cases = [
        ({}, ()),
        ({}, ("on_policy",)),
        ({"beta": 0.3}, ()),
        ({"beta": 0.3, "use_bias_correction_kl": False}, ()),
        ({"beta": 0.3}, ("tool_mask", "advantages")),
        ({"off_policy_mask_threshold": 0.02, "beta": 0.3}, ()),
        ({"off_policy_mask_threshold": 0.02, "beta": 0.3}, ("sampling_per_token_logps",)),
        ({"off_policy_mask_threshold": 0.02}, ("on_policy",)),
        ({"off_policy_mask_threshold": -0.02, "beta": 0.3}, ("on_policy",)),
        (vllm, ("importance_sampling_ratio",)),
        (vllm | {"beta": 0.3}, ("masked_ratio",)),
        (vllm, ("sequence_ratio",)),
        (vllm | {"vllm_importance_sampling_correction": False}, ()),
        ({"top_entropy_quantile": 0.4}, ()),
        ({"top_entropy_quantile": 0.4, "entropy_coef": 0.1, "beta": 0.3}, ("tool_mask",)),
        ({"top_entropy_quantile": 0.0, "entropy_coef": 0.1, "beta": 0.3}, ()),
        ({"top_entropy_quantile": 0.4, "off_policy_mask_threshold": -0.02}, ("on_policy",)),
        ({"top_entropy_quantile": 0.4, "off_policy_mask_threshold": 0.02}, ()),
        ({"entropy_coef": 0.1}, ()),
        ({"entropy_coef": 0.1, "use_adaptive_entropy": True}, ()),
        ({"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 1.3}, ()),
        ({"beta": 0.3, "entropy_coef": 0.1}, ("nothing_live",)),
        ({}, ("one_token",)),
        ({}, ("no_difference",)),
        ({"beta": 0.3}, ("no_difference",)),
        ({"entropy_coef": 0.1}, ("no_difference",)),
        (vllm, ("importance_sampling_ratio", "no_difference")),
    ]
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        cases.append(({"delta": 1.1, "epsilon_high": 0.28, "epsilon": 0.1}, ()))
        cases.append(({"delta": 0.7}, ("on_policy",)))
    if loss_type == "sapo":
        cases.append(({"sapo_temperature_pos": 2.0}, ()))
    if loss_type == "vespo":
        cases.append(({"vespo_k_pos": 1.5}, ("advantages",)))
    for options, change in cases:
        print(options, change)  # of the case that failed
        assert_same(trainers, base | options, change)


@pytest.mark.parametrize(
    "of_trainer, of_args",
    [
        ({"beta": 0.5}, {}),
        ({"beta": 0.0}, {}),
        ({"epsilon_low": 0.05, "epsilon_high": 0.1}, {}),
        ({"importance_sampling_level": "sequence"}, {"use_bias_correction_kl": False}),
        ({"loss_type": "dr_grpo", "max_completion_length": 3}, {}),
        ({"off_policy_mask_threshold": 0.02}, {"delta": 1.1}),
        ({"top_entropy_quantile": 0.4}, {}),
        ({"loss_type": "cispo", "epsilon_high": 1.1}, {"epsilon_high": 5.0}),
        ({"loss_type": "sapo"}, {"sapo_temperature_pos": 2.0}),
        ({}, {"beta": 0.9, "epsilon": 0.9, "loss_type": "sapo"}),  # TRL has read these
    ],
)
def test_options_changed_during_training(of_trainer, of_args, trainers, monkeypatch):
    """A change by a callback counts if TRL's loss reads the option there, and not otherwise."""

    def change(trainer):
        for where, options in ((trainer, of_trainer), (trainer.args, of_args)):
            for name, value in options.items():
                monkeypatch.setattr(where, name, value)

    assert_same(trainers, {"beta": 0.1})
    assert_same(trainers, {"beta": 0.1}, prepare=change)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_evaluation(loss_type, trainers):
    """No accumulation: other normalisers."""
    assert_same(trainers, {"loss_type": loss_type, "entropy_coef": 0.1}, mode="eval")


def test_the_metrics_are_not_trivial(trainers):
    metrics = assert_same(trainers, {"loss_type": "grpo", "beta": 0.3, "epsilon": 0.05})
    names = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/high_max")
    assert all(metrics[name] > 0 for name in names)
    assert metrics["clip_ratio/low_mean"] != metrics["clip_ratio/high_mean"]


def test_one_collective_and_one_sync(trainers, monkeypatch):
    """The metrics take one collective and one sync; TRL's take a dozen of each."""
    ours = trainers[1]
    inputs = inputs_of(ours)
    calls = defaultdict(int)

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("gather", "reduce", "gather_for_metrics"):
        monkeypatch.setattr(ours.accelerator, name, counted(name, getattr(ours.accelerator, name)))
    monkeypatch.setattr(torch.Tensor, "item", counted("item", torch.Tensor.item))
    monkeypatch.setattr(torch.Tensor, "tolist", counted("tolist", torch.Tensor.tolist))
    report = metrics.report

    def only_the_report(*args):
        calls["item"] = calls["tolist"] = (
            0  # on the CPU, where a sync is free, the loss checks its arguments
        )
        report(*args)

    monkeypatch.setattr(metrics, "report", only_the_report)
    compute(ours, {"beta": 0.3, "entropy_coef": 0.1, "use_adaptive_entropy": True}, inputs)
    assert {name: n for name, n in calls.items() if n} == {"gather": 1, "tolist": 1}


def test_a_loss_is_a_line_of_the_log(trainers, caplog):
    """After those of the calls in it."""
    caplog.set_level(logging.INFO, logger="grpo_fast")
    notices.log_calls()
    try:
        compute(trainers[1], {}, inputs_of(trainers[0]))
    finally:
        notices.log_calls(False)
    lines = [x.getMessage() for x in caplog.records if x.name == "grpo_fast"]
    assert lines[-1] == "TRL GRPOTrainer loss: head and loss fused"
    assert lines[-2].startswith("shared_prompt.with_head: route packed (")
    assert lines[-3].startswith("linear_grpo_loss: ")


class TestNotFused:
    """TRL's own path runs, a line says so once, and the result is TRL's."""

    def test_strict_makes_it_an_error(self, trainers, monkeypatch):
        """At the start of the training, at each loss, and where old and reference log-probs are computed."""
        trainer = trainers[1]
        monkeypatch.setattr(trainer, "aux_loss_enabled", True)
        monkeypatch.setattr(trainer, "router_aux_loss_coef", 0.001, raising=False)
        monkeypatch.setenv("GRPO_FAST_STRICT", "1")
        message = r"GRPO_FAST_STRICT=1: not fused, TRL's own loss runs: router_aux_loss_coef=0.001 "
        log_probs = trainer._get_per_token_logps_and_entropies
        for call in (
            trainer.train,
            lambda: trainer._compute_loss(trainer.model, {}),
            lambda: log_probs(trainer.model, None, None, 1),
        ):
            with pytest.raises(FallbackError, match=message):
                call()

    def test_strict_raises_on_every_process(self, trainers, monkeypatch):
        """Old log-probs of text, while another process has images."""
        trainer = trainers[1]
        accelerator = SimpleNamespace(
            num_processes=2,
            device=torch.device("cpu"),
            is_main_process=True,
            gather=lambda mine: torch.cat([mine, torch.tensor([True])]),
        )
        monkeypatch.setattr(trainer, "_is_vlm", True)
        monkeypatch.setattr(trainer, "accelerator", accelerator)
        monkeypatch.setenv("GRPO_FAST_STRICT", "1")
        with pytest.raises(FallbackError, match="the inputs of another process are not text alone"):
            trainer._get_per_token_logps_and_entropies(trainer.model, None, None, 1)

    def check(self, trainers, options, inputs, match, capsys):
        trainers[1]._said.clear()
        capsys.readouterr()
        got = compute(trainers[1], options, inputs)
        compute(trainers[1], options, inputs)
        (line,) = capsys.readouterr().out.splitlines()  # once
        assert re.match(f"grpo_fast: not fused, TRL's own loss runs: {match}", line)
        want = compute(trainers[0], options, inputs)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
        assert got[2] == want[2]

    def test_auxiliary_loss_of_a_mixture_of_experts(self, tmp_path, capsys):
        """It is not fused until the option that the line names is set."""
        torch.manual_seed(0)
        config = MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
        model = MixtralForCausalLM(config)
        pair = make(Stock, copy.deepcopy(model), tmp_path), make(GRPOTrainer, model, tmp_path)
        match = r"router_aux_loss_coef=0.001 adds .*; GRPOConfig\(router_aux_loss_coef=0.0\) trains"
        self.check(pair, {}, inputs_of(pair[0]), match, capsys)
        pair = (
            make(cls, model, tmp_path, router_aux_loss_coef=0.0) for cls in (Stock, GRPOTrainer)
        )
        assert_same(tuple(pair), {"beta": 0.1})
        assert "not fused" not in capsys.readouterr().out

    def test_multimodal_inputs(self, trainers, monkeypatch, capsys):
        # Any of their names: the model here takes none, so TRL's own forward is stubbed to see it arrive.
        seen = []
        inputs = inputs_of(trainers[0]) | {
            "token_type_ids": torch.zeros(B, P + T, dtype=torch.long)
        }

        def stock(self, model, *args, **kwargs):
            seen.append(kwargs["token_type_ids"])
            logps = torch.zeros(B, T, requires_grad=True)
            return logps, logps.detach(), None

        monkeypatch.setattr(Stock, "_get_per_token_logps_and_entropies", stock)
        match = r"the inputs are not text alone \(token_type_ids\); batches of text are fused$"
        self.check(trainers, {}, inputs, match, capsys)
        assert seen[0] is inputs["token_type_ids"]

    @pytest.mark.parametrize(
        "name, options",
        [
            ("_get_per_token_logps_and_entropies", {}),
            ("get_gamma_weights", {"loss_type": "vespo"}),
            ("get_off_policy_mask", {"off_policy_mask_threshold": 0.02}),
        ],
    )
    @pytest.mark.parametrize("on", ["class", "instance"])
    def test_a_step_overridden(self, on, name, options, trainers, monkeypatch, capsys):
        """A step of a subclass runs, on policy as well."""
        calls = []

        def replaced(theirs):
            def step(*args, **kwargs):
                calls.append(name)
                return theirs(*args, **kwargs)

            return step

        ours = trainers[1]
        if on == "class":
            step = replaced(getattr(GRPOTrainer, name))
            whole = name.startswith("_")
            body = {name: step if whole else staticmethod(step)}
            monkeypatch.setattr(ours, "__class__", type("Mine", (GRPOTrainer,), body))
        else:
            monkeypatch.setattr(ours, name, replaced(getattr(ours, name)), raising=False)
        inputs = inputs_of(trainers[0], ("on_policy",))
        match = (
            f"{type(ours).__name__} has its own {name}, which the fused loss does not call; it is"
        )
        self.check(trainers, options, inputs, match, capsys)
        assert calls


def test_a_model_that_does_something_else_is_refused(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    ours = make(GRPOTrainer, model, tmp_path)
    ours.model.config.logit_scale = 2.0  # which a Llama does not look at
    with pytest.raises(ValueError, match="LlamaForCausalLM: its logits are not those"):
        compute(ours, {}, inputs_of(ours))
    assert ours.model.training


@pytest.mark.parametrize(
    "name, options",
    [
        ("Gemma2", {"final_logit_softcapping": 1.5, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Phi", {}),
    ],
)
def test_other_heads(name, options, tmp_path):
    """A soft cap, scales, a bias, tied weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    pair = make(Stock, copy.deepcopy(model), tmp_path), make(GRPOTrainer, model, tmp_path)
    assert_same(pair, {"beta": 0.1, "entropy_coef": 0.1})
