"""Passes: every row of a round is in one, beside rows of similar length, and padding changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from loray.train.data.batches import IGNORED, TrainBatch, collate, pack_rows
from loray.train.many.passes import LONGEST, Part, Pass, grouped, joined

BUDGET = 96


@st.composite
def rounds(draw: st.DrawFn) -> list[Part]:
    """Micro-batches of up to six adapters, of which some are packed. A row's tokens are its own."""
    parts = list[Part]()
    for _ in range(draw(st.integers(1, 12))):
        lengths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=4))
        packed = draw(st.booleans())
        first = 1000 * len(parts)
        rows = pack_rows([(np.arange(n) + first + 50 * i, np.ones(n, np.bool_)) for i, n in enumerate(lengths)])
        planned = (tuple(range(len(lengths))),) if packed else tuple((i,) for i in range(len(lengths)))
        name = f"a{draw(st.integers(0, 5))}"
        parts.append(Part.of(name, collate(rows, planned, packed=packed), weight=1 / (len(parts) + 1)))
    return parts


def order(names: Iterable[str]) -> list[str]:
    return sorted(names, reverse=True)


def documents(batch: TrainBatch) -> list[tuple[int, ...]]:
    """The tokens, labels and positions of every document, whatever the padding."""
    found = []
    num_rows, length = batch.input_ids_BT.shape
    positions_BT = batch.position_ids_BT
    if positions_BT is None:
        positions_BT = torch.arange(length).expand(num_rows, -1)
    ids_BT = torch.zeros_like(batch.input_ids_BT) if batch.document_ids_BT is None else batch.document_ids_BT
    for row in range(num_rows):
        for document in range(int(ids_BT[row].max()) + 1):
            here = ids_BT[row] == document
            tensors = (batch.input_ids_BT, batch.labels_BT, positions_BT)
            found.append(tuple(torch.cat([t[row][here] for t in tensors]).tolist()))
    return found


@given(rounds())
def test_passes_hold_every_micro_batch_once_in_rows_of_similar_length(parts: list[Part]) -> None:
    groups = grouped(parts, BUDGET)
    assert Counter(id(part) for group in groups for part in group) == Counter(map(id, parts))
    for group in groups:
        lengths = [part.length for part in group]
        assert len({part.is_packed for part in group}) == 1
        assert len(group) == 1 or max(lengths) <= LONGEST * min(lengths)
        assert len(group) == 1 or sum(part.num_rows for part in group) * max(lengths) <= BUDGET


@given(rounds())
def test_a_pass_has_the_rows_of_its_micro_batches_adapter_by_adapter(parts: list[Part]) -> None:
    passes = list(joined(parts, BUDGET, order))
    for each in passes:
        check_shapes(each)
        names = list(dict.fromkeys(each.names))
        assert names == order(names) == list(each.num_targets)
        assert sum(each.num_targets.values()) == each.batch.num_targets == int((each.batch.labels_BT != IGNORED).sum())
    by_pass = Counter(document for each in passes for document in documents(each.batch))
    assert by_pass == Counter(document for part in parts for document in documents(part.read()))
    weights = Counter((name, float(w)) for each in passes for name, w in zip(each.names, each.weights_B, strict=True))
    theirs = Counter((part.name, float(np.float32(part.weight))) for part in parts for _ in range(part.num_rows))
    assert weights == theirs


def check_shapes(each: Pass) -> None:
    batch, runs = each.batch, [name for i, name in enumerate(each.names) if each.names[i - 1 : i] != [name]]
    assert len(runs) == len(set(runs))  # rows of one adapter are neighbours
    shape = (len(each.names), max(batch.input_ids_BT.shape[1], 1))
    for tensor in (batch.input_ids_BT, batch.labels_BT, batch.document_ids_BT, batch.position_ids_BT):
        assert tensor is None or tuple(tensor.shape) == shape
    ids_BT = batch.document_ids_BT
    if ids_BT is not None:
        assert bool((batch.labels_BT[ids_BT < 0] == IGNORED).all())
    if batch.position_ids_BT is not None and ids_BT is not None:  # padding is another document, as positions say it
        starts_BT = batch.position_ids_BT == 0
        assert bool(starts_BT[:, 1:][(ids_BT[:, 1:] < 0) & (ids_BT[:, :-1] >= 0)].all())


def test_rows_of_one_adapter_keep_their_order() -> None:
    rows = pack_rows([(np.full(8, i), np.ones(8, np.bool_)) for i in range(6)])
    parts = [
        Part.of(name, collate(rows, ((i,),), packed=False), weight=1.0)
        for i, name in enumerate(["b", "a", "b", "c", "a", "b"])
    ]
    (each,) = joined(parts, 4096, order)
    assert each.names == ["c", "b", "b", "b", "a", "a"]
    assert each.batch.input_ids_BT[:, 0].tolist() == [3, 0, 2, 5, 1, 4]
