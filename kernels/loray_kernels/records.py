"""Records: where an adapter's LoRA rows are, as words that kernels read in place. `vectors` has what else it brings.

A record is written when its adapter is placed or moved and not step by step, and a decode step names records only. So
the step's launches do not depend on which adapters it has, and can be recorded.

Shapes: S sequences, M modules of one input.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray_kernels.pages import to_device

INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
RECORD_TOKENS = 4  # of one adapter, that share the reading of its rows
MAX_ROWS = 512  # of A, of all modules of one input; an adapter with more has no record
_WORDS = 1 << 20  # of a directory: 8 MB, the records of 3,000 adapters of Llama-3-8B

Columns = tuple[tuple[int, int], ...]  # (first column, columns) of each segment of a row


@dataclass(frozen=True, slots=True)
class RowTables:
    """Rows of equal width: (column, width, int64 offsets of each row) for each segment."""

    segments: tuple[tuple[int, int, Tensor], ...]
    memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


class LoraRows(NamedTuple):
    """Of one module: for each segment of A's rows, and of B's, the offsets of all of them; alpha/r."""

    a: tuple[Sequence[int], ...]
    b: tuple[Sequence[int], ...]
    scale: float


class InputShape(NamedTuple):
    """Segments of rows of A, and of B for each module of INPUTS. Equal for all adapters of a base.

    pair_column  of A of a VeRA pair, the column that meets the input's first: a rank of several may have a part of it
    pair_rows    of B of a VeRA pair, for each module the row of this rank's first output
    """

    a: Columns
    b: tuple[Columns, ...]
    pair_column: int = 0
    pair_rows: tuple[int, ...] = (0, 0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """The directory in the device's memory, (words,) of int64, and the rows that it describes, by input."""

    words: Tensor
    inputs: tuple[InputShape, ...]
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)


class Directory:
    """Gives records their places and writes them. For the engine's thread. The first `reserved` words stay zero."""

    def __init__(
        self, inputs: Sequence[InputShape], device: torch.device, num_words: int = _WORDS, *, reserved: int = 0
    ) -> None:
        self.records = Records(torch.zeros(num_words, dtype=torch.int64, device=device), tuple(inputs))
        self._free = [(reserved, num_words - reserved)]  # (start, words), by start

    def add(self, words: npt.NDArray[np.int64]) -> int | None:
        """The start of a new record; None if there is no place for it."""
        size = len(words)
        for i, (start, free) in enumerate(self._free):
            if free >= size:
                self._free[i : i + 1] = [(start + size, free - size)] if free > size else []
                self.write(start, words)
                return start
        return None

    def write(self, start: int, words: npt.NDArray[np.int64]) -> None:
        """Steps that are queued already read the old words."""
        own = self.records.words[start : start + len(words)]
        own.copy_(to_device(torch.from_numpy(words), own.device))

    def remove(self, start: int, size: int) -> None:
        insort(self._free, (start, size))
        joined: list[tuple[int, int]] = []
        for first, free in self._free:
            if joined and sum(joined[-1]) == first:
                joined[-1] = (joined[-1][0], joined[-1][1] + free)
            else:
                joined.append((first, free))
        self._free = joined


def record_words(
    groups: Sequence[Mapping[str, LoraRows]], layer_group: Sequence[int], inputs: Sequence[InputShape]
) -> npt.NDArray[np.int64] | None:
    """A record: for each layer and input where its block begins, or 0; then the blocks, which layers of one group
    share. csrc/lora.cu describes a block. None if an input has more than MAX_ROWS rows.

    layer_group  the group of each layer; −1 for a layer without LoRA
    """
    blocks: list[list[int]] = []
    numbers: list[list[int]] = []  # of each group's blocks, by input; −1: none
    for rows in groups:
        numbers.append([])
        for modules, shape in zip(INPUTS, inputs, strict=True):
            block = _block([rows.get(m) for m in modules], shape)
            numbers[-1].append(len(blocks) if block else -1)
            blocks += [block] if block else []
            if block and sum(block[: len(modules)]) > MAX_ROWS:
                return None
    head = len(layer_group) * len(INPUTS)
    starts = [*accumulate(map(len, blocks), initial=head)]
    none = [-1] * len(INPUTS)
    words = [starts[n] if n >= 0 else 0 for g in layer_group for n in (numbers[g] if g >= 0 else none)]
    return np.array([*words, *(word for block in blocks for word in block)], dtype=np.int64)


def _block(modules: Sequence[LoraRows | None], shape: InputShape) -> list[int]:
    found = [rows for rows in modules if rows is not None]
    if not found:
        return []
    words = [0 if rows is None else len(rows.a[0]) for rows in modules]
    scales = np.array([0.0 if rows is None else rows.scale for rows in modules], dtype=np.float32)
    words += scales.view(np.uint32).tolist()
    for segment in range(len(shape.a)):
        words += [offset for rows in found for offset in rows.a[segment]]
    for rows in found:
        words += [offset for offsets in rows.b for offset in offsets]
    return words


def read_block(words: Tensor, start: int, field: int, shape: InputShape) -> list[LoraRows | None]:
    """The modules of one input as `record_words` wrote them, for the record from `start` on."""
    at = int(words[start + field])
    if not at:
        return []
    num = len(shape.b)
    taken = start + at + 2 * num

    def take(count: int) -> list[int]:
        nonlocal taken
        taken += count
        return [int(word) for word in words[taken - count : taken]]

    ranks = [int(rank) for rank in words[start + at : start + at + num]]
    bits = words[start + at + num : taken].cpu().numpy().astype(np.uint32)
    a = [take(sum(ranks)) for _ in shape.a]
    firsts = [*accumulate(ranks, initial=0)]
    rows: list[LoraRows | None] = []
    for rank, first, scale, columns in zip(ranks, firsts, bits.view(np.float32), shape.b, strict=False):
        b = tuple(take(rank) for _ in columns)
        rows.append(LoraRows(tuple(s[first : first + rank] for s in a), b, float(scale)) if rank else None)
    return rows
