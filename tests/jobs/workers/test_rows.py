"""Rows in the object store: every worker reads the same rows, and holds few chunks at once."""

from __future__ import annotations

import numpy as np
import pytest
import ray

from jobs.workers import rows as shared_rows
from jobs.workers.rows import SharedRows, share
from loray.spec import BatchSpec
from loray.train.data.batches import Batch, BatchStream
from loray.train.data.examples import Rows, TokenRows, pack_rows
from tests.cluster import RayCluster

pytestmark = pytest.mark.cluster


@pytest.fixture
def rows() -> TokenRows:
    lengths = np.random.default_rng(0).integers(2, 60, 200)
    return pack_rows([([1000 * i + t for t in range(n)], [t % 3 > 0 for t in range(n)]) for i, n in enumerate(lengths)])


def steps(rows: Rows) -> list[Batch]:
    stream = BatchStream(rows, BatchSpec(rows=3), max_length=64, seed=5, per_step=4, rank=1, size=2)
    return [batch for _ in range(40) for batch in stream.next_step()]


def test_a_worker_sees_the_same_batches_and_holds_few_chunks(
    ray_cluster: RayCluster, rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in random order, as after a split, for more than an epoch."""
    monkeypatch.setattr(shared_rows, "CHUNK_BYTES", 1000)
    some = rows.select(np.random.default_rng(1).permutation(len(rows))[:150])
    shared = share(some)
    assert len(shared) == 150
    assert len(shared._chunks) > 15

    @ray.remote
    def read(shared: SharedRows) -> tuple[list[Batch], int, bool]:
        batches = steps(shared)
        ids, _ = shared.row(0)
        return batches, shared._get.cache_info().currsize, ids.flags.owndata or ids.flags.writeable

    batches, num_open, copied = ray.get(read.remote(shared))
    for mine, theirs in zip(steps(some), batches, strict=True):
        assert mine.num_targets == theirs.num_targets
        assert mine.input_ids_BT.equal(theirs.input_ids_BT)
        assert mine.labels_BT.equal(theirs.labels_BT)
    assert num_open <= 8
    assert not copied


def test_rows_longer_than_a_chunk_and_small_data(
    ray_cluster: RayCluster, rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(share(rows)._chunks) == 1
    monkeypatch.setattr(shared_rows, "CHUNK_BYTES", 50)
    shared = share(rows)
    for i in range(len(rows)):
        for mine, theirs in zip(rows.row(i), shared.row(i), strict=True):
            np.testing.assert_array_equal(mine, theirs)
