"""Measure one GRPO update of a 7B model."""
