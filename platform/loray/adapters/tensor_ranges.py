"""A safetensors file that is read in ranges: its header first, then tensors in the order of layers.

The tensors are views of one buffer. A tensor's values are valid once its bytes have been received. The file's SHA-256
is computed from its beginning, as far as it is complete.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loray.bases.checkpoint import DTYPES, TensorEntry, header_end
from loray.errors import IntegrityError

_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Range(NamedTuple):
    """Bytes [start, stop) of the file. Once it and all ranges before it are received, the first `num_layers` layers
    are complete.
    """

    start: int
    stop: int
    num_layers: int


class PartialFile:
    """The bytes of a file, `data`, and views of them, `tensors`; valid as far as `data` has been filled.

    Several threads may fill `data` and call `mark_received`; one thread at a time calls `update_hash` or `verify`.
    """

    def __init__(
        self,
        beginning: bytes,
        entries: Mapping[str, TensorEntry],
        memory: Callable[[int, torch.dtype], Tensor],
        *,
        source: str,
    ) -> None:
        """`beginning` has at least the bytes up to `header_end`, and `entries` is its header.

        memory  (elements, dtype) → the tensor that the file is read into. Raises IntegrityError for a dtype that torch
                does not have
        """
        self._source = source
        data_start = header_end(beginning, source=source)
        self.num_bytes = max((entry.stop for entry in entries.values()), default=data_start)
        skip = -data_start % 8  # so that the tensors are aligned
        try:
            whole = memory(skip + self.num_bytes, torch.uint8)[skip:]
            self.tensors: dict[str, Tensor] = {
                name: whole[e.start : e.stop].view(getattr(torch, DTYPES[e.dtype])).view(e.shape)
                for name, e in entries.items()
            }
        except (KeyError, RuntimeError) as e:
            raise IntegrityError(f"{source} is damaged: its header is not that of a safetensors file ({e})") from e
        self.data = whole.numpy().data
        self._entries = entries
        self._sha256 = hashlib.sha256()
        self.num_hashed = 0
        self._hash_s = 0.0
        self._lock = threading.Lock()
        self._received: list[tuple[int, int]] = []  # disjoint, sorted; neighbours are not joined
        self._beginning_end = min(len(beginning), self.num_bytes)
        self.data[: self._beginning_end] = beginning[: self._beginning_end]
        self.mark_received(0, self._beginning_end)

    def ranges(self, max_bytes: int) -> list[Range]:
        """List the missing ranges in the order in which to read them: tensors without a layer, then layer by layer.

        Neighbours in the file are one range of up to `max_bytes`. If no more than that is missing, it is one range.
        """
        layers: dict[int, list[tuple[int, int]]] = {}
        for name, entry in self._entries.items():
            match = _LAYER.search(name)
            start, stop = max(entry.start, self._beginning_end), entry.stop
            if start < stop:
                layers.setdefault(int(match[1]) if match else -1, []).append((start, stop))
        if layers and self.num_bytes - self._beginning_end <= max_bytes:
            return [Range(self._beginning_end, self.num_bytes, max(layers) + 1)]
        merged: list[Range] = []
        for layer in sorted(layers):
            spans = list(_joined(layers[layer]))
            for i, (start, stop) in enumerate(spans, 1):
                num_layers = max(0, layer + (i == len(spans)))
                if merged and merged[-1].stop == start and stop - merged[-1].start <= max_bytes:
                    merged[-1] = Range(merged[-1].start, stop, num_layers)
                else:
                    merged.append(Range(start, stop, num_layers))
        return merged

    def mark_received(self, start: int, stop: int) -> None:
        """Note that `data[start:stop]` has been filled."""
        with self._lock:
            insort(self._received, (start, stop))

    def update_hash(self) -> None:
        """Hash the bytes from `num_hashed` to the first gap."""
        end = self.num_hashed
        with self._lock:
            for start, stop in self._received:
                if start > end:
                    break
                end = max(end, stop)
        began = time.monotonic()
        self._sha256.update(self.data[self.num_hashed : end])
        self._hash_s += time.monotonic() - began
        self.num_hashed = end

    def hash_seconds_left(self) -> float:
        """Estimate the seconds to hash the rest of the file, at the pace so far."""
        return (self.num_bytes - self.num_hashed) * self._hash_s / self.num_hashed if self.num_hashed else 0.0

    def verify(self, sha256: str) -> None:
        """Raise IntegrityError unless the file has this SHA-256."""
        self.update_hash()
        if self._sha256.hexdigest() != sha256:
            raise IntegrityError(f"{self._source} is damaged: it differs from its SHA-256; publish the adapter again")


def _joined(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    spans = sorted(spans)
    start, end = spans[0]
    for next_start, next_end in spans[1:]:
        if next_start != end:
            yield start, end
            start = next_start
        end = next_end
    yield start, end
