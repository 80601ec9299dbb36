"""What rank 0 tells the other ranks to do."""

from __future__ import annotations

from typing import Any, NamedTuple

from loray.engine.model.batch import Batch
from loray.engine.pool.packed import PackedAdapter
from loray.spec import AdapterRef

Answers = tuple[Any, ...]  # of the allocator, in the order in which the pool asks


class Forward(NamedTuple):
    batch: Batch


class PlaceAdapter(NamedTuple):
    ref: AdapterRef
    packed: PackedAdapter
    answers: Answers


class RemoveAdapter(NamedTuple):
    digest: str


class Compact(NamedTuple):
    num_blocks: int
    answers: Answers


class AskMap(NamedTuple):
    """Answered with `pool.pool_map`."""


Command = Forward | PlaceAdapter | RemoveAdapter | Compact | AskMap
