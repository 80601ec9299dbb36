"""How the bytes of an adapter's file become rows of the pool, kept for files that differ from it in values alone.

The versions of a run, and the adapters of one recipe, have the same tensors at the same places of their files. Where
every packed row is a part of the file as it is, a list of copies packs the next such file without looking at its names:
LoRA on four modules of 30 layers has 240 tensors, and about 40 copies, since layers are equally far apart.

Shapes: N matrices, R rows, W width.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from loray.engine.memory.adapter_layout import AdapterShape
from loray.spec import RopeParameters

_KEPT = 64
_ALIGNED = 8  # the bytes of the widest dtype


class Write(NamedTuple):
    """`source`, (R, W), goes to R rows that follow each other in a part of the packed adapter: from element `place` of
    a layer, whose first one is `layer`.
    """

    part: int
    layer: int
    place: int
    source: Tensor

    @property
    def start(self) -> int:
        return self.layer + self.place


class Copy(NamedTuple):
    """Copies N matrices (R, W) of one dtype; `shape` is (N, R, W).

    start, step    elements of the part: the first of the first matrix, and from matrix to matrix
    offset, apart  bytes of the file, and elements from matrix to matrix
    strides        elements from row to row of a matrix in the file, and from column to column
    """

    part: int
    start: int
    step: int
    dtype: torch.dtype
    shape: tuple[int, int, int]
    offset: int
    apart: int
    strides: tuple[int, int]


class KnownFile(NamedTuple):
    """Packs the files of one kind. It has what their packed adapters have in common, and the copies."""

    shape: AdapterShape
    rope: RopeParameters | None
    copies: tuple[Copy, ...]

    def fill(self, parts: Sequence[Tensor], file: Tensor) -> None:
        """Copy all rows of `file`, its bytes, to the parts of a packed adapter, which are contiguous."""
        storage_bytes = file.untyped_storage().nbytes() // _ALIGNED * _ALIGNED
        whole = file.as_strided((storage_bytes,), (1,), 0)
        for part, start, step, dtype, shape, offset, apart, strides in self.copies:
            first = (file.storage_offset() + offset) // dtype.itemsize
            source = whole.view(dtype).as_strided(shape, (apart, *strides), first)
            to = parts[part]
            to.as_strided(shape, (step, shape[2], 1), to.storage_offset() + start).copy_(source)


class KnownFiles:
    """The last kinds of files. May be used from any thread."""

    def __init__(self) -> None:
        self._files: dict[Hashable, KnownFile] = {}
        self._lock = threading.Lock()

    def get(self, kind: Hashable) -> KnownFile | None:
        return self._files.get(kind)

    def put(self, kind: Hashable, file: KnownFile) -> None:
        with self._lock:
            self._files[kind] = file
            while len(self._files) > _KEPT:
                del self._files[next(iter(self._files))]


def copies_of(writes: Iterable[Write], file: Tensor) -> tuple[Copy, ...] | None:
    """Say how `writes` are made of `file`, its bytes; None where a source is no part of it."""
    memory = file.untyped_storage().data_ptr()
    alike: dict[tuple[object, ...], list[tuple[int, Write]]] = defaultdict(list)
    for write in writes:
        source = write.source
        if source.untyped_storage().data_ptr() != memory:
            return None
        key = (write.part, write.place, source.dtype, tuple(source.shape), source.stride())
        alike[key].append((source.data_ptr() - file.data_ptr(), write))
    return tuple(_copy(run) for layers in alike.values() for run in _equally_apart(layers))


def _equally_apart(layers: Sequence[tuple[int, Write]]) -> Iterator[Sequence[tuple[int, Write]]]:
    """Cut `layers` into runs that are equally far apart in the file and in the part. Files have layer 10 before 2."""
    distances = [(b - a, to.start - of.start) for (a, of), (b, to) in pairwise(layers)]
    first = 0
    for i, distance in enumerate([*distances, None]):
        if distance is None or distance != distances[first] or distance[0] <= 0:
            yield layers[first : i + 1]
            first = i + 1


def _copy(run: Sequence[tuple[int, Write]]) -> Copy:
    (offset, first), (end, last) = run[0], run[-1]
    source, intervals = first.source, max(1, len(run) - 1)
    num_rows, width = source.shape
    return Copy(
        part=first.part,
        start=first.start,
        step=(last.start - first.start) // intervals,
        dtype=source.dtype,
        shape=(len(run), num_rows, width),
        offset=offset,
        apart=(end - offset) // intervals // source.dtype.itemsize,
        strides=(source.stride(0), source.stride(1)),
    )
