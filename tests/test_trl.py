"""TRL's own `_compute_loss`, run in float64 on a stubbed trainer, as an independent oracle."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss
from grpo_fast.testing import assert_as_accurate
from tests.cases import batch, in_double, loss_and_grad

pytest.importorskip("trl", "1.16", reason="the oracle is TRL's own code")
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
    """What `GRPOTrainer._compute_loss` reads of its trainer, for a model whose logits are these."""
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


LOSS_TYPES = {
    "grpo": {"reduction": "sequence_mean"},
    "bnpo": {"reduction": "token_mean"},
    "dapo": {"reduction": "token_mean"},
    "dr_grpo": {"reduction": "fixed_length", "max_length": MAX_LENGTH},
    "luspo": {"reduction": "sequence_sum"},
    # TRL's epsilon_high is the bound itself, and there is no lower one.
    "cispo": {"reduction": "token_mean", "surrogate": "cispo", "epsilon_low": 1.0},
    "sapo": {"reduction": "sequence_mean", "surrogate": "sapo"},
    "vespo": {"reduction": "token_mean", "surrogate": "vespo"},
}
BY_ITEMS = ("dapo", "cispo", "vespo")  # normalised by num_items_in_batch


def objective_of(loss_type, options):
    chosen = dict(LOSS_TYPES[loss_type])
    if loss_type == "cispo":
        chosen["epsilon_high"] = options["epsilon_high"] - 1
    elif "surrogate" not in chosen:
        chosen |= {"epsilon_high": options["epsilon_high"], "delta": options["delta"]}
    # VESPO looks at the level through the ratio of the bias-corrected KL alone.
    if loss_type != "vespo" or (options["bias_correction"] and options["beta"]):
        chosen["ratio"] = options["level"]
    return Objective(
        beta=options["beta"],
        kl="k3_unbiased" if options["bias_correction"] else "k3",
        entropy_coef=options["entropy_coef"],
        off_policy_threshold=options["off_policy"],
        **chosen,
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
        elif "surrogate" not in LOSS_TYPES[loss_type]:
            names["clip_ratio/low_mean"] = "clip_fraction_low"
            if not options["delta"] or options["delta"] > 1 + options["epsilon_high"]:
                names["clip_ratio/high_mean"] = "clip_fraction_high"  # TRL counts after its clamp
    if options["beta"]:
        names["kl"] = "kl"
    metrics = grpo_loss(logits, ids, **arguments).metrics
    reported = theirs(logits.double(), ids, inputs, loss_type, options)[1]
    for theirs_name, ours in names.items():
        assert metrics[ours].item() == pytest.approx(reported[theirs_name][0], rel=1e-4, abs=1e-6)


def test_entropy_bonus_with_a_token_mean(backend, device):
    """TRL's bonus is a token mean whatever the loss type; the same as ours where the loss is one, too."""
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
    truth = loss_and_grad(lambda x: theirs(x, ids, inputs, "bnpo", options)[0], logits.double())
    del arguments["ref_logps"]
    arguments["objective"] = objective_of("bnpo", options)
    ours = loss_and_grad(lambda x: grpo_loss(x, ids, **arguments).loss / GAS, logits)
    for a, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-4, atol=1e-7)
