"""Shapes, and the batches that every benchmark takes."""
