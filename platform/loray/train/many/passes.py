"""Micro-batches of many adapters, joined into passes of similar length.

Shapes: B rows and T positions of a pass, N of its positions with a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.train.data.batches import IGNORED, TrainBatch

LONGEST = 1.25  # of a pass's padded lengths, as a multiple of its shortest: more would be computed for nothing


class Part(NamedTuple):
    """A micro-batch of one adapter, which `read` makes when its pass is due.

    length    T of it
    weight    of each of its labels in the loss
    is_packed where the model finds the documents of a row by their positions, which it does without a mask alone
    """

    name: str
    num_rows: int
    length: int
    read: Callable[[], TrainBatch]
    weight: float = 1.0
    is_packed: bool = False

    @classmethod
    def of(cls, name: str, batch: TrainBatch, *, weight: float) -> Part:
        """Take a micro-batch that has been read."""
        num_rows, length = batch.input_ids_BT.shape
        return cls(name, num_rows, length, lambda: batch, weight, batch.position_ids_BT is not None)


Order = Callable[[Iterable[str]], list[str]]


class Pass(NamedTuple):
    """Rows of one adapter are adjacent, and its micro-batches keep their order.

    names         the adapter of each row
    weights_B     of the labels of each row in the loss
    num_targets   labels of each adapter, in the order of its rows
    """

    names: list[str]
    batch: TrainBatch
    weights_B: Tensor
    num_targets: dict[str, int]


def joined(parts: Sequence[Part], tokens_per_pass: int, order: Order) -> Iterator[Pass]:
    """Make the passes of micro-batches, the shortest first. `order` says in which adapters' rows lie in a pass."""
    for group in grouped(parts, tokens_per_pass):
        chosen: dict[str, list[Part]] = {}
        for part in group:
            chosen.setdefault(part.name, []).append(part)
        yield _join([part for name in order(chosen) for part in chosen[name]])


class Joinable(Protocol):
    """Rows of equal padded length that are in one pass: a micro-batch, or one row."""

    @property
    def num_rows(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def is_packed(self) -> bool: ...


P = TypeVar("P", bound=Joinable)


def grouped(parts: Sequence[P], tokens_per_pass: int) -> list[list[P]]:
    """Sort micro-batches by length, and join neighbours while the longest is at most LONGEST times the shortest and the
    rows, padded to the longest, have at most `tokens_per_pass` tokens. A larger micro-batch is a pass by itself.
    """
    groups: list[list[P]] = []
    num_rows = 0
    for part in sorted(parts, key=lambda part: (part.is_packed, part.length)):  # of equal ones the order stays
        first = groups[-1][0] if groups else None
        num_rows += part.num_rows
        if (
            first is None
            or first.is_packed != part.is_packed
            or part.length > LONGEST * first.length
            or num_rows * part.length > tokens_per_pass
        ):
            groups.append([])
            num_rows = part.num_rows
        groups[-1].append(part)
    return groups


def _join(parts: Sequence[Part]) -> Pass:
    batches = [part.read() for part in parts]
    names = [part.name for part in parts for _ in range(part.num_rows)]
    weights_B = torch.tensor([part.weight for part in parts for _ in range(part.num_rows)])
    num_targets = dict.fromkeys(names, 0)
    for part, batch in zip(parts, batches, strict=True):
        num_targets[part.name] += batch.num_targets
    batch = batches[0] if len(batches) == 1 else _stack(batches, max(part.length for part in parts))
    return Pass(names, batch, weights_B, num_targets)


def _stack(batches: Sequence[TrainBatch], length: int) -> TrainBatch:
    """Put rows below each other, padded on the right to `length`; of packed rows the padding is another document."""
    is_padded = any(b.document_ids_BT is not None or b.input_ids_BT.shape[1] < length for b in batches)

    def stack(of: Callable[[TrainBatch], Tensor], value: int) -> Tensor:
        tensors = map(of, batches)
        return torch.cat([F.pad(x_BT, (0, length - x_BT.shape[1]), value=value) for x_BT in tensors])

    def documents(batch: TrainBatch) -> Tensor:
        ids_BT = batch.document_ids_BT
        return torch.zeros_like(batch.input_ids_BT) if ids_BT is None else ids_BT

    def positions(batch: TrainBatch) -> Tensor:
        assert batch.position_ids_BT is not None
        num_rows, short = batch.position_ids_BT.shape
        return torch.cat([batch.position_ids_BT, torch.arange(length - short).expand(num_rows, -1)], dim=1)

    return TrainBatch(
        stack(lambda batch: batch.input_ids_BT, 0),
        stack(lambda batch: batch.labels_BT, IGNORED),
        stack(documents, -1) if is_padded else None,
        None if batches[0].position_ids_BT is None else torch.cat([*map(positions, batches)]),
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_targets=sum(batch.num_targets for batch in batches),
    )
