"""The PyTorch twins of `grpo_fast.kernels`: the same functions by PyTorch's operators, for any device.

Each file has the name of a file of kernels, each function the name and the signature of its
launcher. `grpo_fast.ops.backend.run` chooses between the two. These functions ignore arguments that
only kernels need, such as buffers to count in (`arrived`).
"""
