"""A configuration, a batch and the call of a policy loss, for the tests of verl's adapter."""

from types import SimpleNamespace

import torch

from grpo_fast.integrations.verl import losses
from tests.support.hosts import assert_adapter_only_scales
from tests.support.oracles import verl_core_algos

B, T = 5, 6

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)

MODES = tuple(losses.POLICY_LOSSES)
GLOBAL = {"dp_size": 2, "batch_num_tokens": 53, "global_batch_size": 9, "loss_scale_factor": 11}


def configuration(**options):
    """Return what the losses read of an ActorConfig, in verl's own type, with verl's defaults."""
    base = verl_core_algos().ActorConfig

    class Config(base):
        def get(self, name, default=None):
            return getattr(self, name, default)

    config = Config()
    policy = {
        "clip_cov_ratio": 1.0,  # all candidates, so that nothing depends on the draw
        "clip_cov_lb": 0.0,
        "clip_cov_ub": 5.0,
        "kl_cov_ratio": 0.3,
        "ppo_kl_coef": 0.1,
        "dro_beta": 0.3,
    }
    vars(config).update(
        {
            "clip_ratio": 0.2,
            "clip_ratio_low": 0.2,
            "clip_ratio_high": 0.28,
            "clip_ratio_c": 3.0,
            "tau_pos": 1.0,
            "tau_neg": 1.05,
            "global_batch_info": {},
            "policy_loss": SimpleNamespace(**policy),
        }
        | options
    )
    return config


def batch(device, per_token=True):
    """Ragged, one row empty; ratios from far below to far above every bound; one row without an advantage."""
    torch.manual_seed(7)
    mask = torch.arange(T) < torch.tensor([6, 0, 3, 5, 1])[:, None]
    logp = -2 * torch.rand(B, T) - 0.05
    logp[3, 0] = -0.1
    old = (logp - 0.5 * torch.randn(B, T)).clamp(max=-0.01)  # a log-prob: below 0
    old[0, 0], old[0, 1], old[3, 0] = logp[0, 0] - 21, logp[0, 1] - 1.5, logp[3, 0] - 2.5
    advantages = torch.randn(B, T) if per_token else torch.randn(B, 1).expand(B, T).clone()
    advantages[2] = 0
    advantages[0, 0], advantages[3, 0] = -0.5, 1.0
    weights = 2 * torch.rand(B, T)
    return tuple(x.to(device) for x in (old, logp, advantages, weights, mask))


def run(fn, x, old, advantages, mask, aggregation, config, weights):
    """(loss, gradient, metrics) with an upstream gradient other than 1."""
    x = x.detach().clone().requires_grad_()
    loss, metrics = fn(
        old_log_prob=old,
        log_prob=x,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=weights,
    )
    if fn in losses.POLICY_LOSSES.values():
        assert_adapter_only_scales(loss)
    (grad,) = torch.autograd.grad(0.7 * loss, x)
    return loss, grad, metrics
