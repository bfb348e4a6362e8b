"""Measure the time that a call takes on the host, with kernels that are compiled and never run."""
