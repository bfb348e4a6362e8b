"""A small study of GRPO on the included trainer's arithmetic task, and a PPO baseline beside it."""
