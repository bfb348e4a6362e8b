"""The language-model head in chunks of tokens, with a workspace for logits and gradient.

    z = h W^T + bias + scaling (h A^T) B^T        one chunk of C rows at a time
    dh = dz W,  dW += dz^T h                      the caller writes dz over z

dW is accumulated in float32 whatever the dtype of the weight. All products of a call have the same
C rows, and the last chunk is filled up with zeros. So the result of a row depends on the rest of
the batch only as far as the matrix library makes it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_fast.notices import note, noting
from grpo_fast.ops.backend import run
from grpo_fast.ops.head.arguments import Needs, Options, Parameters, on_gpu
from grpo_fast.ops.head.chunk_length import length_of, padded
from grpo_fast.ops.head.products import (
    accumulate,
    early_dtype,
    has_mixed_products,
    product,
    say_copies,
    working_dtypes,
)
from grpo_fast.ops.head.vocab_parallel import Shard
from grpo_fast.records import Incoming, Outgoing, SoftCap


class Head:
    """One pass of the head over the rows of `hidden`, part by part.

    For each part call `logits`, write the gradient of these, and call `backward`.

    Args:
        hidden: (N, D).
        rows: indices of the rows that take part, or None for all.
        live: (N,) bool, or None; only without `rows`. Where it is False `hidden` may hold anything.
        needs: the gradients that `backward` collects.
        length: rows of the longest part, where the caller chooses the parts; 0: chosen here.
        early: whether the upstream gradient comes after this pass; see `early_dtype`.
    """

    def __init__(
        self,
        hidden: Tensor,
        parameters: Parameters,
        options: Options,
        rows: Tensor | None,
        live: Tensor | None,
        needs: Needs,
        length: int = 0,
        early: bool = False,
    ) -> None:
        V = options.vocab_size
        self.dtype, self.logits_dtype = working_dtypes(hidden, options)
        # The dtype of products that the library may split (`product`).
        self.sums = torch.float32 if has_mixed_products(hidden) else self.dtype
        if on_gpu(hidden) and hidden.dtype != self.dtype:
            say_copies()
        self.hidden, self.rows, self.live, self.needs = hidden, rows, live, needs
        self.full = parameters
        self.dhidden_dtype = early_dtype(hidden) if early else hidden.dtype
        weight, bias, lora_a, lora_b = parameters
        self.weight = self._operand(weight[:V])
        self.bias = None if bias is None else bias[:V].to(self.logits_dtype)
        self.lora_a = None if lora_a is None else self._operand(lora_a)
        self.lora_b = None if lora_b is None else self._operand(lora_b[:V])
        self.scaling = options.lora_scaling.item()
        self.shard = Shard.of(options.tp_group, options.first_row) if options.tp_group else None
        self.softcap = None
        if options.softcap is not None:
            self.softcap = SoftCap(options.softcap.item(), options.logit_scale.item())
        self.N = len(hidden) if rows is None else len(rows)
        self.C = length_of(hidden, self.N, options, length)
        if noting():
            kind = str(self.logits_dtype).removeprefix("torch.")
            chunks = f"chunks of {self.C} tokens: {-(-self.N // self.C)}"
            if length:
                chunks = f"chunks of whole sequences, at most {self.C} tokens each"
            note(f"{chunks}, logits in {kind}")
        rows = hidden.new_empty((self.C if self.N else 0, padded(V)), dtype=self.logits_dtype)
        self._work = rows[:, :V]
        # The gradient overwrites the logits from the first byte of each row on. Its elements are
        # smaller where the logits are float32 and the operands are halves.
        self._dlogits = rows.view(self.dtype)[:, :V]
        # A shard's statistics meet elsewhere (`read_shared_rows`).
        self._counts_arrivals = not self.shard and run("schedules.counts_arrivals", hidden, V)
        self._counters: Tensor | None = None
        self._waiting: slice | None = None  # the part whose gradient is still in the stage
        self._loaded: Tensor | None = None  # `move_rows` writes hidden states here
        if needs.hidden or needs.parameters:
            self._new_gradients()

    def _operand(self, x: Tensor) -> Tensor:
        """Return x as it enters the products: rounded to the dtype of `hidden`, on any device."""
        return x.to(self.hidden.dtype).to(self.dtype)

    def _new_gradients(self) -> None:
        new = self.hidden.new_zeros
        D, V = self.hidden.shape[1], len(self.weight)
        weight, bias, lora_a, lora_b = self.full
        # Rows that take no part have a gradient of 0; all others are written.
        whole = self.rows is None
        # With several processes the gradient is float32: their sum is rounded once, at its end.
        exact = torch.float32 if self.shard else self.dhidden_dtype
        self.dhidden = (self.hidden.new_empty if whole else new)(
            self.hidden.shape if self.needs.hidden else 0, dtype=exact
        )
        self.dweight = self.hidden.new_empty(0, dtype=torch.float32)
        if self.needs.weight:
            self.dweight = self.hidden.new_empty(weight.shape, dtype=torch.float32)
            if len(weight) > V:
                self.dweight[V:] = 0  # the first chunk writes the others
            if not self.N:
                self.dweight.zero_()

        def zeros(wanted: bool, like: Tensor | None) -> Tensor:
            return new(like.shape if wanted and like is not None else 0, dtype=torch.float32)

        self.dbias = zeros(self.needs.bias, bias)
        self.dlora_a = zeros(self.needs.lora_a, lora_a)
        self.dlora_b = zeros(self.needs.lora_b, lora_b)
        self._stage = self.hidden.new_empty((self.C if self.N else 0, D), dtype=self.sums)
        self._fresh = True

    def parts(self) -> Iterator[slice]:
        """Yield consecutive parts of the rows that take part, C rows each; the last may be shorter."""
        for start in range(0, self.N, self.C):
            yield slice(start, min(start + self.C, self.N))

    def counters(self, part: slice) -> Tensor | None:
        """Return zeros, (n,) int32, in which the programs of a row count themselves.

        They serve one launch on these rows.

        Return None where a row has one program.
        """
        if not self._counts_arrivals:
            return None
        if self._counters is None:
            self._counters = self.hidden.new_zeros(self.N, dtype=torch.int32)
        return self._counters[part]

    def _load(self, part: slice) -> Tensor:
        """Return the hidden states of a part, (C, D).

        They are 0 after the end of the part and in rows that do not count.
        """
        n = part.stop - part.start
        plain = self.rows is None and self.live is None and n == self.C
        if plain and self.hidden.dtype == self.dtype:
            self._move(None)
            return self.hidden[part]
        if self._loaded is None:
            self._loaded = self.hidden.new_empty(self.C, self.hidden.shape[1], dtype=self.dtype)
        self._move(part)
        return self._loaded

    def _move(self, part: slice | None) -> None:
        """Move the waiting gradient to its place, and hidden states of a part to `_loaded`, in one launch."""
        waiting, self._waiting = self._waiting, None
        outgoing, incoming = None, None
        if waiting is not None:
            outgoing = Outgoing(self._stage, *self._places(self.dhidden, waiting))
        if part is not None:
            assert self._loaded is not None
            hidden, rows, n = self._places(self.hidden, part)
            live = None if self.live is None else self.live[part]
            incoming = Incoming(hidden, rows, live, n, self._loaded)
        if outgoing is not None or incoming is not None:
            run("chunks.move_rows", self.hidden, outgoing, incoming)

    def _places(self, x: Tensor, part: slice) -> tuple[Tensor, Tensor | None, int]:
        """Return the place of the rows of a part in x.

        Returns:
            x (N, D) or the part of it, the indices of the rows in that or None for the first ones,
            and how many.
        """
        n = part.stop - part.start
        return (x[part], None, n) if self.rows is None else (x, self.rows[part], n)

    def logits(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return the logits of a part, (1, n, V), and the tensor for their gradient.

        Both share memory: the gradient overwrites the logits (`schedules.overlaps`).
        """
        n = part.stop - part.start
        self._h = self._load(part)
        if self.bias is None:
            product(self._h, self.weight.T, self._work)
        elif self.bias.dtype == self._h.dtype:  # it may fuse the bias, which saves a pass
            torch.addmm(self.bias, self._h, self.weight.T, out=self._work)
        else:
            self._work.copy_(self.bias.expand_as(self._work))
            accumulate(self._work, self._h, self.weight.T)
        if self.lora_a is not None and self.lora_b is not None:
            inner = self._h.new_empty(self.C, len(self.lora_a), dtype=self.sums)
            product(self._h, self.lora_a.T, inner)
            self._inner = inner.to(self.dtype)
            accumulate(self._work, self._inner, self.lora_b.T, self.scaling)
        return self._work[:n][None], self._dlogits[:n][None]

    def backward(self, part: slice) -> None:
        """Add to the gradients from the part whose logits were computed last."""
        n = part.stop - part.start
        dz = self._dlogits
        if n < self.C:
            dz[n:] = 0
        V = len(self.weight)
        dinner = None
        if self.lora_b is not None and (self.needs.hidden or self.needs.lora_a):
            summed = dz.new_empty(self.C, self.lora_b.shape[1], dtype=self.sums)
            product(dz, self.lora_b, summed)
            dinner = summed.mul_(self.scaling).to(self.dtype)
        if self.needs.hidden:
            direct = self.rows is None and n == self.C and self.dhidden.dtype == self._stage.dtype
            out = self.dhidden[part] if direct else self._stage
            product(dz, self.weight, out)
            if dinner is not None and self.lora_a is not None:
                accumulate(out, dinner, self.lora_a)
            if not direct:
                self._waiting = part  # it is moved when the next part is taken
        if self.needs.weight:
            accumulate(self.dweight[:V], dz.T, self._h, fresh=self._fresh)
        if self.needs.bias:
            self.dbias[:V] += dz.sum(0, dtype=torch.float32)
        if self.needs.lora_b:
            accumulate(self.dlora_b[:V], dz.T, self._inner, self.scaling)
        if self.needs.lora_a and dinner is not None:
            accumulate(self.dlora_a, dinner.T, self._h)
        self._fresh = False

    def hidden_gradient(self) -> Tensor:
        """Return the gradient of `hidden`, (0,) if not wanted; with a shard, the share of this process."""
        self._move(None)
        return self.dhidden

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return all gradients in the order of `Needs`, (0,) where not wanted.

        The gradients of parameters are float32.
        """
        self.hidden_gradient()
        if self.shard:
            for x in (self.dhidden, self.dlora_a):  # all processes contribute to these
                if x.numel():
                    self.shard.total(x)
        dhidden = self.dhidden.to(self.dhidden_dtype)
        return dhidden, self.dweight, self.dbias, self.dlora_a, self.dlora_b
