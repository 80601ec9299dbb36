"""A run's training rows in Ray's object store, in chunks of a few megabytes.

Rows are read in any order. A worker fetches the chunk of a row when it needs the row, and keeps the last few chunks. On
the driver's node a chunk is mapped from shared memory without a copy; Ray sends it to other nodes on demand. Ray spills
chunks that do not fit into the object store to disk.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray import ObjectRef

from loray.train.data.examples import Rows, TokenRows, pack_rows

CHUNK_BYTES = 4 << 20
_OPEN_CHUNKS = 8
_BYTES_PER_TOKEN = 5  # an id in 4 bytes, and in 1 byte whether the token is a target


class SharedRows:
    """Rows in chunks; chunk c starts with row `firsts[c]`. Pickling it copies references, not rows."""

    def __init__(self, lengths: NDArray[np.int64], firsts: NDArray[np.int64], chunks: list[ObjectRef]) -> None:
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
    """Puts the rows into the object store. They stay there as long as the result, or a copy of it, exists."""
    ends = np.cumsum(rows.lengths) * _BYTES_PER_TOKEN
    firsts = np.flatnonzero(np.diff(ends // CHUNK_BYTES, prepend=-1))
    parts = np.split(np.arange(len(rows.lengths)), firsts[1:])
    chunks = [ray.put(pack_rows([rows.row(i) for i in part])) for part in parts]
    return SharedRows(rows.lengths, firsts, chunks)
