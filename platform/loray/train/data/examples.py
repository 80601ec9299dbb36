"""Rows of tokens, some of which are targets: what the model learns to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Rows(Protocol):
    """Rows of tokens."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids of row i, and which of them are targets."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Row i is [starts[i], starts[i] + lengths[i]) of N tokens. Some of them may belong to no row."""

    ids_N: NDArray[np.int32]
    targets_N: NDArray[np.bool_]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        part = slice(self.starts[i], self.starts[i] + self.lengths[i])
        return self.ids_N[part], self.targets_N[part]

    def select(self, indices: NDArray[np.int64]) -> TokenRows:
        """These rows, without a copy of the tokens."""
        return TokenRows(self.ids_N, self.targets_N, self.starts[indices], self.lengths[indices])


def pack_rows(rows: Sequence[tuple[Any, Any]]) -> TokenRows:
    """TokenRows of (ids, targets) pairs. The first token of a row is never a target."""
    lengths = np.array([len(ids) for ids, _ in rows], np.int64)
    starts = np.cumsum(lengths) - lengths
    ids_N = np.concatenate([np.asarray(ids, np.int32) for ids, _ in rows]) if rows else np.empty(0, np.int32)
    targets_N = np.concatenate([np.asarray(t, np.bool_) for _, t in rows]) if rows else np.empty(0, np.bool_)
    targets_N[starts] = False
    return TokenRows(ids_N, targets_N, starts, lengths)
