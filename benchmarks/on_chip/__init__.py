"""A kernel that keeps a row of logits on the chip, built and launched without Triton."""
