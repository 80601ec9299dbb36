"""Memory of recorded steps on a CPU: what is there when a recording begins, and what the recording makes itself."""

from __future__ import annotations

import ctypes
import gc
import weakref
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

_ALIGNED = 256


@dataclass(frozen=True)
class Range:
    """Addresses from `start` to `stop`, and the storages that are there: none keeps its memory alive."""

    start: int
    stop: int
    storages: tuple[StorageWeakRef, ...]

    @property
    def is_there(self) -> bool:
        """One of the storages lives, where it was, and has not become smaller."""
        found = [UntypedStorage._new_with_weak_ptr(s.cdata) for s in self.storages]  # type: ignore[attr-defined]
        size = self.stop - self.start
        return any(s is not None and s.data_ptr() == self.start and s.nbytes() >= size for s in found)


class Living:
    """The storages of all tensors that live now."""

    def __init__(self) -> None:
        found: dict[tuple[int, int], dict[int, StorageWeakRef]] = {}
        for thing in gc.get_objects():
            if type(thing) not in (Tensor, Parameter) or thing.device.type != "cpu" or thing.layout != torch.strided:
                continue
            storage = thing.untyped_storage()
            if start := storage.data_ptr():
                own = found.setdefault((start, start + storage.nbytes()), {})
                own.setdefault(storage._cdata, StorageWeakRef(storage))
        self._ranges = [Range(start, stop, tuple(own.values())) for (start, stop), own in sorted(found.items())]
        self._starts = [r.start for r in self._ranges]

    def find(self, start: int, stop: int) -> Range | None:
        """What has all of these addresses."""
        before = self._ranges[: bisect_right(self._starts, start)]
        return next((r for r in reversed(before) if stop <= r.stop), None)


class Arena:
    """As the private memory of CUDA graphs: recordings share it, nothing else is ever there, and what a recording gives
    up is taken again by itself or the next one.
    """

    def __init__(self, num_bytes: int = 1 << 28) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8)  # of the system only where it is written
        self._free = [(self._memory.data_ptr(), num_bytes)]  # (start, bytes)
        self._taken: dict[int, tuple[int, object]] = {}  # by start: stop, owner
        self._given_back: list[int] = []  # by the end of a tensor, at any time
        self._num_used = 0

    def storage(self, num_bytes: int, owner: object) -> UntypedStorage:
        """It has its place until it dies."""
        self._settle()
        size = -(-num_bytes // _ALIGNED) * _ALIGNED
        at = next((i for i, (_, free) in enumerate(self._free) if free >= size), None)
        assert at is not None, f"a recording needs more than the arena's {self._memory.nbytes} bytes"
        start, free = self._free[at]
        self._free[at : at + 1] = [(start + size, free - size)] if free > size else []
        self._taken[start] = (start + size, owner)
        self._num_used = max(self._num_used, start + size - self._memory.data_ptr())
        memory = (ctypes.c_uint8 * num_bytes).from_address(start)
        weakref.finalize(memory, self._given_back.append, start).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()

    def has(self, start: int) -> bool:
        return 0 <= start - self._memory.data_ptr() < self._memory.nbytes

    def owner(self, start: int, stop: int) -> object | None:
        """Of the recording that has taken all of these addresses and still has them."""
        self._settle()
        return next((o for first, (end, o) in self._taken.items() if first <= start and stop <= end), None)

    def spoil(self) -> None:
        """All that has been there is lost: floats are not numbers, integers −1."""
        self._memory[: self._num_used].fill_(255)

    def _settle(self) -> None:
        if not self._given_back:
            return
        while self._given_back:
            start = self._given_back.pop()
            self._free.append((start, self._taken.pop(start)[0] - start))
        joined: list[tuple[int, int]] = []
        for start, free in sorted(self._free):
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + free)
            else:
                joined.append((start, free))
        self._free = joined


def at_address(x: Tensor) -> Tensor:
    """The same elements by their address alone: it keeps nothing alive, as the arguments of a CUDA graph."""
    storage = x.untyped_storage()
    if not storage.nbytes():
        return x
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return in_storage(x, torch.frombuffer(memory, dtype=torch.uint8).untyped_storage())


def in_storage(x: Tensor, storage: UntypedStorage) -> Tensor:
    """A tensor like `x`, at the same place of another storage."""
    return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.size(), x.stride())
