"""What a run found out about its data is kept: how files were cut, and the plans of many rows."""

from __future__ import annotations

import fcntl
import os
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray

from loray.recipes.sources import SourceFiles
from loray.spec import BatchSpec
from loray.train.data import batches, known, read
from loray.train.data.batches import BatchStream, EpochPlan, SourceShare, kept_plan, plan_ahead, plan_epoch
from loray.train.data.known import cut_known
from loray.train.data.read import RowFile, read_head, rows_of
from loray.train.data.shards import FolderCache
from tests.fixtures.training_data import load, write

ROWS: list[dict[str, Any]] = [{"text": f"text {i}"} for i in range(10)]


def open_rows(path: str, name: str | None = None) -> RowFile:
    source = SourceFiles(name or path, path)
    return rows_of(source, read_head(source))


class Lengths:
    """Rows without tokens."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.lengths = lengths

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        raise NotImplementedError


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """An hour after the files were written."""
    counted, now = Mock(wraps=read.cut), known.time.time
    monkeypatch.setattr(known, "cut", counted)
    monkeypatch.setattr(known.time, "time", lambda: now() + 3600)
    monkeypatch.setattr(read, "PART_BYTES", 50)
    return counted


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("max_rows", [None, 4])
def test_a_file_that_did_not_change_is_not_read(tmp_path: Path, cuts: Mock, name: str, max_rows: int | None) -> None:
    file, cache = open_rows(write(tmp_path / name, ROWS)), FolderCache(tmp_path / "cache")
    first = cut_known(file, max_rows, cache)
    assert first == read.cut(file, max_rows)
    assert len(first.parts) > 1
    assert cut_known(file, max_rows, cache) == first
    assert cuts.call_count == 1


def test_a_file_that_changed_is_read(tmp_path: Path, cuts: Mock) -> None:
    path, cache = Path(write(tmp_path / "a.jsonl", ROWS)), FolderCache(tmp_path / "cache")
    file, before = open_rows(str(path)), path.stat()
    cut_known(file, None, cache)
    with path.open("a") as opened:
        opened.write('{"text": "more"}\n')
    assert cut_known(file, None, cache) == read.cut(file)
    other = Path(write(tmp_path / "b.jsonl", [*ROWS[1:], ROWS[0], {"text": "text10"}]))
    other.write_bytes(other.read_bytes().ljust(path.stat().st_size))
    os.utime(other, ns=(before.st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)  # of the same size, and with the times of the one before
    assert cut_known(file, None, cache) == read.cut(file)
    assert cuts.call_count == 3


def test_what_was_just_changed_or_fetched_is_read(tmp_path: Path, cuts: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "a.jsonl", ROWS), FolderCache(tmp_path / "cache")
    fetched = open_rows(path, name="hf://org/name")
    cut_known(fetched, None, cache)
    changed = Path(path).stat().st_ctime
    monkeypatch.setattr(known.time, "time", lambda: changed + 1)
    cut_known(open_rows(path), None, cache)
    assert cuts.call_count == 2
    assert not cache.folder.exists()


def test_what_is_damaged_is_found_out_again(tmp_path: Path, cuts: Mock) -> None:
    file, cache = open_rows(write(tmp_path / "a.jsonl", ROWS)), FolderCache(tmp_path / "cache")
    first = cut_known(file, None, cache)
    (note,) = cache.folder.rglob("*.note")
    note.write_bytes(note.read_bytes()[:40])
    assert cut_known(file, None, cache) == first
    assert cuts.call_count == 2


def test_a_second_run_reads_no_file(tmp_path: Path, cuts: Mock) -> None:
    cache = FolderCache(tmp_path / "cache")
    train, held_out = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:3])
    first = load(train, eval=held_out, options={"cache": cache})
    assert cuts.call_count == 2
    again = load(train, eval=held_out, options={"cache": cache})
    assert cuts.call_count == 2
    assert (again.fingerprint, again.report) == (first.fingerprint, first.report)


# -- plans ------------------------------------------------------------------------------------------------------------

PLAN: dict[str, Any] = {"max_length": 64, "seed": 3, "epoch": 1}
PACKED = BatchSpec(rows=2, order="packed")
LENGTHS = np.random.default_rng(0).integers(2, 60, 200)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Mock:
    counted = Mock(wraps=plan_epoch)
    monkeypatch.setattr(batches, "plan_epoch", counted)
    monkeypatch.setattr(batches, "_LEAST", 100)
    return counted


def arrays(plan: EpochPlan) -> list[list[int]]:
    return [array.tolist() for array in (plan.documents_D, plan.ends_R, plan.starts_B, plan.stops_B)]


@pytest.mark.parametrize("order", ["packed", "shuffled", "length_grouped"])
@pytest.mark.parametrize("damage", [None, 0, 20, 160, 800])
def test_a_plan_is_made_once(tmp_path: Path, plans: Mock, damage: int | None, order: Any) -> None:
    cache, spec = FolderCache(tmp_path), BatchSpec(tokens=128, order=order)
    expected = arrays(plan_epoch(LENGTHS, spec, **PLAN))
    assert arrays(kept_plan(LENGTHS, spec, **PLAN, cache=cache)) == expected
    (file,) = tmp_path.rglob("*.npy")
    assert file.stat().st_size < 16 * len(LENGTHS) + 200  # four numbers of four bytes
    if damage is not None:
        file.write_bytes(file.read_bytes()[:damage])
    found = kept_plan(LENGTHS, spec, **PLAN, cache=cache)
    assert arrays(found) == expected
    assert list(found) == list(plan_epoch(LENGTHS, spec, **PLAN))
    assert plans.call_count == (1 if damage is None else 2)


def test_numbers_that_need_it_have_eight_bytes() -> None:
    large = EpochPlan(*(np.array(values) for values in ([1 << 31], [1], [0], [1])))
    parts = batches._parts_of(large)
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}
    found = batches._plan_of(np.concatenate(parts))
    assert found is not None
    assert arrays(found) == arrays(large)


@pytest.mark.parametrize(
    "options", [{"paired": True}, {"shares": (SourceShare(20_000, 0.5), SourceShare(180_000, 1.5))}, {}], ids=str
)
def test_a_worker_holds_no_plan(tmp_path: Path, options: dict[str, Any]) -> None:
    """Of 200,000 sequences: what it takes does not depend on their number. The first worker's plan is gone, too."""
    lengths = np.random.default_rng(0).integers(2, 60, 200_000)
    rows, spec = Lengths(lengths), BatchSpec(rows=1)
    here: dict[str, Any] = {"max_length": 64, "seed": 5, "per_step": 2, "cache": FolderCache(tmp_path), **options}
    tracemalloc.start()
    try:
        streams = [BatchStream(rows, spec, **here) for _ in range(2)]
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        BatchStream(rows, spec, **here).num_steps(1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 200_000
    assert peak < 300_000
    expected = BatchStream(rows, spec, **(here | {"cache": None}))
    for stream in streams:
        assert arrays(stream._plan) == arrays(expected._plan)


def test_one_process_of_a_machine_makes_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes meanwhile waits."""

    def made(*args: Any, **options: Any) -> EpochPlan:
        with pytest.raises(BlockingIOError):
            lock()
        return plan_epoch(*args, **options)

    def lock() -> None:
        with (tmp_path / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr(batches, "plan_epoch", made)
    lengths = np.full(10_000, 9)
    assert len(kept_plan(lengths, BatchSpec(rows=2), **PLAN, cache=FolderCache(tmp_path))) == 5000
    lock()


def test_lengths_are_counted_where_they_are(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "t" * (i % 7)} for i in range(50)])
    data = load(source)
    assert data.length_counts == Counter(data.train.lengths.tolist())
    many = replace(data, train=Lengths(np.random.default_rng(0).integers(2, 60, 200_000)))
    tracemalloc.start()
    try:
        counts = many.length_counts
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(counts.values()) == 200_000
    assert peak < 50_000


@pytest.mark.parametrize(
    "change",
    [
        {"lengths_D": LENGTHS[::-1]},
        {"spec": BatchSpec(rows=3, order="packed")},
        {"spec": BatchSpec(tokens=64, order="packed")},
        {"seed": 4},
        {"epoch": 0},
        {"max_length": 60},
        {"shares": (SourceShare(200, 0.5),)},
    ],
    ids=str,
)
def test_another_plan_is_made(tmp_path: Path, plans: Mock, change: dict[str, Any]) -> None:
    fields = {"lengths_D": LENGTHS, "spec": PACKED, **PLAN}
    kept_plan(**fields, cache=FolderCache(tmp_path))
    other = fields | change
    assert arrays(kept_plan(**other, cache=FolderCache(tmp_path))) == arrays(
        plan_epoch(other.pop("lengths_D"), other.pop("spec"), **other)
    )
    assert plans.call_count == 2


def test_the_plan_of_few_rows_is_not_kept(tmp_path: Path, plans: Mock) -> None:
    kept_plan(LENGTHS[:99], PACKED, **PLAN, cache=FolderCache(tmp_path))
    assert not list(tmp_path.rglob("*.npy"))


def test_what_the_driver_planned_no_worker_plans(tmp_path: Path, plans: Mock) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "t" * (i % 40)} for i in range(150)])
    data = load(source, max_length=64, options={"cache": FolderCache(tmp_path)})
    plan_ahead(data.train.lengths, PACKED, max_length=64, seed=5, num_epochs=2, cache=data.cache)

    def stream(**cache: Any) -> BatchStream:
        return BatchStream(data.train, PACKED, max_length=64, seed=5, per_step=2, **cache)

    found = stream(cache=data.cache)
    num_steps = found.num_steps(2)
    assert plans.call_count == 2
    plain = stream()
    assert plain.num_steps(2) == num_steps
    for mine, theirs in ((found.next_step(), plain.next_step()) for _ in range(num_steps)):
        assert [b.input_ids_BT.tolist() for b in mine] == [b.input_ids_BT.tolist() for b in theirs]


def test_a_note_that_cannot_be_written_is_done_without(tmp_path: Path, plans: Mock) -> None:
    (tmp_path / "file").write_text("")
    cache = FolderCache(tmp_path / "file")  # no folder
    for _ in range(2):
        kept_plan(LENGTHS, PACKED, **PLAN, cache=cache)
    assert plans.call_count == 2
