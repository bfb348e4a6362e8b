"""Count the bytes that the kernels move, by the formulas of their docstrings.

N tokens, `live` of which count, `moving` of which have a gradient; V entries of w bytes. What is
per token is left out next to rows of logits.
"""

import dataclasses

from benchmarks.report import markdown

FLAG, ID, FLOAT = 1, 8, 4


@dataclasses.dataclass(frozen=True)
class Traffic:
    read: int  # from memory
    reread: int  # a second time, from the cache if the row is still there
    written: int
    rewritten: int = 0  # a second time, in the cache: the scored column of a gradient

    @property
    def least(self) -> int:
        """The bytes that memory has to move."""
        return self.read + self.written

    @property
    def most(self) -> int:
        """The bytes that memory moves if nothing is found in the cache."""
        return self.least + self.reread


def logprob_forward(live: int, V: int, w: int) -> Traffic:
    return Traffic(read=live * V * w, reread=live * w, written=0)


def logprob_backward(N: int, live: int, V: int, w: int) -> Traffic:
    return Traffic(read=live * V * w, reread=0, written=N * V * w, rewritten=live * w)


def logprob(N: int, live: int, V: int, w: int) -> Traffic:
    """Count forward and backward."""
    there, back = logprob_forward(live, V, w), logprob_backward(N, live, V, w)
    return Traffic(there.read + back.read, there.reread, back.written, back.rewritten)


def grpo(N: int, live: int, moving: int, V: int, w: int, parts: int = 1) -> Traffic:
    """Count the loss with its gradient; each of `parts` programs of a row reads the scored logit."""
    reread = moving * V * w + parts * live * w
    return Traffic(read=live * V * w, reread=reread, written=N * V * w, rewritten=moving * w)


def policy_loss(N: int) -> Traffic:
    """Read are mask, logp, weight, advantage, old, ref; written loss, dlogp, KL, clip flag."""
    return Traffic(read=N * (FLAG + 5 * FLOAT), reread=0, written=N * (3 * FLOAT + FLAG))


def policy_loss_backward(N: int) -> Traffic:
    """The upstream gradient and dlogp are read, their product is written."""
    return Traffic(read=N * 2 * FLOAT, reread=0, written=N * FLOAT)


def sequence_loss(N: int) -> Traffic:
    """GSPO reads mask, logp and old again after the sums, then mask and dlogp for the mean."""
    one = policy_loss(N)
    return Traffic(one.read, N * (3 * FLOAT + 2 * FLAG), one.written + N * FLOAT)


def group_advantage(B: int) -> Traffic:
    """A reward is read, an advantage is written; the rest of the group is in the cache."""
    return Traffic(read=B * FLOAT, reread=0, written=B * FLOAT)


# A row of RESULTS.md: per element of the logits or per token.
FORMULAS = {
    "logprob, forward": ("live V w", "live w", "-"),
    "logprob, backward": ("live V w", "-", "N V w, live w twice"),
    "grpo": ("live V w", "moving V w + live w for each program", "N V w, moving w twice"),
    "policy_loss": ("21 N", "-", "13 N"),
    "sequence_loss": ("21 N", "14 N", "17 N"),
    "group_advantage": ("4 B", "-", "4 B"),
}


def table() -> str:
    head = ["launch", "read", "read again, from the cache", "written"]
    return markdown.table(head, [(x, *row) for x, row in FORMULAS.items()], left=range(4))
