"""Forward the prompt of a group once: exact, for causal LMs of transformers.

A group of G completions of one prompt needs G (P + R) tokens if each has its own row, and P + G R if they
share the prompt. `plan` finds what is shared. `with_head` and `forward` compute the states that predict the
completions. `backward` does it with the memory of one prompt and a few completions. `check` compares both
forwards on a user's own model and batch. docs/shared_prompts.md says when it pays.

It needs transformers >= 5.17.
"""

from grpo_fast.integrations.shared.packages import TRANSFORMERS, require

require("transformers", TRANSFORMERS)

from grpo_fast.shared_prompt.checking import Report, check  # noqa: E402
from grpo_fast.shared_prompt.choice import Choice, choose  # noqa: E402
from grpo_fast.shared_prompt.grouping import plan  # noqa: E402
from grpo_fast.shared_prompt.passes import Part, backward, forward, with_head  # noqa: E402
from grpo_fast.shared_prompt.plans import Plan, Rows  # noqa: E402
from grpo_fast.shared_prompt.recompute import layers_recomputed  # noqa: E402

__all__ = [
    "Choice",
    "Part",
    "Plan",
    "Report",
    "Rows",
    "backward",
    "check",
    "choose",
    "forward",
    "layers_recomputed",
    "plan",
    "with_head",
]
