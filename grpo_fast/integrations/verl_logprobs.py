"""Importing this module replaces verl's log-prob functions: `grpo_fast.integrations.verl.patch_logprobs()`.

For `VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl,grpo_fast.integrations.verl_logprobs`, which verl
imports in each of its processes.
"""

from grpo_fast.integrations.verl import patch_logprobs

patch_logprobs()
