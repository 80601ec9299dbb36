"""A run's training rows in Ray's object store, in chunks of a few megabytes.

The plan of an epoch is over row numbers, so any row may be next: a worker gets the chunk that a row lies in when it
comes to it, and keeps the last few. On the driver's node that is a mapping of shared memory, without a copy; to other
nodes Ray sends chunks as they are asked for. What does not fit into the object store, Ray keeps on disk.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from loray.train.data.examples import Rows, TokenRows, pack_rows

CHUNK_BYTES = 4 << 20
_OPEN_CHUNKS = 8
_BYTES_PER_TOKEN = 5  # an id, and whether it is to be predicted


class SharedRows:
    """Rows whose chunk c starts with row `firsts[c]`. As cheap to send as its references are."""

    def __init__(self, lengths: NDArray[np.int64], firsts: NDArray[np.int64], chunks: list[Any]) -> None:
        self._lengths, self._firsts, self._chunks = lengths, firsts, chunks
        self._get = lru_cache(_OPEN_CHUNKS)(ray.get)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedRows, (self._lengths, self._firsts, self._chunks)

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        c = int(np.searchsorted(self._firsts, i, side="right")) - 1
        rows: TokenRows = self._get(self._chunks[c])
        return rows.row(i - int(self._firsts[c]))


def share(rows: Rows) -> SharedRows:
    """Put them into the object store, where they stay for as long as what is returned, or a copy of it, lives."""
    ends = np.cumsum(rows.lengths) * _BYTES_PER_TOKEN
    firsts = np.flatnonzero(np.diff(ends // CHUNK_BYTES, prepend=-1))
    parts = np.split(np.arange(len(rows.lengths)), firsts[1:])
    chunks = [ray.put(pack_rows([rows.row(i) for i in part])) for part in parts]
    return SharedRows(rows.lengths, firsts, chunks)
