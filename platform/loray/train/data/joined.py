"""Rows as LongLoRA's paper makes them (Chen et al., ICLR 2024): texts joined by the end-of-sequence token, cut at N.

The ids are those of `tokenizer(eos.join(texts))`, cut every N tokens. Positions run through a row and attention crosses
the joints, so that every position of the context is trained, whatever the length of a text. The last row is shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loray.train.data.examples import TokenRows


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """Row i is [starts[i], starts[i] + lengths[i]) of a stream, which is the pieces one after the other.

    ends  of each piece in the stream
    """

    pieces: TokenRows
    ends: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids of row i, all of which but the first are targets."""
        at, stop = int(self.starts[i]), int(self.starts[i] + self.lengths[i])
        ids, piece = np.empty(stop - at, np.int32), int(np.searchsorted(self.ends, at, side="right"))
        done = 0
        while at < stop:
            end = int(self.ends[piece])
            part = self.pieces.row(piece)[0][at - end :][: stop - at]  # a view, of a text that may be very long
            ids[done : done + len(part)] = part
            done, at, piece = done + len(part), end, piece + 1
        return ids, np.arange(len(ids)) > 0

    def select(self, indices: NDArray[np.int64]) -> JoinedRows:
        """These rows, without a copy of the tokens."""
        return JoinedRows(self.pieces, self.ends, self.starts[indices], self.lengths[indices])


def join(documents: TokenRows, streams: Sequence[NDArray[np.int64]], row_length: int) -> JoinedRows:
    """The documents of each stream in rows of `row_length` tokens, those of one stream before those of the next.

    Row 0 of `documents` is what the tokenizer puts before a text, which a stream has once. Document k is row k + 1, and
    ends with the end-of-sequence token, which the last one of a stream loses.
    """
    beginning = np.zeros(1, np.int64)
    pieces = documents.select(np.concatenate([part for chosen in streams for part in (beginning, chosen + 1)]))
    ends = np.cumsum(pieces.lengths)
    starts, stops = [], []
    first_piece = first = 0
    for chosen in streams:
        first_piece += len(chosen) + 1
        stop = int(ends[first_piece - 1])
        at = np.arange(first, stop - 1, row_length, dtype=np.int64) if len(chosen) else beginning[:0]
        starts.append(at)
        stops.append(np.minimum(at + row_length, stop - 1))
        first = stop
    starts_R, stops_R = np.concatenate(starts), np.concatenate(stops)
    return JoinedRows(pieces, ends, starts_R, stops_R - starts_R)
