"""What kernels load and store, counted in Triton's interpreter."""

import contextlib
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.support.guards import unguarded


class Traffic:
    """Addresses of what was loaded and stored, a chunk per load or store of a program."""

    def __init__(self):
        self.loads = []
        self.stores = []

    @staticmethod
    def note(chunks, pointers, mask=None):
        addresses = np.atleast_1d(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data != 0, addresses.shape)]
        width = pointers.get_element_ty().primitive_bitwidth // 8
        chunks.append((addresses.ravel().astype(np.int64), max(width, 1)))

    @staticmethod
    def total(chunks):
        return sum(len(addresses) * width for addresses, width in chunks)

    @staticmethod
    def within(chunks, tensor):
        """(bytes, how often each of its elements) in the storage of a tensor."""
        first = tensor.untyped_storage().data_ptr()
        size = tensor.element_size()
        counts = np.zeros(tensor.untyped_storage().nbytes() // size, dtype=np.int64)
        for addresses, _ in chunks:
            inside = (addresses >= first) & (addresses < first + len(counts) * size)
            np.add.at(counts, (addresses[inside] - first) // size, 1)
        index = torch.arange(len(counts)).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        assert counts.sum() == counts[np.unique(index.numpy())].sum(), "beside the tensor"
        return int(counts.sum()) * size, torch.from_numpy(counts)[index]

    def read(self, tensor):
        return self.within(self.loads, tensor)

    def written(self, tensor):
        return self.within(self.stores, tensor)


@contextlib.contextmanager
def counted():
    """Count loads and stores, masked lanes not included; an atomic is both."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic = InterpreterBuilder.create_atomic_rmw

    def counting_load(self, pointers, mask, *args):
        traffic.note(traffic.loads, pointers, mask)
        return load(self, pointers, mask, *args)

    def counting_store(self, pointers, value, mask, *args):
        traffic.note(traffic.stores, pointers, mask)
        return store(self, pointers, value, mask, *args)

    def counting_atomic(self, operation, pointers, value, mask, *args):
        traffic.note(traffic.loads, pointers, mask)
        traffic.note(traffic.stores, pointers, mask)
        return atomic(self, operation, pointers, value, mask, *args)

    with (
        unguarded(),
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", counting_atomic),
    ):
        yield traffic
