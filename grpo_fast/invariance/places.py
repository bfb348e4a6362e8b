"""Where one sequence is in a batch, and which part of a tensor of the batch belongs to it."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Place:
    """One sequence of `length` tokens in a batch of `rows` rows and `width` columns.

    It is in row `row`, behind `before` columns.
    """

    length: int
    rows: int = 1
    width: int = 0
    row: int = 0
    before: int = 0

    def part(self, x: Tensor, shape: torch.Size) -> Tensor | None:
        """Return the view of x that belongs to the sequence, if it has this shape.

        `shape` is what the tensor has in a forward of the sequence alone. A dimension that has grown
        is one of rows, of columns, or of rows times something: tokens, or heads. None: the shapes
        do not fit.
        """
        if x.ndim != len(shape):
            return None
        for dim, want in enumerate(shape):
            have = x.shape[dim]
            if have == want:
                continue
            if want == self.length and have == self.width:
                x = x.narrow(dim, self.before, want)
            elif want == self.length and have == self.rows * self.width:
                x = x.narrow(dim, self.row * self.width + self.before, want)
            elif have == want * self.rows:
                x = x.narrow(dim, self.row * want, want)
            else:
                return None
        return x

    def has_own(self, x: Tensor, shape: torch.Size) -> bool:
        """Whether x has a part for each row, and not one for all of them; x as in `part`."""
        grown = [
            have
            for have, want in zip(x.shape, shape, strict=True)
            if have != want and (want, have) != (self.length, self.width)
        ]
        return self.rows == 1 or bool(grown)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; NaN equals NaN."""
    if a.dtype != b.dtype:
        return False
    equal = a == b
    if a.is_floating_point() or a.is_complex():
        equal |= a.isnan() & b.isnan()
    return bool(equal.all())
