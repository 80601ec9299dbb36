"""A safetensors file that comes in pieces: its header first, then tensors in the order of layers.

The tensors are views of one buffer from the start; what they hold is true once their range has come. The file's SHA-256
is taken as its beginning grows together.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loray.errors import IntegrityError

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class Range(NamedTuple):
    """Bytes [start, stop) of the file. Once it and those before it have come, so have the first `num_layers` layers."""

    start: int
    stop: int
    num_layers: int


class ArrivingFile:
    """`data` is the whole file's bytes, `tensors` lie in it; they are true as far as `data` has been filled.

    Several threads may fill it and tell with `come`; one hashes.
    """

    def __init__(self, beginning: bytes, memory: Callable[[int, torch.dtype], Tensor], *, source: str) -> None:
        """`beginning`: up to `header_end` at least. IntegrityError where the header is damaged.

        memory  (elements, dtype) → the tensor that the file is read into
        """
        self._source = source
        header_end = self.header_end(beginning, source=source)
        try:
            header: dict[str, Any] = json.loads(beginning[8:header_end])
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = {
                name: (header_end + e["data_offsets"][0], header_end + e["data_offsets"][1])
                for name, e in entries.items()
            }
            self.num_bytes = max((stop for _, stop in spans.values()), default=header_end)
            skip = -header_end % 8  # so that the tensors are aligned
            whole = memory(skip + self.num_bytes, torch.uint8)[skip:]
            self.tensors: dict[str, Tensor] = {
                name: whole[slice(*spans[name])].view(_DTYPES[e["dtype"]]).view(e["shape"])
                for name, e in entries.items()
            }
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError) as e:
            raise IntegrityError(f"{source} is damaged: its header is not that of a safetensors file ({e})") from e
        self.data = whole.numpy().data
        self._spans = spans
        self._sha256 = hashlib.sha256()
        self.num_hashed = 0
        self._hash_s = 0.0
        self._lock = threading.Lock()
        self._come: list[tuple[int, int]] = []  # disjoint, sorted; neighbours are not joined
        self._beginning_end = min(len(beginning), self.num_bytes)
        self.data[: self._beginning_end] = beginning[: self._beginning_end]
        self.come(0, self._beginning_end)

    @staticmethod
    def header_end(beginning: bytes, *, source: str) -> int:
        """Where the header ends, from the file's first 8 bytes."""
        length = int.from_bytes(beginning[:8], "little")
        if len(beginning) < 8 or length > _MAX_HEADER_BYTES:
            raise IntegrityError(f"{source} is damaged: it is not a safetensors file")
        return 8 + length

    def ranges(self, max_bytes: int) -> list[Range]:
        """What is missing, in the order in which to ask for it: tensors without a layer, then layer by layer, where
        neighbours in the file are asked for together, up to `max_bytes`; a file that has no more missing comes at once.
        """
        layers: dict[int, list[tuple[int, int]]] = {}
        for name, (start, stop) in self._spans.items():
            match = _LAYER.search(name)
            start = max(start, self._beginning_end)
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

    def come(self, start: int, stop: int) -> None:
        """`data[start:stop]` has been filled."""
        with self._lock:
            insort(self._come, (start, stop))

    def hash_more(self) -> None:
        """Of the file's beginning, as far as it has come without a gap."""
        end = self.num_hashed
        with self._lock:
            for start, stop in self._come:
                if start > end:
                    break
                end = max(end, stop)
        began = time.monotonic()
        self._sha256.update(self.data[self.num_hashed : end])
        self._hash_s += time.monotonic() - began
        self.num_hashed = end

    def hash_seconds_left(self) -> float:
        """Of hashing what is not hashed yet, at the pace so far."""
        return (self.num_bytes - self.num_hashed) * self._hash_s / self.num_hashed if self.num_hashed else 0.0

    def verify(self, sha256: str) -> None:
        """IntegrityError unless the file is the one with this SHA-256."""
        self.hash_more()
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
