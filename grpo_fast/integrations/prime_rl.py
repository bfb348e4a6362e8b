"""prime-rl 0.8: custom losses for its trainer.

    [trainer.loss]
    type = "custom"
    import_path = "grpo_fast.integrations.prime_rl.ipo_loss"
    kwargs = { ipo_threshold = 0.1 }

The ratio is to the policy of the inference engine; a loss is the sum over the tokens of one sequence, which
prime-rl divides by those of the global batch.
"""

import importlib
from typing import Any

from torch import Tensor

from grpo_fast.diagnostics import TokenDiagnostics, kl_estimate, token_diagnostics
from grpo_fast.integrations._host import masked_mean
from grpo_fast.loss import LossOutput, policy_loss
from grpo_fast.objective import Objective


def default_loss(
    inputs: Any,
    dppo_mask_low: float = 0.2,
    dppo_mask_high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
) -> Any:
    """prime-rl's `type = "default"`, DPPO with a quadratic term: its options and metrics."""
    bound = {"epsilon_low": dppo_mask_low, "epsilon_high": dppo_mask_high}
    objective = Objective.preset("prime_rl/default", **bound, quadratic_coef=kl_tau)
    token, metrics = _diagnose(inputs, objective)
    dropped = inputs.loss_mask & token.outside
    metrics |= {
        "is_masked_low": masked_mean(token.clipped_low, inputs.loss_mask),
        "is_masked_high": masked_mean(token.clipped_high, inputs.loss_mask),
        "masked_advantage_positive": masked_mean(inputs.advantages > 0, dropped),
        "masked_advantage_negative": masked_mean(inputs.advantages < 0, dropped),
    }
    return _outputs(inputs, _sum(inputs, adv_tau, objective), metrics)


def ipo_loss(
    inputs: Any, ipo_threshold: float = 0.1, adv_tau: float = 1.0, kl_tau: float = 1e-3
) -> Any:
    """prime-rl's `type = "ipo"`, with its options and metrics."""
    bound = {"epsilon_low": ipo_threshold, "epsilon_high": ipo_threshold}
    objective = Objective.preset("prime_rl/ipo", **bound, quadratic_coef=kl_tau)
    return _outputs(inputs, _sum(inputs, adv_tau, objective), _diagnose(inputs, objective)[1])


def loss(inputs: Any, preset: str = "dapo", adv_tau: float = 1.0, **options: Any) -> Any:
    """Any objective: a preset's name and the options of `Objective` over it.

    Metrics are those of `grpo_fast.loss`, per sequence. The reduction has no effect: the sum is prime-rl's.
    """
    objective = Objective.preset(preset, **{"reduction": "token_mean", **options})
    out = _sum(inputs, adv_tau, objective)
    return _outputs(inputs, out, out.metrics)


def _sum(inputs: Any, adv_tau: float, objective: Objective) -> LossOutput:
    return policy_loss(
        inputs.trainer_logprobs,
        advantages=adv_tau * inputs.advantages,
        mask=inputs.loss_mask,
        old_logps=inputs.inference_logprobs,
        ref_logps=inputs.ref_logprobs if objective.beta else None,
        token_weights=inputs.loss_weights,
        num_items=1.0,
        objective=objective,
    )


def _diagnose(inputs: Any, objective: Objective) -> tuple[TokenDiagnostics, dict[str, Tensor]]:
    """What the objective makes of each token, and the metrics that prime-rl's losses share."""
    logp, sampler, live = inputs.trainer_logprobs, inputs.inference_logprobs, inputs.loss_mask
    token = token_diagnostics(logp, sampler, inputs.advantages, mask=live, objective=objective)
    mismatch = kl_estimate(sampler, logp)  # of the sampler's tokens: KL(sampler || trainer)
    return token, {
        "masked_mismatch_kl": masked_mean(mismatch, live & token.outside),
        "unmasked_mismatch_kl": masked_mean(mismatch, live & ~token.outside),
        "is_masked": masked_mean(token.outside, live),
    }


def _outputs(inputs: Any, out: LossOutput, metrics: dict[str, Tensor]) -> Any:
    # Where the inputs come from, without importing a trainer that is already running.
    return importlib.import_module(type(inputs).__module__).LossOutputs(
        loss=out.loss, metrics=metrics
    )
