"""The kernels by PyTorch's operators: the twin of `grpo_fast.kernels`, for any device.

Each file has the name of a file of kernels, each function the name and the signature of its launcher.
`grpo_fast.ops.backend.run` chooses between the two. What these functions need no kernel for, such as buffers
to count in (`arrived`), they ignore.
"""
