"""grpo_fast: the loss stage of GRPO-style post-training, fused.

`grpo_fast.loss` holds the losses, `grpo_fast.ops` the differentiable operations they are made of,
`grpo_fast.reference` the definitions in plain PyTorch.
"""

from grpo_fast.objective import Objective

__all__ = ["Objective"]
__version__ = "0.1.0"
