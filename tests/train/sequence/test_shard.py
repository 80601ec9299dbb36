"""Shards of a batch: nothing is lost, and each rank knows where it stands in the whole row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loray.planning.sequence import padded_length
from loray.train.data.batches import IGNORED, collate
from loray.train.sequence import SequenceGroup, ShardedBatch, shard
from tests.fixtures.training_data import make_rows


def shards(lengths: list[int], size: int, *, packed: bool) -> list[ShardedBatch]:
    """Of two rows, where documents are packed, or of a row each."""
    numbers = tuple(range(len(lengths)))
    rows = (numbers[::2], numbers[1::2]) if packed else tuple((i,) for i in numbers)
    batch = collate(make_rows(lengths), rows, packed=packed)
    return [shard(batch, SequenceGroup(rank=rank, size=size)) for rank in range(size)]


@pytest.mark.parametrize("packed", [False, True])
@given(lengths=st.lists(st.integers(2, 30), min_size=2, max_size=6), size=st.integers(1, 5))
def test_shards_side_by_side_are_the_batch(packed: bool, lengths: list[int], size: int) -> None:
    parts = shards(lengths, size, packed=packed)
    (whole,) = shards(lengths, 1, packed=packed)
    num_tokens = whole.document_ids_BN.shape[1]
    joined = [torch.cat(x, dim=1) for x in zip(*(part.local[:2] for part in parts), strict=True)]
    for got, expected in zip(joined, whole.local[:2], strict=True):
        assert got.shape[1] == padded_length(num_tokens, size)
        assert torch.equal(got[:, :num_tokens], expected)
    assert bool((joined[1][:, num_tokens:] == IGNORED).all())
    assert sum(part.local.num_tokens for part in parts) == whole.local.num_tokens == sum(lengths)
    assert sum(part.local.num_targets for part in parts) == whole.local.num_targets
    assert all(int((part.local.labels_BT != IGNORED).sum()) == part.local.num_targets for part in parts)
    assert {part.document_ids_BN.shape[1] for part in parts} == {padded_length(num_tokens, size)}


def test_rows_count_on() -> None:
    first, second = shards([7, 4], 2, packed=False)
    assert first.local.position_ids_BT is not None
    assert first.local.position_ids_BT.tolist() == [[0, 1, 2, 3]] * 2
    assert second.local.position_ids_BT is not None
    assert second.local.position_ids_BT.tolist() == [[4, 5, 6, 7]] * 2
    assert first.document_ids_BN.tolist() == [[0, 0, 0, 0, 0, 0, 0, -1], [0, 0, 0, 0, -1, -1, -1, -1]]


def test_packed_rows_restart_at_documents_and_at_padding() -> None:
    _, second = shards([3, 2, 2, 2, 2], 2, packed=True)
    assert second.local.position_ids_BT is not None
    assert second.local.position_ids_BT.tolist() == [[1, 0, 1, 0], [0, 1, 2, 0]]
    assert second.document_ids_BN.tolist() == [[0, 0, 0, 1, 1, 2, 2, -1], [0, 0, 1, 1, -1, -1, -1, -1]]


def test_a_batch_is_left_as_it_was() -> None:
    batch = collate(make_rows([5, 3]), ((0,), (1,)), packed=False)
    before = [None if x is None else x.clone() for x in batch[:4]]
    shard(batch, SequenceGroup(rank=1, size=2))
    after = batch[:4]
    assert all(x is y is None or (x is not None and torch.equal(x, y)) for x, y in zip(before, after, strict=True))
