"""What a run found out about its data is kept: how files were cut."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from loray.recipes.sources import SourceFiles
from loray.spec import DataSpec
from loray.train.data import known, read
from loray.train.data.known import cut_known
from loray.train.data.read import RowFile, read_head, rows_of
from loray.train.data.shards import FolderCache
from tests.fixtures.training_data import load, write

ROWS: list[dict[str, Any]] = [{"text": f"text {i}"} for i in range(10)]


def open_rows(path: str, name: str | None = None) -> RowFile:
    source = SourceFiles(name or path, path)
    return rows_of(source, read_head(source), DataSpec(train=path))


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


def test_a_note_that_cannot_be_written_is_done_without(tmp_path: Path, cuts: Mock) -> None:
    (tmp_path / "file").write_text("")
    file, cache = open_rows(write(tmp_path / "a.jsonl", ROWS)), FolderCache(tmp_path / "file")  # no folder
    for _ in range(2):
        assert cut_known(file, None, cache) == read.cut(file)
    assert cuts.call_count == 2
