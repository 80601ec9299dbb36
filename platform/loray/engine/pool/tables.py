"""Where an adapter's rows are in the pool, as a step takes it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from loray.engine.memory.rows import Role, RowTable
from loray_kernels import RowTables, to_device


def row_tensors(table: RowTable, device: torch.device) -> dict[tuple[int, str, Role], RowTables]:
    """By (group, module, role); group -1 holds rows without a layer. All are parts of one tensor, copied at once."""
    found = {
        (group, module, role): segments
        for group, tables in ((-1, table.flat), *enumerate(table.groups))
        for (module, role), segments in tables.items()
        if role != "embedding"
    }
    offsets = [segment.offsets for segments in found.values() for segment in segments]
    joined = torch.tensor([*chain.from_iterable(offsets)], dtype=torch.int64)
    own = iter(torch.split(to_device(joined, device), [len(o) for o in offsets]))
    return {key: RowTables(tuple((s.column, s.width, next(own)) for s in segments)) for key, segments in found.items()}


def token_row(token_ids: Sequence[int], table: RowTable) -> dict[int, int]:
    """{token: offset of its embedding row}"""
    if not token_ids:
        return {}
    (segment,) = table.flat["embed_tokens", "embedding"]
    return dict(zip(token_ids, segment.offsets, strict=True))
