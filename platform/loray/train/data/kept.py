"""Blocks of rows, of which something is found out once, before the first step, and kept beside the shards of tokens.

Blocks follow the plan of a run from its first step on, some micro-batches each. A block is kept as a whole under a
digest of all that it depends on: a repeated or resumed run reads it, a longer one adds some, and one that was killed
goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from loray.train.data.batches import MicroBatch

_FORM = 1  # of what is kept
_AT_ONCE = 16  # micro-batches of a block: a killed run loses no more

Block = Sequence[MicroBatch]
Row = tuple[NDArray[np.int32], NDArray[np.bool_]]  # token ids, and which of them are learned


def blocks_of(planned: Iterable[MicroBatch], num_rows: int) -> list[Block]:
    """Take the micro-batches of a plan with a row that none before them has, in their order."""
    first = list(_first_met(planned, num_rows))
    return [first[start : start + _AT_ONCE] for start in range(0, len(first), _AT_ONCE)]


def rows_of(batch: MicroBatch) -> list[int]:
    """List the rows of the data in a micro-batch, one after the other."""
    return [number for row in batch for number in row]


def key_of(block: Block, rows: Iterable[Row], named: Sequence[object]) -> str:
    """Name what is kept of a block: of these rows of tokens, in the block's micro-batches, and of all that is `named`,
    as JSON.
    """
    shapes = [[len(row) for row in batch] for batch in block]
    digest = hashlib.sha256(json.dumps([_FORM, named, shapes]).encode())
    for ids, targets in rows:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes() + targets.tobytes())
    return digest.hexdigest()


def _first_met(planned: Iterable[MicroBatch], num_rows: int) -> Iterator[MicroBatch]:
    is_met, num_left = np.zeros(num_rows, np.bool_), num_rows
    for batch in planned:
        rows = list(set(rows_of(batch)))
        if num_new := int((~is_met[rows]).sum()):
            is_met[rows] = True
            num_left -= num_new
            yield batch
        if not num_left:
            return
