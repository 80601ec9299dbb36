"""Leases: one driver per run, on machines that share only an object store.

A lease is a log of small numbered objects, `PREFIX00000001`, `PREFIX00000002`, …, each of which names the holder. The
entry with the highest number is valid. A number can be written once, so every heartbeat, release and takeover is one
conditional write, in which exactly one driver succeeds. Older entries are removed; the last one stays.

The holder writes an entry every `BEAT_S`. A driver that finds the lease held watches it by its own clock and takes it
over if no new entry appears within `STALE_S`, so clocks of two machines are never compared. A holder that was replaced
learns it from its next heartbeat that reaches the store, within 10 s after the store answers again (`BEAT_S` and the
time limit of one request, see `S3Store(quick=True)`). Until then two drivers may work on the run.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import NamedTuple

from loray.errors import ConflictError, LorayError, NotFoundError
from loray.store import ObjectStore
from loray.telemetry import get_logger

log = get_logger(__name__)

BEAT_S = 5.0
STALE_S = 20.0
_WATCH_S = 0.5


class LeaseState(NamedTuple):
    """Who holds a lease. `holder` is random, None once the lease is released; the other fields are for people."""

    holder: str | None
    job: str
    host: str
    pid: int

    def to_json(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    @classmethod
    def from_json(cls, data: bytes) -> LeaseState:
        fields = json.loads(data)
        return cls(*(fields[name] for name in cls._fields))

    def __str__(self) -> str:
        return f"the driver of job {self.job} (process {self.pid} on {self.host})"


class _LeaseEntry(NamedTuple):
    number: int
    state: LeaseState


@contextmanager
def leased(objects: ObjectStore, prefix: str, *, job_id: str, lost: Callable[[str], None]) -> Iterator[None]:
    """Holds the lease for the `with` block. If another driver takes it over, `lost(reason)` is called from a thread.

    ConflictError if another driver holds it and is alive, which can take `STALE_S` to determine.
    """
    lease = _Lease(objects, prefix, job_id)
    lease.acquire()
    done = Event()
    heart = Thread(target=lease.beat, args=(done, lost), name="loray-lease", daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
        lease.release()


class _Lease:
    def __init__(self, objects: ObjectStore, prefix: str, job_id: str) -> None:
        self._objects, self._prefix = objects, prefix
        self._ours = LeaseState(uuid.uuid4().hex, job_id, socket.gethostname(), os.getpid())
        self._number = 0

    def acquire(self) -> None:
        last = self._last()
        if last is not None and last.state.holder is not None:
            last = self._watch(last)
        if not self._write((last.number if last else 0) + 1, self._ours):
            raise self._taken()

    def beat(self, done: Event, lost: Callable[[str], None]) -> None:
        while not done.wait(BEAT_S):
            try:
                if not self._write(self._number + 1, self._ours):
                    lost(str(self._taken()))
                    return
            except LorayError as e:
                log.warning("the run's lease cannot be renewed, trying again: %s", e)

    def release(self) -> None:
        """Frees the lease for the next driver. If this fails, the next driver has to wait for `STALE_S`."""
        try:
            self._write(self._number + 1, self._ours._replace(holder=None))
        except LorayError as e:
            log.warning("the run's lease cannot be released: %s", e)

    def _watch(self, last: _LeaseEntry) -> _LeaseEntry:
        """Waits until the lease is released or has had no heartbeat for `STALE_S`, and returns its last entry.

        ConflictError if the holder is alive.
        """
        log.info("%s holds the run; looking whether it is alive, for %.0f s", last.state, STALE_S)
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(_WATCH_S, STALE_S))
            now = self._last()
            if now is not None and now.state.holder is None:
                return now
            if now != last:
                raise self._taken()
        log.warning("%s shows no sign of life; taking over", last.state)
        return last

    def _write(self, number: int, state: LeaseState) -> bool:
        """Writes an entry; False if another driver was first.

        The entry must come after all others: a driver that was suspended could write a number that was removed already.
        """
        if not self._objects.put_if_absent(self._key(number), state.to_json()):
            there = self._read(number)
            if there != state:  # if equal, an earlier write of this driver succeeded although it seemed to fail
                is_ours = there is not None and there.holder == self._ours.holder
                return is_ours and self._write(number + 1, state)
        numbers = self._numbers()
        if numbers[-1] != number:
            self._objects.delete(self._key(number))
            return False
        self._number = number
        for old in numbers[:-1]:
            self._objects.delete(self._key(old))
        return True

    def _last(self) -> _LeaseEntry | None:
        while numbers := self._numbers():
            state = self._read(numbers[-1])
            if state is not None:  # None: a later entry has replaced it since the listing
                return _LeaseEntry(numbers[-1], state)
        return None

    def _read(self, number: int) -> LeaseState | None:
        try:
            return LeaseState.from_json(self._objects.get(self._key(number)))
        except NotFoundError:
            return None

    def _numbers(self) -> list[int]:
        return [int(key.removeprefix(self._prefix)) for key in self._objects.list(self._prefix)]

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:08}"

    def _taken(self) -> ConflictError:
        last = self._last()
        who = "another driver" if last is None else last.state
        return ConflictError(f"{who} is at work on this run; wait for it, or stop it")
