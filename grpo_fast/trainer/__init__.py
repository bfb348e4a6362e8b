"""The included trainer: GRPO on any causal language model of transformers, with the losses of grpo_fast.

`grpo_fast.trainer.train.train(config)` makes a whole run, and `grpo_fast.trainer.cli` is its command line.
The trainer needs the extra [train]; the README says how to install it.
"""
