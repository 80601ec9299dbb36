"""One op set over a paged pool: batched LoRA and VeRA, paged attention, norms and embeddings with per-row weights.

`ops.Ops` is the set; `backend(name)` gives an implementation. `reference` is torch, right before fast, and the oracle
of every other backend.
"""

from __future__ import annotations

from loray_kernels.ops import (
    AttentionMeta,
    KvLayout,
    LoraTable,
    Ops,
    RowTables,
    Segments,
    TokenRows,
    VeraTable,
)
from loray_kernels.reference import ReferenceOps

__all__ = [
    "AttentionMeta",
    "KvLayout",
    "LoraTable",
    "Ops",
    "RowTables",
    "Segments",
    "TokenRows",
    "VeraTable",
    "backend",
]


def backend(name: str) -> Ops:
    """The implementation called `name`; ValueError lists those there are."""
    if name != "reference":
        raise ValueError(f"no kernel backend {name!r}; there is: reference")
    return ReferenceOps()
