"""How programs share a row: the twin of `kernels/schedules.py`. PyTorch's operators never share one."""


def counts_arrivals(V: int) -> bool:
    """Whether a launch on rows of V entries counts programs, in a vector of int32 zeros."""
    return False
