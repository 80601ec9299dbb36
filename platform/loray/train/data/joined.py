"""Rows as LongLoRA's paper makes them (Chen et al., ICLR 2024): texts joined by the end-of-sequence token, cut at N.

The ids are those of `tokenizer(eos.join(texts))`, cut every N tokens. Positions run through a row and attention crosses
the joints, so that every position of the context is trained, whatever the length of a text. The last row is shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_BEGINNING = -1  # the start of the piece that is no document


class TokenSource(Protocol):
    def ids(self, start: int, stop: int) -> NDArray[np.int32]:
        """Token ids [start, stop)."""
        ...


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """Row i is [starts[i], starts[i] + lengths[i]) of a stream, which is P pieces one after the other.

    Documents that follow each other in `tokens` are one piece: there are few, however many the documents.

    beginning  token ids before the first document of a source
    begins_P   where a piece begins in `tokens`
    ends_P     where it ends in the stream
    sources    whose stream a row is of
    """

    tokens: TokenSource
    beginning: NDArray[np.int32]
    begins_P: NDArray[np.int64]
    ends_P: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sources: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids of row i, all of which but the first are targets."""
        at, stop = int(self.starts[i]), int(self.starts[i] + self.lengths[i])
        parts, piece = [], int(np.searchsorted(self.ends_P, at, side="right"))
        while at < stop:
            end = int(self.ends_P[piece])
            skipped = at - (int(self.ends_P[piece - 1]) if piece else 0)
            taken, begin = min(stop, end) - at, int(self.begins_P[piece])
            if begin == _BEGINNING:
                parts.append(self.beginning[skipped : skipped + taken])
            else:
                parts.append(self.tokens.ids(begin + skipped, begin + skipped + taken))
            at, piece = at + taken, piece + 1
        ids = np.concatenate(parts)
        return ids, np.arange(len(ids)) > 0

    def select(self, indices: NDArray[np.int64]) -> JoinedRows:
        """These rows, without a copy of the tokens."""
        return replace(self, starts=self.starts[indices], lengths=self.lengths[indices], sources=self.sources[indices])


def join(
    tokens: TokenSource,
    beginning: Sequence[int],
    begins_D: NDArray[np.int64],
    lengths_D: NDArray[np.int64],
    streams: Sequence[NDArray[np.int64]],
    row_length: int,
) -> JoinedRows:
    """The documents of each source's stream in rows of `row_length` tokens, those of one before those of the next.

    Document d is [begins_D[d], begins_D[d] + lengths_D[d]) of `tokens`. It ends with the end-of-sequence token, which
    the last one of a stream loses. A stream has what the tokenizer puts before a text once.
    """
    begins, lengths, starts, stops, sources = [], [], [], [], []
    first = 0
    for source, chosen in enumerate(streams):
        if not len(chosen):
            continue
        at, size = begins_D[chosen], lengths_D[chosen]
        heads = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1] + size[:-1]]))
        begins += [np.array([_BEGINNING]), at[heads]]
        lengths += [np.array([len(beginning)]), np.add.reduceat(size, heads)]
        stop = first + len(beginning) + int(size.sum())
        rows = np.arange(first, stop - 1, row_length, dtype=np.int64)
        starts.append(rows)
        stops.append(np.minimum(rows + row_length, stop - 1))
        sources.append(np.full(len(rows), source, np.int64))
        first = stop
    starts_R = _concatenated(starts)
    return JoinedRows(
        tokens,
        np.array(beginning, np.int32),
        _concatenated(begins),
        np.cumsum(_concatenated(lengths)),
        starts_R,
        _concatenated(stops) - starts_R,
        _concatenated(sources),
    )


def _concatenated(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
