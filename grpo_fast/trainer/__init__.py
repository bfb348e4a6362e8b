"""The thin reference trainer: GRPO on any causal language model of transformers, through `grpo_fast.loss`.

`grpo_fast.trainer.train.train(config)` is the whole run, `grpo_fast.trainer.cli` its command line.
Needs the extra [train]; the README says how to install it.
"""
