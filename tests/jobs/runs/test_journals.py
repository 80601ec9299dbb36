"""Journals in a folder and as objects: the same entries, also after a torn write and beside another writer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.runs.journals import FileLog, ObjectLog
from loray.errors import ConflictError, StoreError
from loray.store.objects import LocalStore
from loray.train.journal import Entry, Journal


@pytest.fixture(params=["file", "objects"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path):
    """`reopen()`: the journal, as another process opens it."""
    if request.param == "file":
        return lambda: Journal(FileLog(tmp_path / "journal"))
    return lambda: Journal(ObjectLog(LocalStore(tmp_path), "runs/one/journal/"))


def test_entries_are_there_for_the_next_process(reopen) -> None:
    journal = reopen()
    assert journal.recover() == []
    for number in range(1, 12):
        journal.append(number % 3, number, b"x" * number)
    again = reopen()
    entries = again.recover()
    assert entries == [Entry(n % 3, n, b"x" * n) for n in range(1, 12)]
    again.cut(lambda entry: entry.number < 10)
    again.append(0, 12, b"")
    assert [entry.number for entry in reopen().recover()] == [10, 11, 12]


def test_a_torn_write_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(FileLog(path))
    journal.append(0, 1, b"first")
    with path.open("ab") as file:
        file.write(Entry(0, 2, b"second").to_bytes()[:-1])
    again = Journal(FileLog(path))
    assert [entry.number for entry in again.recover()] == [1]
    again.append(0, 2, b"other")
    assert [entry.payload for entry in again.entries()] == [b"first", b"other"]


def test_a_failed_write_is_told_and_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    journal = Journal(FileLog(path))
    journal.append(0, 1, b"first")
    write, written = os.pwrite, []

    def full(handle: int, data: bytes, at: int) -> int:
        if written:
            raise OSError(28, "No space left on device")
        written.append(write(handle, data[:5], at))
        return written[0]

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match="No space left"):
        journal.append(0, 2, b"second")
    monkeypatch.undo()
    journal.append(0, 2, b"second")
    assert [entry.payload for entry in journal.entries()] == [b"first", b"second"]


def test_two_writers_of_a_number_are_found_out(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first, second = (Journal(ObjectLog(store, "journal/")) for _ in range(2))
    first.append(0, 1, b"first")
    first.append(0, 1, b"first")  # sent again, since no answer came
    with pytest.raises(ConflictError, match="another process"):
        second.append(0, 1, b"second")
