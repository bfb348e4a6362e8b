"""Compile the kernel that keeps a row of logits on the chip, and launch it without Triton."""
