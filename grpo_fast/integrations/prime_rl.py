"""The adapter of prime-rl 0.8: custom losses for its trainer.

    [trainer.loss]
    type = "custom"
    import_path = "grpo_fast.integrations.prime_rl.ipo_loss"
    kwargs = { ipo_threshold = 0.1 }

The ratio is to the policy of the inference engine. A loss is the sum over the tokens of one sequence;
prime-rl divides it by the tokens of the global batch.
"""

import importlib
from typing import Any

from torch import Tensor

from grpo_fast.diagnostics import kl_estimate
from grpo_fast.integrations.shared.call import SUM, LossCall, masked_mean, outside


def default_loss(
    inputs: Any,
    dppo_mask_low: float = 0.2,
    dppo_mask_high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
) -> Any:
    """Compute prime-rl's loss of `type = "default"`, DPPO with a quadratic term, and its metrics."""
    bounds = {"epsilon_low": dppo_mask_low, "epsilon_high": dppo_mask_high}
    call = _call(inputs, "prime_rl/default", adv_tau, {**bounds, "quadratic_coef": kl_tau})
    seen = call.replace(advantages=inputs.advantages)  # metrics are without adv_tau
    dropped = seen.mask * seen.token.outside
    metrics = {
        "is_masked_low": seen.mean(seen.token.clipped_low),
        "is_masked_high": seen.mean(seen.token.clipped_high),
        "masked_advantage_positive": masked_mean(seen.advantages > 0, dropped),
        "masked_advantage_negative": masked_mean(seen.advantages < 0, dropped),
    }
    return _outputs(inputs, call, _mismatch(seen) | metrics)


def ipo_loss(
    inputs: Any, ipo_threshold: float = 0.1, adv_tau: float = 1.0, kl_tau: float = 1e-3
) -> Any:
    """Compute prime-rl's loss of `type = "ipo"`, and its metrics."""
    bounds = {"epsilon_low": ipo_threshold, "epsilon_high": ipo_threshold}
    call = _call(inputs, "prime_rl/ipo", adv_tau, {**bounds, "quadratic_coef": kl_tau})
    return _outputs(inputs, call, _mismatch(call))


def loss(inputs: Any, preset: str = "dapo", adv_tau: float = 1.0, **options: Any) -> Any:
    """Compute the loss of any objective: a preset, and options of `Objective` that override it.

    The metrics are those of `grpo_fast.loss`, per sequence. The reduction of the preset is left out:
    prime-rl wants a sum.
    """
    call = _call(inputs, preset, adv_tau, options)
    return _outputs(inputs, call, call.out.metrics)


def _call(inputs: Any, preset: str, adv_tau: float, options: dict[str, Any]) -> LossCall:
    call = LossCall(
        preset=preset,
        options=options,
        average=SUM,
        logps=inputs.trainer_logprobs,
        old_logps=inputs.inference_logprobs,
        advantages=adv_tau * inputs.advantages,
        mask=inputs.loss_mask,
        token_weights=inputs.loss_weights,
    )
    return call.replace(ref_logps=inputs.ref_logprobs) if call.objective.beta else call


def _mismatch(call: LossCall) -> dict[str, Tensor]:
    """Return the metrics that all of prime-rl's losses have."""
    # The tokens are the sampler's, so this is KL(sampler || trainer).
    mismatch = kl_estimate(call.old, call.logps)
    return {
        "masked_mismatch_kl": masked_mean(mismatch, call.mask * call.token.outside),
        "unmasked_mismatch_kl": masked_mean(mismatch, call.mask * ~call.token.outside),
        "is_masked": outside(call),
    }


def _outputs(inputs: Any, call: LossCall, metrics: dict[str, Tensor]) -> Any:
    # The module of the inputs has the class: nothing of the running trainer is imported again.
    home = importlib.import_module(type(inputs).__module__)
    return home.LossOutputs(loss=call.out.loss, metrics=metrics)
