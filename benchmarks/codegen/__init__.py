"""Compile the kernels for GPUs that need not be there, and count what they compile to."""
