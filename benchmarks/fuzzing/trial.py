"""Streams alone, then the same streams beside hostile requests; what clients saw, and what processes grew by."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.fuzzing.callers import make_callers
from benchmarks.fuzzing.requests import draw
from benchmarks.fuzzing.sender import Told, sender
from benchmarks.fuzzing.streams import Seen, stream
from benchmarks.processes import title
from loray.catalog import Catalog

MAX_PAUSE_S = 0.150
MAX_GROWTH = 200_000_000  # bytes
_DOCUMENTS = ("", "/api/v1")
_SAMPLE_S = 0.5


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
    """`at_once`: hostile requests under way. `alone_s`: seconds of streams without any. `num_tokens`: of a stream."""

    num: int = 10_000
    seed: int = 0
    at_once: int = 8
    alone_s: float = 20.0
    num_tokens: int = 200


@dataclass(frozen=True)
class Found:
    """`growth`: bytes of the process that grew most, and its title."""

    alone: Seen
    beside: Seen
    told: Told
    growth: tuple[int, str]

    def failures(self, max_pause_s: float = MAX_PAUSE_S) -> list[str]:
        """What may not be. Where streams pause as long without hostile requests, their pauses show nothing."""
        found = [f"stream of {why}" for why in self.alone.failed + self.beside.failed]
        found += [f"answer {why}" for why in self.told.wrong]
        if self.told.num_wrong > len(self.told.wrong):
            found.append(f"{self.told.num_wrong - len(self.told.wrong)} more answers")
        if self.beside.longest_s > max_pause_s >= self.alone.longest_s:
            found.append(f"{self.beside.longest_s:.3f} s without a token, of {max_pause_s:.3f} s")
        if self.growth[0] > MAX_GROWTH:
            found.append(f"{self.growth[1]} grew by {self.growth[0] / 1e6:.0f} MB, of {MAX_GROWTH / 1e6:.0f} MB")
        return found

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{'streams':<24} {'number':>7} {'failed':>7} {'longest pause':>14} {'first token':>12} {'client late':>12}"
        ]
        for name, seen in (("alone", self.alone), ("beside hostile requests", self.beside)):
            pause, first, late = (f"{1e3 * s:.0f} ms" for s in (seen.longest_s, seen.first_s, seen.late_s))
            lines.append(f"{name:<24} {seen.num:>7} {len(seen.failed):>7} {pause:>14} {first:>12} {late:>12}")
        if self.alone.longest_s > MAX_PAUSE_S:
            lines.append(f"without hostile requests streams pause longer than {1e3 * MAX_PAUSE_S:.0f} ms too")
        answers = ", ".join(f"{status}: {num}" for status, num in self.told.statuses.items())
        lines.append(f"hostile requests were answered {answers}")
        lines.append(f"the process that grew most, by {self.growth[0] / 1e6:.0f} MB: {self.growth[1]}")
        return lines

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(place: Place, plan: Plan, say: Callable[[str], None]) -> Found:
    callers = make_callers(place.catalog, place.base, place.names)
    secret = callers.headers["administrator"]
    documents = {path: _document(place.port, path, secret) for path in _DOCUMENTS}
    say(f"{plan.num} requests are drawn with seed {plan.seed}")
    asked = draw(documents, callers, plan.num, plan.seed)

    def streams(is_over: Callable[[], bool]) -> Seen:
        return asyncio.run(stream(place.port, callers.streams, place.names, plan.num_tokens, is_over))

    with sender(asked, place.folder, place.port, plan.at_once) as hostile:
        streams(_after(plan.alone_s / 4))  # adapters are loaded, and processes have what they need
        say(f"streams go on alone for {plan.alone_s:g} s")
        alone = streams(_after(plan.alone_s))
        say(f"{len(asked)} hostile requests are sent, {plan.at_once} at once")
        with _growth(place.processes) as grown:
            told: list[Told] = []
            thread = threading.Thread(target=lambda: told.append(hostile.go()))
            thread.start()
            beside = streams(lambda: not thread.is_alive())
            thread.join()
    (answers,) = told
    most = max(grown, key=lambda pid: grown[pid][0])
    return Found(alone, beside, answers, grown[most])


def _document(port: int, path: str, headers: Mapping[str, str]) -> Any:
    response = httpx.get(f"http://127.0.0.1:{port}{path}/openapi.json", headers=dict(headers), timeout=60)
    return response.raise_for_status().json()


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


@contextmanager
def _growth(processes: Callable[[], Sequence[int]]) -> Iterator[dict[int, tuple[int, str]]]:
    """Of each process, by how many bytes of its own it has grown at most during the block, and its title. What has
    started meanwhile is compared with what it had when it was first seen.
    """
    first: dict[int, int] = {}
    found: dict[int, tuple[int, str]] = {}
    over = threading.Event()

    def look() -> None:
        for pid in processes():
            nbytes = _own_bytes(pid)
            grown = nbytes - first.setdefault(pid, nbytes)
            if pid not in found or grown > found[pid][0]:
                found[pid] = grown, title(pid)[:100]

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
