"""Time and memory of every kernel against eager PyTorch and torch.compile (README.md)."""
