"""One driver a run where machines share nothing but an object store.

A lease is a log of small numbered objects, each of which says who holds it: `PREFIX00000001`, `PREFIX00000002`, …
The highest number counts. A number can be written once, so every heartbeat, every release and every change of hands
is one conditional write that exactly one driver wins. Older entries are removed; the last one stays.

A holder writes an entry every `BEAT_S`. Who finds the lease held watches it by its own clock, and takes it over when
no new entry has come within `STALE_S`: no two machines' clocks are compared. A holder that was taken for dead finds out
with its next heartbeat that gets through: within 10 s of the store's answering it again (`BEAT_S`, and a request's own
time limit, see `S3Store(quick=True)`), for which both may be at work.
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
from typing import Any, NamedTuple

from loray.errors import ConflictError, LorayError, NotFoundError
from loray.store import ObjectStore
from loray.telemetry import get_logger

log = get_logger(__name__)

BEAT_S = 5.0
STALE_S = 20.0
_WATCH_S = 0.5


class _Entry(NamedTuple):
    """`state` holds `holder` (None once it is released), and what people want to know: `job`, `host` and `pid`."""

    number: int
    state: dict[str, Any]


@contextmanager
def leased(objects: ObjectStore, prefix: str, *, job_id: str, lost: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease for the `with` block; `lost(why)` is called from a thread where another driver took it meanwhile.

    ConflictError where another driver holds it and is alive, which can take `STALE_S` to find out.
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
        self._ours = {"holder": uuid.uuid4().hex, "job": job_id, "host": socket.gethostname(), "pid": os.getpid()}
        self._number = 0

    def acquire(self) -> None:
        last = self._last()
        if last is not None and last.state["holder"] is not None:
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
        """So that the next driver need not wait. What fails here only costs it the wait."""
        try:
            self._write(self._number + 1, self._ours | {"holder": None})
        except LorayError as e:
            log.warning("the run's lease cannot be released: %s", e)

    def _watch(self, last: _Entry) -> _Entry:
        """The last entry of a lease that is free: released, or without a sign of life for `STALE_S`. ConflictError."""
        log.info("%s holds the run; looking whether it is alive, for %.0f s", _describe(last.state), STALE_S)
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(_WATCH_S, STALE_S))
            now = self._last()
            if now is not None and now.state["holder"] is None:
                return now
            if now != last:
                raise self._taken()
        log.warning("%s shows no sign of life; taking over", _describe(last.state))
        return last

    def _write(self, number: int, state: dict[str, Any]) -> bool:
        """False where another driver was first. An entry may only be written behind all others: one who was asleep
        could find its number removed already.
        """
        if not self._objects.put_if_absent(self._key(number), json.dumps(state).encode()):
            there = self._read(number)
            if there != state:  # else a write of ours that seemed to fail
                is_ours = there is not None and bool(there["holder"] == self._ours["holder"])
                return is_ours and self._write(number + 1, state)
        numbers = self._numbers()
        if numbers[-1] != number:
            self._objects.delete(self._key(number))
            return False
        self._number = number
        for old in numbers[:-1]:
            self._objects.delete(self._key(old))
        return True

    def _last(self) -> _Entry | None:
        while numbers := self._numbers():
            state = self._read(numbers[-1])
            if state is not None:  # else another one came behind it meanwhile
                return _Entry(numbers[-1], state)
        return None

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads(self._objects.get(self._key(number)))
        except NotFoundError:
            return None
        return state

    def _numbers(self) -> list[int]:
        return [int(key.removeprefix(self._prefix)) for key in self._objects.list(self._prefix)]

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:08}"

    def _taken(self) -> ConflictError:
        last = self._last()
        who = "another driver" if last is None else _describe(last.state)
        return ConflictError(f"{who} is at work on this run; wait for it, or stop it")


def _describe(state: dict[str, Any]) -> str:
    return f"the driver of job {state['job']} (process {state['pid']} on {state['host']})"
