"""The language-model head in chunks of tokens: logits into a workspace, and their gradient out of it.

    z = h W^T + bias + scaling (h A^T) B^T        one chunk of C rows at a time
    dh = dz W,  dW += dz^T h                      dz written over z by the caller

dW is accumulated in float32 whatever the dtype of the weight. Every product of a call has the same C rows,
the last chunk filled up with zeros: a row's result then depends on the batch around it no more than the
matrix library makes it.
"""

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_fast.ops._backend import launch, use_triton, version_of
from grpo_fast.ops._head_arguments import Needs, Options, Parameters
from grpo_fast.ops._rows import SoftCap
from grpo_fast.ops._vocab_parallel import Shard


def mixed_products_of(version: str, hip: str | None) -> bool:
    """Whether `mm` of halves may have a float32 result on a GPU: under ROCm it raises before 2.10."""
    return hip is None or version_of(version) >= (2, 10)


# Of the workspace. Both want long chunks, since the weight and its gradient are read, and the gradient is
# written, once per chunk. On a CPU at least a share of what a float32 head takes: a 7B model's (D = 3584)
# then gets chunks of 512 rows; 208 cost it a tenth of the time.
WORKSPACE_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}
CPU_WORKSPACE_SHARE = 1 / 7
# cuBLAS tiles of the product that gives dh, and what a chunk costs besides, in waves of such tiles.
TILE_ROWS, TILE_COLUMNS, CHUNK_COST = 128, 256, 0.35
# `addmm` of halves into a float32 sum: before 2.10 it wanted the sum in the dtype of the operands.
MIXED_ADDMM = version_of(torch.__version__) >= (2, 10)
MIXED_MM = mixed_products_of(torch.__version__, torch.version.hip)
SLAB = 8192  # rows of such a sum at a time, where it has to be added up separately
# Elements: with row strides that are a multiple of it, rows of any vocabulary start aligned.
PAD = 64


def row_limit(hidden: Tensor, options: Options) -> int:
    """How many rows of logits may exist at a time."""
    if options.chunk_size:
        return options.chunk_size
    row = max(padded(options.widest), PAD) * working_dtypes(hidden, options)[1].itemsize
    if hidden.is_cuda:
        return max(1, WORKSPACE_BYTES["cuda"] // row)
    share = CPU_WORKSPACE_SHARE * 4 * options.widest * hidden.shape[1]
    return max(1, max(WORKSPACE_BYTES["cpu"], int(share)) // row)


def working_dtypes(hidden: Tensor, options: Options) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the operands of the products, and of the logits."""
    if not options.fp32_logits:
        return hidden.dtype, hidden.dtype
    # Where no product of halves has a float32 result, it is one of float32 copies.
    return hidden.dtype if has_mixed_products(hidden) else torch.float32, torch.float32


def has_mixed_products(x: Tensor) -> bool:
    """Whether halves on the device of x can be multiplied with a float32 result."""
    return on_gpu(x) and MIXED_MM


def on_gpu(x: Tensor) -> bool:
    """Whether PyTorch's CUDA (or ROCm) operators work on x."""
    return x.is_cuda


@functools.cache
def warn_of_copies() -> None:
    """Once: what a GPU that could multiply halves does instead."""
    warnings.warn(
        f"grpo_fast: PyTorch {torch.__version__} cannot multiply half-precision matrices with a float32 "
        "result under ROCm: the head is multiplied in float32, which is right but slower. PyTorch 2.10 or "
        'newer can; logits_dtype="bf16" multiplies halves here and rounds the logits',
        stacklevel=2,
    )


def early_dtype(hidden: Tensor) -> torch.dtype:
    """Of a gradient of `hidden` that is yet to be scaled: below 6e-8 float16 has nothing."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def chunk_rows(N: int, D: int, most: int, processors: int | None) -> int:
    """How many rows to take at a time, at most `most`: equal chunks, on a GPU whole waves of tiles.

    Args:
        processors: of the GPU; None for a CPU.
    """
    step = TILE_ROWS if processors else 8
    if most < step or step >= N:
        return max(1, min(most, N))
    if not processors:
        count = -(-N // (most // step * step))
        return round_up(-(-N // count), step)
    return min(
        (equal_chunk(N, C) for C in range(step, min(most, round_up(N, step)) + 1, step)),
        key=lambda C: (waves(N, C, D, processors), C),
    )


def processors(x: Tensor) -> int | None:
    """How many multiprocessors the GPU of x has; None on a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else None


def equal_chunk(N: int, C: int) -> int:
    """The rows of each of as many chunks as chunks of C would be."""
    count = -(-N // C)
    return round_up(-(-N // count), TILE_ROWS)


def waves(N: int, C: int, D: int, processors: int) -> float:
    """The cost of chunks of C rows: waves of tiles of dh, and what each chunk costs besides."""
    tiles = -(-C // TILE_ROWS) * -(-D // TILE_COLUMNS)
    return -(-N // C) * (-(-tiles // processors) + CHUNK_COST)


def round_up(x: int, step: int) -> int:
    """The least multiple of `step` that is not below x."""
    return -(-x // step) * step


def padded(V: int) -> int:
    """The row stride of a workspace for V columns."""
    return round_up(V, PAD)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`; out may be float32 where a and b are halves (`has_mixed_products`).

    Always into a buffer: autocast would turn `@` into a product of halves. The library may split a sum that
    is long, or a product that has few results, and by PyTorch's default it adds up the pieces in the dtype of
    `out`. There `out` has to be float32, and the caller rounds it. Logits in half precision are no such
    product: sums of D elements, many results, the same as in the model's own head.
    """
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def accumulate(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, fresh: bool = False) -> None:
    """`out += alpha a @ b`, or `out = alpha a @ b` if `fresh`; out is float32, or of the dtype of a and b."""
    beta = 0 if fresh else 1  # with 0 what `out` holds is not read
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif not has_mixed_products(a):
        torch.addmm(out, a.float(), b.float(), beta=beta, alpha=alpha, out=out)
    elif MIXED_ADDMM:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        _accumulate_in_slabs(out, a, b, alpha, fresh)


def _accumulate_in_slabs(out: Tensor, a: Tensor, b: Tensor, alpha: float, fresh: bool) -> None:
    """`accumulate` by products of their own, of a slab of rows at a time."""
    for mine, rows in zip(out.split(SLAB), a.split(SLAB), strict=True):
        if fresh and alpha == 1:
            torch.mm(rows, b, out_dtype=out.dtype, out=mine)
        else:
            found = torch.mm(rows, b, out_dtype=out.dtype)
            torch.mul(found, alpha, out=mine) if fresh else mine.add_(found, alpha=alpha)


class Head:
    """One pass over the rows of `hidden`: `logits` of a part, its gradient put in place, then `backward`.

    Args:
        hidden: (N, D).
        rows: indices of the rows that take part, or None for all.
        live: (N,) bool, or None; without `rows` only: `hidden` may hold anything where it is False.
        needs: the gradients that `backward` is to collect.
        length: rows of the longest part, where the parts are the caller's; 0 to choose.
        early: the upstream gradient is yet to come; see `early_dtype`.
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
        # Of products that the library may split (`product`).
        self.sums = torch.float32 if has_mixed_products(hidden) else self.dtype
        if on_gpu(hidden) and hidden.dtype != self.dtype:
            warn_of_copies()
        self.hidden, self.rows, self.live, self.needs = hidden, rows, live, needs
        self.full = parameters
        self.dhidden_dtype = early_dtype(hidden) if early else hidden.dtype
        self.kernels = use_triton(hidden)
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
        most = row_limit(hidden, options)
        D = hidden.shape[1]
        self.C = options.chunk_size or length or chunk_rows(self.N, D, most, processors(hidden))
        rows = hidden.new_empty((self.C if self.N else 0, padded(V)), dtype=self.logits_dtype)
        self._work = rows[:, :V]
        # Over the logits, from the first byte of each row on: of smaller elements where they are float32
        # and the operands are halves.
        self._dlogits = rows.view(self.dtype)[:, :V]
        self._counters: Tensor | None = None
        self._waiting: slice | None = None  # the part whose gradient is still in the stage
        self._taken: Tensor | None = None  # where `move_rows` puts hidden states
        if needs.hidden or needs.parameters:
            self._new_gradients()

    def _operand(self, x: Tensor) -> Tensor:
        """x as it enters the products: of the dtype of `hidden`, whatever the device multiplies."""
        return x.to(self.hidden.dtype).to(self.dtype)

    def _new_gradients(self) -> None:
        new = self.hidden.new_zeros
        D, V = self.hidden.shape[1], len(self.weight)
        weight, bias, lora_a, lora_b = self.full
        # Rows that take no part have no gradient; those that do are all written.
        whole = self.rows is None
        # A sum over processes is rounded once, at its end.
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
        """Consecutive parts of the rows that take part, each of C but the last."""
        for start in range(0, self.N, self.C):
            yield slice(start, min(start + self.C, self.N))

    def counters(self, part: slice) -> Tensor | None:
        """(n,) int32 zeros where the programs of a row count themselves, for one launch on these rows.

        None where a row has one program.
        """
        if not self.kernels:
            return None
        from grpo_fast.kernels.schedules import schedule

        if schedule(len(self.weight)).parts == 1:
            return None
        if self._counters is None:
            self._counters = self.hidden.new_zeros(self.N, dtype=torch.int32)
        return self._counters[part]

    def _take(self, part: slice) -> Tensor:
        """(C, D) rows of a part, zeros after them and where they may hold anything."""
        n = part.stop - part.start
        plain = self.rows is None and self.live is None and n == self.C
        if plain and self.hidden.dtype == self.dtype:
            self._move(None)
            return self.hidden[part]
        if self.kernels:
            if self._taken is None:
                self._taken = self.hidden.new_empty(self.C, self.hidden.shape[1], dtype=self.dtype)
            self._move(part)
            return self._taken
        index = None if self.rows is None else self.rows[part]
        h = self.hidden[part] if index is None else self.hidden.index_select(0, index)
        if self.live is not None:
            h = torch.where(self.live[part, None], h, 0)
        h = h.to(self.dtype)
        return h if n == self.C else torch.nn.functional.pad(h, (0, 0, 0, self.C - n))

    def _move(self, part: slice | None) -> None:
        """In one launch: the gradient that waits to its place, hidden states of a part to `_taken`."""
        waiting, self._waiting = self._waiting, None
        if waiting is None and part is None:
            return
        from grpo_fast.kernels.chunks import move_rows

        stage, dhidden, to, n_out = None, None, None, 0
        if waiting is not None:
            stage, (dhidden, to, n_out) = self._stage, self._places(self.dhidden, waiting)
        h, hidden, rows, n_in, live = None, None, None, 0, None
        if part is not None:
            h, (hidden, rows, n_in) = self._taken, self._places(self.hidden, part)
            live = None if self.live is None else self.live[part]
        launch(move_rows, self.hidden, stage, dhidden, to, n_out, hidden, rows, live, n_in, h)

    def _places(self, x: Tensor, part: slice) -> tuple[Tensor, Tensor | None, int]:
        """(x (N, D) or what begins with the rows of a part, which rows of it or None, how many)."""
        n = part.stop - part.start
        return (x[part], None, n) if self.rows is None else (x, self.rows[part], n)

    def logits(self, part: slice) -> tuple[Tensor, Tensor]:
        """(1, n, V) logits of a part, and where their gradient belongs: over them (`schedules.overlaps`)."""
        n = part.stop - part.start
        self._h = self._take(part)
        if self.bias is None:
            product(self._h, self.weight.T, self._work)
        elif (
            self.bias.dtype == self._h.dtype
        ):  # one pass over the chunk less where the library fuses it
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
        """Collect the gradients of the part whose logits were last asked for."""
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
            if self.kernels and not direct:
                self._waiting = part  # until the next part is taken
            elif self.rows is not None:
                self.dhidden.index_copy_(0, self.rows[part], out[:n].to(self.dhidden.dtype))
            elif not direct:
                self.dhidden[part] = out[:n]
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
        """That of `hidden`, (0,) if not wanted; of a vocabulary spread over processes, this one's share."""
        self._move(None)
        return self.dhidden

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of `Needs`; (0,) where not wanted. Those of parameters in float32."""
        self.hidden_gradient()
        if self.shard:
            for x in (self.dhidden, self.dlora_a):  # what all processes contribute to
                if x.numel():
                    self.shard.total(x)
        dhidden = self.dhidden.to(self.dhidden_dtype)
        return dhidden, self.dweight, self.dbias, self.dlora_a, self.dlora_b
