"""Compute times and memory that nobody measured."""
