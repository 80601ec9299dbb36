"""The records of the adapters in the pool, for decode steps that a backend has recorded; see loray_kernels.records and
loray_kernels.vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loray.bases.config import ModelConfig
from loray.engine.memory.rows import Role, RowTable, Table, columns
from loray.engine.pool.resident import Record, ResidentAdapter
from loray.spec import RopeParameters
from loray_kernels import (
    INPUTS,
    MAX_PAIR_RANK,
    Directory,
    InputShape,
    LoraRows,
    Pair,
    Parts,
    VectorShape,
    record_words,
    vector_words,
)

RopeNumbers = Callable[[RopeParameters], npt.NDArray[np.float32]]  # inverse frequencies, the factor of cos and sin

_LORA = {"lora_a", "lora_b"}
_PARTS: dict[Role, Parts] = {
    "lora_a": Parts.LORA,
    "lora_b": Parts.LORA,
    "vera_d": Parts.VERA,
    "vera_b": Parts.VERA,
    "dora": Parts.DORA,
    "norm": Parts.OWN,
    "embedding": Parts.OWN,
}


class _Words(NamedTuple):
    lora: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.int64]


def input_shapes(config: ModelConfig, capacity: int) -> tuple[InputShape, ...]:
    """`capacity`: elements of a layer's share of a block, at which rows are cut."""
    shapes = [[config.module_shape(module) for module in modules] for modules in INPUTS]
    return tuple(
        InputShape(tuple(columns(of_input[0][1], capacity)), tuple(tuple(columns(o, capacity)) for o, _ in of_input))
        for of_input in shapes
    )


class AdapterRecords:
    """Writes `record` of residents. An adapter has none if an input has more than MAX_ROWS rows of it, if its pair has
    more than MAX_PAIR_RANK ranks or too many for a row of one segment, or if the directory is full.
    """

    def __init__(self, directory: Directory, vectors: VectorShape, *, block_size: int, rope: RopeNumbers) -> None:
        self._directory, self._vectors = directory, vectors
        self._block_size, self._rope = block_size, rope

    def placed(self, adapter: ResidentAdapter) -> None:
        adapter.record = None
        words = self._words(adapter)
        start = None if words is None else self._directory.add(np.concatenate(words))
        if words is None or start is None:
            return
        lora, vectors = map(len, words)
        adapter.record = Record(
            start,
            lora + vectors,
            _parts(adapter),
            start if lora else None,
            start + lora if vectors else 0,
            None if adapter.pair is None else start + lora + vectors - len(Pair._fields),
        )

    def moved(self, adapter: ResidentAdapter) -> None:
        """Its rows are elsewhere. The record stays where it is: it is as long as before."""
        if adapter.record is not None and (words := self._words(adapter)) is not None:
            self._directory.write(adapter.record.start, np.concatenate(words))

    def removed(self, adapter: ResidentAdapter) -> None:
        if adapter.record is not None:
            self._directory.remove(adapter.record.start, adapter.record.size)
            adapter.record = None

    def _words(self, adapter: ResidentAdapter) -> _Words | None:
        """Those of LoRA and of vectors, each empty if it has none."""
        table, parts, none = adapter.table, _parts(adapter), np.array([], dtype=np.int64)
        lora: npt.NDArray[np.int64] | None = none
        if Parts.LORA in parts:
            groups = [_lora_rows(table, group, adapter.scales) for group in range(len(table.groups))]
            lora = record_words(groups, table.layer_group, self._directory.records.inputs)
        vectors = self._vector_words(adapter) if parts & ~Parts.LORA else none
        return None if lora is None or vectors is None else _Words(lora, vectors)

    def _vector_words(self, adapter: ResidentAdapter) -> npt.NDArray[np.int64] | None:
        table, pair = adapter.table, None
        own = [_vectors(group) for group in table.groups]
        if adapter.pair is not None:
            a_RI = adapter.pair.a_RI.data
            first, (rank, width) = adapter.pair.first_block * self._block_size, a_RI.shape
            cut = any(len(offsets) > 1 for group in own for (_, role), offsets in group.items() if role == "vera_d")
            if rank > MAX_PAIR_RANK or cut:
                return None
            pair = Pair(first, first + rank * width, rank, width)
        rope = None if adapter.rope is None else self._rope(adapter.rope)
        return vector_words(self._vectors, own, table.layer_group, _vectors(table.flat), rope, pair)


def _parts(adapter: ResidentAdapter) -> Parts:
    parts = Parts.NONE if adapter.rope is None else Parts.OWN
    for table in (*adapter.table.groups, adapter.table.flat):
        for _, role in table:
            parts |= _PARTS[role]
    return parts


def _vectors(table: Table) -> dict[tuple[str, str], tuple[int, ...]]:
    """Offsets of each segment of what has one row. Embedding rows are named by steps."""
    return {
        (module, role): tuple(s.offsets[0] for s in segments)
        for (module, role), segments in table.items()
        if role not in _LORA and role != "embedding"
    }


def _lora_rows(table: RowTable, group: int, scales: Mapping[tuple[int, str], float]) -> dict[str, LoraRows]:
    rows = table.groups[group]
    return {
        module: LoraRows(
            tuple(s.offsets for s in segments),
            tuple(s.offsets for s in rows[module, "lora_b"]),
            scales[group, module],
        )
        for (module, role), segments in rows.items()
        if role == "lora_a"
    }
