"""Journals in memory: entries come back, torn ones are dropped, and damage is told."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.errors import IntegrityError
from loray.train.journal import Entry, Journal, SnapshotClock

ENTRIES = st.lists(
    st.builds(Entry, st.integers(0, 255), st.integers(0, (1 << 64) - 1), st.binary(max_size=20)), max_size=6
)


class MemoryLog:
    """All bytes in memory; each piece is an entry, as in a bucket, or all of them are one piece."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    def append(self, number: int, data: bytes) -> None:
        self.data += data

    def read(self) -> Iterator[bytes]:
        yield self.data

    def keep(self, entries: Collection[Entry]) -> None:
        self.data = b"".join(entry.to_bytes() for entry in entries)


@given(ENTRIES)
def test_entries_come_back(entries: list[Entry]) -> None:
    log = MemoryLog()
    journal = Journal(log)
    nbytes = sum(journal.append(*entry) for entry in entries)
    assert list(journal.entries()) == entries
    assert nbytes == len(log.data)


@given(ENTRIES.filter(bool), st.integers(1, 40), st.booleans())
def test_a_torn_last_entry_is_dropped_and_overwritten(entries: list[Entry], num_lost: int, zeros: bool) -> None:
    whole = b"".join(entry.to_bytes() for entry in entries[:-1])
    last = entries[-1].to_bytes()
    torn = last[: max(0, len(last) - num_lost)]
    if zeros:  # the file has grown, and nothing of the entry was written
        torn = b"\0" * len(last)
    log = MemoryLog(whole + torn)
    journal = Journal(log)
    assert journal.recover() == entries[:-1]
    journal.append(*entries[-1])
    assert list(journal.entries()) == entries


@given(ENTRIES.filter(lambda entries: len(entries) > 1), st.data())
def test_a_changed_bit_never_gives_another_entry(entries: list[Entry], data: st.DataObject) -> None:
    raw = bytearray(b"".join(entry.to_bytes() for entry in entries))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    found: list[Entry] = []
    try:
        found.extend(Journal(MemoryLog(bytes(raw))).entries())
    except IntegrityError:
        return
    assert found == entries[: len(found)]
    assert len(found) < len(entries)


def test_damage_before_the_last_entry_is_an_error() -> None:
    raw = bytearray(b"".join(Entry(1, n, b"payload").to_bytes() for n in range(3)))
    raw[30] ^= 1
    with pytest.raises(IntegrityError, match="damaged at byte 24"):
        list(Journal(MemoryLog(bytes(raw))).entries())


def test_what_a_snapshot_contains_is_cut() -> None:
    journal = Journal(MemoryLog())
    for number in (1, 3, 2, 5):
        journal.append(0, number, b"")
    journal.cut(lambda entry: entry.number <= 2)
    assert [entry.number for entry in journal.entries()] == [3, 5]


def test_a_snapshot_is_due_by_seconds_bytes_or_age() -> None:
    now = 0.0
    clock = SnapshotClock(lambda: now)
    now = 10_000.0
    assert not clock.is_due  # nothing was accepted
    clock.accepted(10)
    assert not clock.is_due
    clock.computed(61.0)
    assert clock.is_due
    clock.taken()
    assert not clock.is_due
    clock.accepted(256 << 20)
    assert clock.is_due
    clock.taken()
    clock.accepted(1)
    now += 15 * 60.0
    assert clock.is_due
