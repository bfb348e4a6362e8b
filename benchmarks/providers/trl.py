"""TRL 1.16: its kernels, and the loss its trainer computes from log-probs.

The loss is `GRPOTrainer._compute_loss` itself, on an object that has what it reads of a trainer,
metrics and their transfers to the host included: that is what a step of TRL runs.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers.common import Function, UnavailableError, loss_type, need_gpu
from grpo_fast import Objective

VERSION = "1.16"
VOCABULARY_CHUNK = 32_768  # what its trainers pass


def _require(kernel: bool = False) -> Any:
    """Import TRL's trainer, so that a failure comes here and not when it is timed."""
    if kernel:
        need_gpu("TRL's kernel", interpreted=True)
    import trl
    from trl.trainer.grpo_trainer import GRPOTrainer

    if not trl.__version__.startswith(VERSION):
        raise UnavailableError(f"trl {trl.__version__} is installed, {VERSION} wanted")
    return GRPOTrainer


def logprob() -> Function:
    """Load the Triton kernel; it always computes the entropy as well."""
    _require(kernel=True)
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return lambda logits, ids: selective_log_softmax_and_entropy(logits, ids)[0]


def _trainer(logps: Tensor, entropy: Tensor, objective: Objective) -> Any:
    GRPOTrainer = _require()
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=objective.ratio,
        beta=objective.beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=loss_type(objective),
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=logps.shape[1],
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=0.0,
        _metrics={"train": defaultdict(list)},
    )


def _loss(logps: Tensor, entropy: Tensor, *, objective: Objective, **given: Any) -> Tensor:
    mask = given["mask"]
    weights = torch.ones_like(logps) if mask is None else mask.to(logps.dtype)
    ids = weights.long()  # of the right shape; the log-probs are there already
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": weights,
        "advantages": given["advantages"],
        "old_per_token_logps": given["old_logps"],
        "ref_per_token_logps": given["ref_logps"],
    }
    return _require()._compute_loss(_trainer(logps, entropy, objective), None, inputs)


def policy_loss() -> Function:
    _require()
    return lambda logps, **arguments: _loss(logps, torch.zeros_like(logps), **arguments)


def grpo() -> Function:
    """Load the kernel on logits, followed by the trainer's loss."""
    _require(kernel=True)
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy as kernel

    return lambda logits, ids, **arguments: _loss(*kernel(logits, ids), **arguments)


def _head(hidden: Tensor, weight: Tensor, ids: Tensor, outputs: tuple[str, ...]) -> Any:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    arguments = hidden, weight, None, ids, 1.0, VOCABULARY_CHUNK, None, 1.0, outputs
    return ChunkedLogProbFunction.apply(*arguments)


def linear_logprob() -> Function:
    """Load the chunked head; on a CPU in its own PyTorch form."""
    _require()
    from trl.kernels import chunked_logprob  # noqa: F401

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return _head(hidden.flatten(0, 1), weight, ids.flatten(), ())[0].view_as(ids)

    return call


def linear_grpo() -> Function:
    """Load the chunked head, called as TRL's trainer calls it, and the trainer's loss."""
    _require()

    def call(hidden: Tensor, weight: Tensor, ids: Tensor, **arguments: Any) -> Tensor:
        mask = arguments["mask"]
        if mask is None or not hidden.is_cuda:  # its trainer selects tokens on GPUs only
            found = _head(hidden.flatten(0, 1), weight, ids.flatten(), ("entropy",))[:2]
            return _loss(*(x.view_as(ids) for x in found), **arguments)
        found = _head(hidden[mask], weight, ids[mask], ("entropy",))[:2]
        return _loss(*(x.new_zeros(ids.shape).masked_scatter(mask, x) for x in found), **arguments)

    return call
