"""Measure time and memory of every kernel beside eager PyTorch and torch.compile (README.md)."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
