"""Tokens in the cache of a deployment: shards in a bucket with copies on a node, made by Ray tasks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from jobs.driver.tokenising import RayTasks
from jobs.events import SILENT, Stages
from jobs.workers.tokens import BucketCache, open_tokens
from loray.errors import DataError, StoreError
from loray.settings import Settings
from loray.spec import BatchSpec, DataSpec
from loray.store import open_filesystem
from loray.train.data import read
from loray.train.data.batches import BatchStream, TrainBatch
from loray.train.data.rows import Dataset, load_data
from loray.train.data.shards import FolderCache, ShardIndex, TokenShard
from tests.fixtures.cluster import RayCluster
from tests.fixtures.recipes import write as write_recipe
from tests.fixtures.s3 import S3Server
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training_data import Counted, jsonl, listed


def shard(number: int, num_tokens: int = 100) -> TokenShard:
    tokens = np.arange(number, number + num_tokens, dtype=np.uint16)
    lengths, none = np.array([num_tokens], np.int32), np.zeros(1, np.int32)
    desirable = np.ones(1, np.bool_)
    return TokenShard(tokens, ShardIndex(lengths, none, np.empty((0, 2), np.int32), none, True, 1, desirable))


def in_bucket(s3_server: S3Server, copies: Path, max_bytes: int = 1 << 20) -> BucketCache:
    filesystem, root = open_filesystem(s3_server.url("tokens", copies.name))
    return BucketCache(filesystem, f"{root}/tokens", copies, max_bytes)


def test_shards_in_a_bucket(s3_server: S3Server, tmp_path: Path) -> None:
    cache = in_bucket(s3_server, tmp_path)
    assert cache.index("aa") is None
    with pytest.raises(StoreError, match="was removed"):
        cache.tokens("aa")
    cache.put("aa", shard(5))
    again = pickle.loads(pickle.dumps(cache))
    found = again.index("aa")
    assert found is not None
    assert (found.num_tokens, found.num_documents, again.index("bb")) == (100, 1, None)
    assert again.tokens("aa")[:3].tolist() == [5, 6, 7]
    (copy,) = tmp_path.rglob("*.npy")
    copy.write_bytes(copy.read_bytes()[:50])  # of a node that lost power
    assert again.tokens("aa")[:3].tolist() == [5, 6, 7]


def test_notes_are_in_the_bucket_or_on_this_machine(s3_server: S3Server, tmp_path: Path) -> None:
    filesystem, root = open_filesystem(s3_server.url("tokens"))
    cache, elsewhere = (BucketCache(filesystem, f"{root}/tokens", tmp_path / node) for node in ("a", "b"))
    cache.keep("aa", b"everywhere")
    cache.keep("bb", b"here", here=True)
    assert [c.note("aa") for c in (cache, elsewhere)] == [b"everywhere"] * 2
    assert [c.note("bb", here=True) for c in (cache, elsewhere)] == [b"here", None]
    assert cache.note("cc") is None
    nowhere = BucketCache(filesystem, "no-such-bucket/tokens", tmp_path / "c")
    nowhere.keep("aa", b"lost")
    assert nowhere.note("aa") is None


def test_a_node_keeps_the_copies_that_it_used_last(s3_server: S3Server, tmp_path: Path) -> None:
    cache = in_bucket(s3_server, tmp_path, max_bytes=1500)  # four copies, of which three are kept when one is added
    for number in range(6):
        cache.put(f"k{number}", shard(number))
    kept = cache.tokens("k0")
    for number in range(1, 6):
        cache.tokens("k0")
        cache.tokens(f"k{number}")
        assert len(list(tmp_path.rglob("*.npy"))) <= 4
    assert (tmp_path / "k0" / "k0.npy").exists()
    assert not (tmp_path / "k1" / "k1.npy").exists()
    assert kept[0] == 0


def test_the_place_is_that_of_the_deployment(s3_server: S3Server, tmp_path: Path) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    folder = open_tokens(settings)
    assert isinstance(folder, FolderCache)
    assert folder.folder == tmp_path / "tokens"
    bucket = open_tokens(Settings.from_env({"LORAY_HOME": str(tmp_path), "LORAY_STORE": s3_server.url("tokens", "x")}))
    bucket.put("aa", shard(1))
    index = bucket.index("aa")
    assert index is not None


# -- on a cluster -----------------------------------------------------------------------------------------------------


@ray.remote
def steps(data: Dataset, rank: int) -> list[TrainBatch]:
    stream = BatchStream(data.train, BatchSpec(rows=2), max_length=64, seed=5, per_step=4, rank=rank, size=2)
    return [batch for _ in range(6) for batch in stream.next_step()]


@pytest.mark.cluster
def test_tasks_make_the_shards_that_workers_read(
    ray_cluster: RayCluster, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a bucket; each worker has the rows that one process has, which are those tokenised in one process."""
    monkeypatch.setattr(read, "PART_BYTES", 200)
    records: list[dict[str, Any]] = [{"prompt": f"{i}: " + "p" * (i % 9), "completion": "c" * i} for i in range(40)]
    spec = DataSpec(train=jsonl(tmp_path, *records), eval_fraction=0.2)
    recipe = write_recipe(tmp_path).spec
    options: dict[str, Any] = {"max_length": 64, "max_eval_rows": 9, "seed": 0}
    connected: list[int] = []
    told: list[Any] = []
    run, again = RayTasks(recipe, None, lambda: connected.append(1), Stages(told.append)), Counted()
    cache = in_bucket(s3_server, tmp_path / "copies")
    data = load_data(spec, byte_tokenizer(), cache=cache, run=run, **options)
    alone = load_data(spec, byte_tokenizer(), **options)
    assert connected == [1]
    assert [(e["stage"], e["done"]) for e in (told[0], told[-1])] == [
        ("tokenising", 0),
        ("tokenising", told[-1]["total"]),
    ]
    assert told[-1]["total"] > 1
    assert listed(data.train) == listed(alone.train)
    load_data(spec, byte_tokenizer(), cache=cache, run=again, **options)
    assert again.done == 0
    shared = ray.put(data)
    for rank, batches in enumerate(ray.get([steps.remote(shared, rank) for rank in range(2)])):
        stream = BatchStream(alone.train, BatchSpec(rows=2), max_length=64, seed=5, per_step=4, rank=rank, size=2)
        for mine, theirs in zip([b for _ in range(6) for b in stream.next_step()], batches, strict=True):
            assert mine.input_ids_BT.equal(theirs.input_ids_BT)
            assert mine.labels_BT.equal(theirs.labels_BT)
    bad = jsonl(tmp_path, *records, {"prompt": 1, "completion": "c"}, name="bad.jsonl")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 41: `prompt` must be a string"):
        load_data(spec.model_copy(update={"train": bad}), byte_tokenizer(), cache=cache, run=run, **options)


def test_a_single_part_needs_no_cluster(tmp_path: Path) -> None:
    run = RayTasks(write_recipe(tmp_path).spec, None, lambda: pytest.fail("connected"), SILENT)
    spec = DataSpec(train=jsonl(tmp_path, {"text": "a"}, {"text": "b"}), eval_fraction=0)
    data = load_data(
        spec, byte_tokenizer(), cache=FolderCache(tmp_path), run=run, max_length=9, max_eval_rows=1, seed=0
    )
    assert data.report.num_rows == 2
