"""The import of this module replaces verl's log-prob functions, by `verl.patch_logprobs()`.

It is for `VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl,grpo_fast.integrations.verl_logprobs`: verl
imports these modules in each of its processes.
"""

from grpo_fast.integrations.verl import patch_logprobs

patch_logprobs()
