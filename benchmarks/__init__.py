"""Measure time and memory of every kernel beside eager PyTorch and torch.compile (README.md)."""

import argparse
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent


def command_line(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Make a parser that prints a module's docstring as it stands."""
    lines = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=lines, prog=prog)
