"""The layout of keys and values in the pool's blocks, and the writing of adapters' rows into the pool.

Shapes: L layers, E packed elements of a layer, P pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from loray_kernels.prepare import Preparable


class KvLayout(NamedTuple):
    """A block holds, for each layer, K then V, each (block_tokens, num_kv_heads, head_dim). The C++ kernels have K
    as they multiply it: (num_kv_heads, head_dim / U, block_tokens, U), where U elements are four bytes.

    int8_per_element  the bytes of an element of the pool, where K and V are int8; 0: they are of the pool's dtype. The
                      scales of K then V, fp32, each (num_kv_heads, block_tokens), follow them: K ≈ scale · q, as
                      `quantize_rows` rounds a token's head
    """

    num_layers: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    int8_per_element: int = 0

    @property
    def layer_share(self) -> int:
        """Count the elements of the pool that a block has for a layer."""
        heads = 2 * self.block_tokens * self.num_kv_heads
        if not self.int8_per_element:
            return heads * self.head_dim
        return heads * (self.head_dim + 4) // self.int8_per_element

    @property
    def block_stride(self) -> int:
        """Count the elements from block to block, each as K and V are."""
        return self.num_layers * self.layer_share * (self.int8_per_element or 1)


@dataclass(frozen=True, slots=True)
class AttentionMeta(Preparable):
    """The sequences of a step.

    query_start     S+1 offsets into the step's tokens
    context_len     tokens of each sequence in the cache after this step's have been written
    block_table     blocks of each sequence, in order
    slot_mapping_T  block × block_tokens + position in it, of each token of the step
    """

    query_start: tuple[int, ...]
    context_len: tuple[int, ...]
    block_table: tuple[Tensor, ...]
    slot_mapping_T: Tensor


class PageCopy(NamedTuple):
    """`length` elements from `start` of a layer's rows go to `to` of the pool, plus the layer's offset."""

    start: int
    to: int
    length: int


class PageWriter(Protocol):
    """Writes into one pool, from one thread."""

    def write(self, rows_LE: Tensor, layer_offsets: Sequence[int], pieces: Sequence[PageCopy]) -> None:
        """pool[offset + to : offset + to + length] = rows_LE[l, start : start + length], for each layer l with its
        offset and each piece. The memory may be written later, but not after `wait`. Reads and writes of the pool that
        were queued before are completed first.
        """
        ...

    def wait(self) -> None:
        """Whatever is queued after this call sees all that was written. May block the device, not the thread."""
        ...

    def arrival(self) -> Callable[[], bool]:
        """Give what says whether all that has been written up to now is there, so that nobody needs to wait for it."""
        ...


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host; the thread waits neither for the copy nor for what is queued before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class DirectWriter:
    """Writes at once: one strided copy for each piece of several layers at equal distances."""

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool

    def write(self, rows_LE: Tensor, layer_offsets: Sequence[int], pieces: Sequence[PageCopy]) -> None:
        for start, stop, stride in _neighbours(layer_offsets):
            # If the pool is on a device: one transfer, and the copies below are made on the device.
            rows = rows_LE[start:stop].to(self._pool.device, non_blocking=True)
            layers = self._pool[layer_offsets[start] :]
            for piece in pieces:
                to = layers[piece.to :].as_strided((stop - start, piece.length), (stride, 1))
                _copy(to, rows[:, piece.start : piece.start + piece.length])

    def wait(self) -> None:
        pass

    def arrival(self) -> Callable[[], bool]:
        return lambda: True


def _copy(to: Tensor, rows: Tensor) -> None:
    # On the CPU with one thread: with several, they would wait for each other at the end of every piece.
    if to.is_cpu and rows.dtype == to.dtype:
        integers = torch.int16 if to.itemsize == 2 else torch.int32
        np.copyto(to.view(integers).numpy(), rows.view(integers).numpy())
    else:
        to.copy_(rows)


def _neighbours(offsets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, stride): layers [start, stop) are `stride` elements apart."""
    start = 0
    while start < len(offsets):
        stop = start + 1
        stride = offsets[stop] - offsets[start] if stop < len(offsets) else 1
        while stop < len(offsets) and offsets[stop] - offsets[stop - 1] == stride:
            stop += 1
        yield start, stop, stride
        start = stop
