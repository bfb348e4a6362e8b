"""One GRPO update of a 7B model."""
