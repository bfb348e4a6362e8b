"""How a row is shared between programs: the twin of `kernels/schedules.py`, where it never is."""


def counts_arrivals(V: int) -> bool:
    """Whether a launch on rows of V entries counts programs, in a vector of int32 zeros."""
    return False
