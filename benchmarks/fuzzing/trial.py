"""Streams alone, then the same streams beside hostile requests; what clients saw, and what processes took."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.fuzzing.callers import make_callers
from benchmarks.fuzzing.requests import draw
from benchmarks.fuzzing.sender import Sent, Told, sender
from benchmarks.fuzzing.streams import Gap, Seen, stream
from benchmarks.processes import cpu_seconds, real_time, title
from loray.catalog import Catalog

MAX_GAP_S = 0.150
MAX_GROWTH = 200_000_000  # bytes
_DOCUMENTS = ("", "/api/v1")
_SAMPLE_S = 1.0
_SHOWN_GAPS = 10
_SHOWN_BYTES, _SHOWN_CORES = 2_000_000, 0.02  # of a process that the report names


@dataclass(frozen=True)
class Place:
    """A deployment. `names`: adapters of the tenant `default`. `processes`: pids of all that belong to it."""

    port: int
    catalog: Catalog
    base: str
    names: Sequence[str]
    processes: Callable[[], Sequence[int]]
    folder: Path


@dataclass(frozen=True)
class Plan:
    """`at_once`: hostile requests under way. `alone_s`: seconds of streams without any. `num_tokens`: of a stream.
    `nice`: as for `sender`.
    """

    num: int = 10_000
    seed: int = 0
    at_once: int = 8
    nice: int = 0
    alone_s: float = 20.0
    num_tokens: int = 200


@dataclass
class Took:
    """What one process took: `nbytes` of memory of its own, by how much it has grown at most; `cpu_s` of processors."""

    title: str
    nbytes: int = 0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Found:
    """`took`: of each process, beside hostile requests."""

    alone: Seen
    beside: Seen
    told: Told
    took: Sequence[Took] = field(default_factory=list)

    def failures(self, max_gap_s: float = MAX_GAP_S) -> list[str]:
        """What may not be. Where streams pause as long without hostile requests, their gaps show nothing."""
        found = [f"stream of {why}" for why in self.alone.failed + self.beside.failed]
        found += [f"answer {why}" for why in self.told.wrong]
        if self.beside.longest_s > max_gap_s >= self.alone.longest_s:
            found.append(f"{self.beside.longest_s:.3f} s without a token, of {max_gap_s:.3f} s")
        for took in self.took:
            if took.nbytes > MAX_GROWTH:
                found.append(f"{took.title} grew by {took.nbytes / 1e6:.0f} MB, of {MAX_GROWTH / 1e6:.0f} MB")
        return found

    def lines(self) -> list[str]:
        """For people."""
        rows = {"alone": self.alone.row, "beside hostile requests": self.beside.row}
        lines = ["", f"{'streams; ms':<24}" + "".join(f"{name:>12}" for name in self.alone.row)]
        for name, row in rows.items():
            lines.append(f"{name:<24}" + "".join(f"{value:>12.0f}" for value in row.values()))
        if self.alone.longest_s > MAX_GAP_S:
            lines.append(f"without hostile requests there are gaps longer than {1e3 * MAX_GAP_S:.0f} ms too")
        lines += ["", "the longest gaps, and the hostile requests that were under way"]
        for gap in self.beside.gaps[:_SHOWN_GAPS]:
            under_way = (f"{one.number} {one.operation} {one.status}" for one in _under_way(gap, self.told.sent))
            lines.append(f"{1e3 * gap.seconds:>6.0f} ms  {'; '.join(under_way)}")
        lines += ["", "hostile requests, and how many were answered by which status (0: none within a minute)"]
        for operation, statuses in sorted(self.statuses.items()):
            lines.append(f"{operation:<70}" + "  ".join(f"{status}: {num}" for status, num in sorted(statuses.items())))
        told = self.told
        lines.append(f"{len(told.sent)} in {told.seconds:.0f} s; their client took {told.cores:.2f} cores")
        lines += ["", "processes: what they grew by, and the cores that they took"]
        for took in sorted(self.took, key=lambda took: -took.nbytes):
            cores = took.cpu_s / max(told.seconds, 1.0)
            if took.nbytes > _SHOWN_BYTES or cores > _SHOWN_CORES:
                lines.append(f"{took.nbytes / 1e6:>6.1f} MB  {cores:>5.2f}  {took.title}")
        return lines

    @property
    def statuses(self) -> dict[str, Counter[int]]:
        """By operation, how many answers there were of each."""
        found: dict[str, Counter[int]] = defaultdict(Counter)
        for one in self.told.sent:
            found[one.operation][one.status] += 1
        return found

    def to_json(self) -> dict[str, Any]:
        streams = {"alone": self.alone.row, "beside": self.beside.row}
        attack = {"seconds": self.told.seconds, "cores": self.told.cores, "num": len(self.told.sent)}
        return {
            "streams": streams,
            "attack": attack,
            "statuses": self.statuses,
            "processes": [vars(took) for took in self.took],
        }


def _under_way(gap: Gap, sent: Sequence[Sent]) -> list[Sent]:
    """Requests that were under way during a gap, the longest first."""
    over = [one for one in sent if one.began < gap.began + gap.seconds and one.ended > gap.began]
    return sorted(over, key=lambda one: one.began - one.ended)


def run(place: Place, plan: Plan, say: Callable[[str], None]) -> Found:
    callers = make_callers(place.catalog, place.base, place.names)
    secret = callers.headers["administrator"]
    documents = {path: _document(place.port, path, secret) for path in _DOCUMENTS}
    say(f"{plan.num} requests are drawn with seed {plan.seed}")
    asked = draw(documents, callers, plan.num, plan.seed)

    def streams(is_over: Callable[[], bool]) -> Seen:
        return stream(place.port, callers.streams, place.names, plan.num_tokens, is_over)

    attacker = sender(asked, place.folder, place.port, plan.at_once, plan.nice)
    with attacker as hostile, real_time():  # all here but the hostile client
        streams(_after(plan.alone_s / 4))  # adapters are loaded, and processes have what they need
        say(f"streams go on alone for {plan.alone_s:g} s")
        alone = streams(_after(plan.alone_s))
        say(f"{len(asked)} hostile requests are sent, {plan.at_once} at once")
        told: list[Told] = []
        thread = threading.Thread(target=lambda: told.append(hostile.go()))
        with _watched(place.processes) as took:
            thread.start()
            beside = streams(lambda: not thread.is_alive())
            thread.join()
    (answers,) = told
    return Found(alone, beside, answers, list(took.values()))


def _document(port: int, path: str, headers: Mapping[str, str]) -> Any:
    response = httpx.get(f"http://127.0.0.1:{port}{path}/openapi.json", headers=dict(headers), timeout=60)
    return response.raise_for_status().json()


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


@contextmanager
def _watched(processes: Callable[[], Sequence[int]]) -> Iterator[dict[int, Took]]:
    """Each process by its pid. What has started meanwhile is compared with what it had when it was first seen."""
    first: dict[int, tuple[int, float]] = {}
    found: dict[int, Took] = {}
    over = threading.Event()

    def look() -> None:
        for pid in processes():
            nbytes, cpu_s = _own_bytes(pid), cpu_seconds(pid)
            before = first.setdefault(pid, (nbytes, cpu_s))
            took = found.setdefault(pid, Took(title(pid)[:100]))
            took.nbytes = max(took.nbytes, nbytes - before[0])
            took.cpu_s = max(took.cpu_s, cpu_s - before[1])

    def look_often() -> None:
        while not over.wait(_SAMPLE_S):
            look()

    look()
    thread = threading.Thread(target=look_often, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        look()


def _own_bytes(pid: int) -> int:
    """Resident, without files and shared memory; 0 where it has ended."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
