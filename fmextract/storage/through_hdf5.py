"""One chunk as libhdf5 itself reads it, filters and all: what a codec is compared with."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from fmextract.storage.codecs import Codec


def values_by_libhdf5(payload: bytes, codec: Codec, dtype: str, values: int) -> npt.NDArray[Any] | None:
    """Return the `values` values of a chunk that `codec` compressed; None where libhdf5 lacks its filter.

    Raises OSError where libhdf5 cannot undo it.
    """
    kind = np.dtype(dtype)
    filters = codec.filters(kind.itemsize)
    if not all(h5py.h5z.filter_avail(number) for number, _ in filters):
        return None
    with h5py.File("chunk.h5", "w", driver="core", backing_store=False) as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((values,))
        for number, options in filters:
            if number == h5py.h5z.FILTER_SHUFFLE:
                plist.set_shuffle()
            else:
                plist.set_filter(number, h5py.h5z.FLAG_MANDATORY, options)
        space, type_ = h5py.h5s.create_simple((values,)), h5py.h5t.py_create(kind)
        dataset = h5py.h5d.create(file.id, b"chunk", type_, space, plist)
        dataset.write_direct_chunk((0,), payload)
        dataset.flush()
        return np.asarray(file["chunk"][:])
