"""Run by hand: variants of a kernel side by side, two commits side by side."""
