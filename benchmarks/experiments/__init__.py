"""Programs to run by hand: variants of a kernel, two commits, error tables, models."""
