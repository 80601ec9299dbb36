"""The records of the adapters in the pool, for decode steps that a backend has recorded; see loray_kernels.records.

An adapter has one if it is LoRA alone: the rows of VeRA, DoRA, norms and embeddings, and a RoPE of its own, are not in
records, and steps with such adapters are computed launch by launch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from loray.bases.config import ModelConfig
from loray.engine.memory.rows import RowTable, columns
from loray.engine.pool.resident import ResidentAdapter
from loray_kernels import INPUTS, Directory, InputShape, LoraRows, record_words


def input_shapes(config: ModelConfig, capacity: int) -> tuple[InputShape, ...]:
    """`capacity`: elements of a layer's share of a block, at which rows are cut."""
    shapes = [[config.module_shape(module) for module in modules] for modules in INPUTS]
    return tuple(
        InputShape(tuple(columns(of_input[0][1], capacity)), tuple(tuple(columns(o, capacity)) for o, _ in of_input))
        for of_input in shapes
    )


class AdapterRecords:
    """Writes `record` of residents: where it begins, and its words."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def placed(self, adapter: ResidentAdapter) -> None:
        words = self._words(adapter)
        start = None if words is None else self._directory.add(words)
        adapter.record = None if start is None or words is None else (start, len(words))

    def moved(self, adapter: ResidentAdapter) -> None:
        """Its rows are elsewhere. The record stays where it is: it is as long as before."""
        if adapter.record is not None and (words := self._words(adapter)) is not None:
            self._directory.write(adapter.record[0], words)

    def removed(self, adapter: ResidentAdapter) -> None:
        if adapter.record is not None:
            self._directory.remove(*adapter.record)
            adapter.record = None

    def _words(self, adapter: ResidentAdapter) -> npt.NDArray[np.int64] | None:
        table = adapter.table
        roles = {role for group in table.groups for _, role in group}
        if not roles <= {"lora_a", "lora_b"} or table.flat or adapter.rope is not None:
            return None
        groups = [_lora_rows(table, group, adapter.scales) for group in range(len(table.groups))]
        return record_words(groups, table.layer_group, self._directory.records.inputs)


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
