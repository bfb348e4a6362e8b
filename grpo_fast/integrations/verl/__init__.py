"""The adapter of verl 0.9.1: its policy losses and its log-probs.

`VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl` makes every verl process import this module, which
replaces verl's policy losses by those of `POLICY_LOSSES`. They have the same `actor.policy_loss.loss_mode`,
signature, configuration, losses, gradients and metrics. "bypass_mode" stays verl's: it calls verl's own
functions by name. `patch_logprobs()` replaces verl's log-prob functions.
"""

import importlib
import importlib.util
import logging
import sys

from grpo_fast.integrations.shared.packages import VERSIONS, replace, require
from grpo_fast.integrations.verl.log_probs import linear_cross_entropy, logprobs_from_logits
from grpo_fast.integrations.verl.losses import OPTIONS, POLICY_LOSSES
from grpo_fast.notices import fell_back

__all__ = [
    "OPTIONS",
    "POLICY_LOSSES",
    "linear_cross_entropy",
    "logprobs_from_logits",
    "patch_logprobs",
    "register",
]

SUPPORTED = VERSIONS["verl"]


def register() -> None:
    """Replace verl's policy losses by `POLICY_LOSSES`, in this process.

    Raises:
        ImportError: verl is not installed, or has another version.
    """
    require("verl", *SUPPORTED)
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    for mode, loss in POLICY_LOSSES.items():
        core_algos.register_policy_loss(mode)(loss)


def patch_logprobs() -> None:
    """Replace verl's `logprobs_from_logits` and `linear_cross_entropy`, in this process.

    They are also replaced in the modules of verl that have already imported them.

    Raises:
        ImportError: verl is not installed, or has another version.
    """
    require("verl", *SUPPORTED)
    home = importlib.import_module("verl.utils.torch_functional")
    replace("verl", home.logprobs_from_logits, logprobs_from_logits)
    fused = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    replace("verl", fused.linear_cross_entropy, linear_cross_entropy)


def _is_installed() -> bool:
    spec = importlib.util.find_spec("verl")
    # Any folder of that name is found as well; it has no origin.
    return spec is not None and spec.origin is not None


if "verl" in sys.modules:
    register()
elif _is_installed():
    try:
        register()
    except ImportError as reason:  # the losses work without verl
        fell_back("verl", str(reason), tell=logging.getLogger(__name__).warning)
