"""What a run found out about its data is kept: how files were cut, and plans that take long."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loray.recipes.sources import Source
from loray.spec import BatchSpec, DataSpec
from loray.train.data import kept_plans
from loray.train.data.batches import BatchStream
from loray.train.data.dataset import load_data
from loray.train.data.kept_plans import kept_plan, plan_ahead
from loray.train.data.plans import Plan, Share, plan_epoch
from loray.train.data.reading import known, parts
from loray.train.data.reading.files import RowFile, read_head, rows_of
from loray.train.data.reading.known import cut_known
from loray.train.data.shards import FolderCache
from tests.tiny import byte_tokenizer
from tests.train.data.test_shards import write

ROWS: list[dict[str, Any]] = [{"text": f"text {i}"} for i in range(10)]


def open_rows(path: str, name: str | None = None) -> RowFile:
    source = Source(name or path, path)
    return rows_of(source, read_head(source))


class Counted:
    """`function`, whose calls are counted."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*args, **options)


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """An hour after the files were written."""
    counted, now = Counted(parts.cut), known.time.time
    monkeypatch.setattr(known, "cut", counted)
    monkeypatch.setattr(known.time, "time", lambda: now() + 3600)
    monkeypatch.setattr(parts, "PART_BYTES", 50)
    return counted


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("max_rows", [None, 4])
def test_a_file_that_did_not_change_is_not_read(tmp_path: Path, cuts: Counted, name: str, max_rows: int | None) -> None:
    file, cache = open_rows(write(tmp_path / name, ROWS)), FolderCache(tmp_path / "cache")
    first = cut_known(file, max_rows, cache)
    assert first == parts.cut(file, max_rows)
    assert len(first.parts) > 1
    assert cut_known(file, max_rows, cache) == first
    assert cuts.calls == 1


def test_a_file_that_changed_is_read(tmp_path: Path, cuts: Counted) -> None:
    path, cache = Path(write(tmp_path / "a.jsonl", ROWS)), FolderCache(tmp_path / "cache")
    file, before = open_rows(str(path)), path.stat()
    cut_known(file, None, cache)
    with path.open("a") as opened:
        opened.write('{"text": "more"}\n')
    assert cut_known(file, None, cache) == parts.cut(file)
    other = Path(write(tmp_path / "b.jsonl", [*ROWS[1:], ROWS[0], {"text": "text10"}]))
    other.write_bytes(other.read_bytes().ljust(path.stat().st_size))
    os.utime(other, ns=(before.st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)  # of the same size, and with the times of the one before
    assert cut_known(file, None, cache) == parts.cut(file)
    assert cuts.calls == 3


def test_what_was_just_changed_or_fetched_is_read(
    tmp_path: Path, cuts: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write(tmp_path / "a.jsonl", ROWS), FolderCache(tmp_path / "cache")
    fetched = open_rows(path, name="hf://org/name")
    cut_known(fetched, None, cache)
    changed = Path(path).stat().st_ctime
    monkeypatch.setattr(known.time, "time", lambda: changed + 1)
    cut_known(open_rows(path), None, cache)
    assert cuts.calls == 2
    assert not cache.folder.exists()


def test_what_is_damaged_is_found_out_again(tmp_path: Path, cuts: Counted) -> None:
    file, cache = open_rows(write(tmp_path / "a.jsonl", ROWS)), FolderCache(tmp_path / "cache")
    first = cut_known(file, None, cache)
    (note,) = cache.folder.rglob("*.note")
    note.write_bytes(note.read_bytes()[:40])
    assert cut_known(file, None, cache) == first
    assert cuts.calls == 2


def test_a_second_run_reads_no_file(tmp_path: Path, cuts: Counted) -> None:
    cache = FolderCache(tmp_path / "cache")
    spec = DataSpec(train=write(tmp_path / "a.jsonl", ROWS), eval=write(tmp_path / "b.jsonl", ROWS[:3]))
    options: dict[str, Any] = {"max_length": 20, "max_eval_rows": 9, "seed": 0, "cache": cache}
    first = load_data(spec, byte_tokenizer(), **options)
    assert cuts.calls == 2
    again = load_data(spec, byte_tokenizer(), **options)
    assert cuts.calls == 2
    assert (again.fingerprint, again.report) == (first.fingerprint, first.report)


# -- plans ------------------------------------------------------------------------------------------------------------

PLAN: dict[str, Any] = {"max_length": 64, "seed": 3, "epoch": 1}
PACKED = BatchSpec(rows=2, order="packed")
LENGTHS = np.random.default_rng(0).integers(2, 60, 200)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(plan_epoch)
    monkeypatch.setattr(kept_plans, "plan_epoch", counted)
    monkeypatch.setattr(kept_plans, "_LEAST", 100)
    return counted


def arrays(plan: Plan) -> list[list[int]]:
    return [array.tolist() for array in (plan.documents_D, plan.ends_R, plan.starts_B, plan.stops_B)]


@pytest.mark.parametrize("damage", [None, 0, 20, 800])
def test_a_plan_is_made_once(tmp_path: Path, plans: Counted, damage: int | None) -> None:
    cache, expected = FolderCache(tmp_path), arrays(plan_epoch(LENGTHS, PACKED, **PLAN))
    assert arrays(kept_plan(LENGTHS, PACKED, **PLAN, cache=cache)) == expected
    if damage is not None:
        (note,) = tmp_path.rglob("*.note")
        note.write_bytes(note.read_bytes()[:damage])
    found = kept_plan(LENGTHS, PACKED, **PLAN, cache=cache)
    assert arrays(found) == expected
    assert list(found) == list(plan_epoch(LENGTHS, PACKED, **PLAN))
    assert plans.calls == (1 if damage is None else 2)


@pytest.mark.parametrize(
    "change",
    [
        {"lengths_D": LENGTHS[::-1]},
        {"spec": BatchSpec(rows=3, order="packed")},
        {"spec": BatchSpec(tokens=64, order="packed")},
        {"seed": 4},
        {"epoch": 0},
        {"max_length": 60},
        {"shares": (Share(200, 0.5),)},
    ],
    ids=str,
)
def test_another_plan_is_made(tmp_path: Path, plans: Counted, change: dict[str, Any]) -> None:
    fields = {"lengths_D": LENGTHS, "spec": PACKED, **PLAN}
    kept_plan(**fields, cache=FolderCache(tmp_path))
    other = fields | change
    assert arrays(kept_plan(**other, cache=FolderCache(tmp_path))) == arrays(
        plan_epoch(other.pop("lengths_D"), other.pop("spec"), **other)
    )
    assert plans.calls == 2


def test_what_is_planned_fast_is_not_kept(tmp_path: Path, plans: Counted) -> None:
    cache = FolderCache(tmp_path)
    kept_plan(LENGTHS[:99], PACKED, **PLAN, cache=cache)
    kept_plan(LENGTHS, BatchSpec(rows=2), **PLAN, cache=cache)
    assert not list(tmp_path.rglob("*.note"))


def test_what_the_driver_planned_no_worker_plans(tmp_path: Path, plans: Counted) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "t" * (i % 40)} for i in range(150)])
    options: dict[str, Any] = {"max_length": 64, "max_eval_rows": 9, "seed": 0}
    data = load_data(DataSpec(train=source, eval_fraction=0), byte_tokenizer(), cache=FolderCache(tmp_path), **options)
    ahead: dict[str, Any] = {"max_length": 64, "seed": 5, "num_epochs": 2, "cache": data.cache}
    plan_ahead(data.train.lengths, PACKED, **ahead)

    def stream(**cache: Any) -> BatchStream:
        return BatchStream(data.train, PACKED, max_length=64, seed=5, per_step=2, **cache)

    found = stream(cache=data.cache)
    num_steps = found.num_steps(2)
    assert plans.calls == 2
    plain = stream()
    assert plain.num_steps(2) == num_steps
    for mine, theirs in ((found.next_step(), plain.next_step()) for _ in range(num_steps)):
        assert [b.input_ids_BT.tolist() for b in mine] == [b.input_ids_BT.tolist() for b in theirs]


def test_a_note_that_cannot_be_written_is_done_without(tmp_path: Path, plans: Counted) -> None:
    (tmp_path / "file").write_text("")
    cache = FolderCache(tmp_path / "file")  # no folder
    for _ in range(2):
        kept_plan(LENGTHS, PACKED, **PLAN, cache=cache)
    assert plans.calls == 2
