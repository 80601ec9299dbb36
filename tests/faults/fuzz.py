"""Random requests by schema, with keys of every kind, while ten tenants stream.

    python -m tests.faults.fuzz                      10,000 requests
    python -m tests.faults.fuzz --requests 300 --seed 7

A cluster of two nodes with two gateways and the catalog's API behind HAProxy, two replicas of a tiny model, the catalog
in PostgreSQL, adapters in S3. docs/benchmarks/faults.md explains what is asked. The exit code is 1 where it was not
reached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import click
import h11
import httpx
import numpy as np
import psutil

from loray.catalog import Catalog
from loray.local.processes import LOOPBACK, session_members
from loray.spec import ServeSpec
from tests.faults.hostile import NUM_STREAMS, Told, draw, go, make_callers, sender
from tests.faults.world import BASE, command_line, started

MAX_GAP_S = 0.150
MAX_GROWTH = 200_000_000  # bytes
NUM_GATEWAYS = NUM_REPLICAS = 2
_POOL_BYTES, _HOST_BYTES = 64 << 20, 8 << 20  # for all hostile answers beside the streams
_DOCUMENTS = ("", "/api/v1")
_SAMPLE_S = 1.0
_SHOWN_GAPS = 10
_SHOWN_BYTES, _SHOWN_CORES = 2_000_000, 0.02  # of a process that the report names
_LOOK_S = 0.01  # between two looks how late the client itself is
_HUNG_S = 120.0
_AGAIN_S = 1.0  # after a failure


class Gap(NamedTuple):
    """Seconds without a token after a stream's first one. `began`: of `time.perf_counter`."""

    seconds: float
    began: float


@dataclass
class Seen:
    """What the clients of well-behaved streams saw, in seconds.

    gaps    between tokens of one stream, the longest first
    firsts  the times until first tokens
    late_s  how late the clients' own event loop was at most, which is in both
    failed  the streams that did not come to their end, and why
    """

    gaps: list[Gap] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    late_s: float = 0.0
    failed: list[str] = field(default_factory=list)

    @property
    def longest_s(self) -> float:
        return self.gaps[0].seconds if self.gaps else 0.0

    @property
    def row(self) -> dict[str, float]:
        """Numbers, and milliseconds of quantiles."""
        found = {"streams": len(self.firsts), "failed": len(self.failed), "tokens": len(self.gaps)}
        gaps = [gap.seconds for gap in self.gaps] or [0.0]
        times = {f"gap p{100 * q:g}": float(np.quantile(gaps, q)) for q in (0.5, 0.99, 0.999)}
        times |= {"longest": self.longest_s, "first p99": float(np.quantile(self.firsts or [0.0], 0.99))}
        return found | {name: 1e3 * s for name, s in (times | {"client late": self.late_s}).items()}

    def read(self, tenant: str, parts: Sequence[tuple[float, bytes]], began: float) -> None:
        """`parts`: of the response, with the times when they came."""
        http, body, times, is_whole, status = h11.Connection(h11.CLIENT), b"", list[float](), False, 0
        for at, data in parts:
            http.receive_data(data)
            while isinstance(event := http.next_event(), h11.Response | h11.Data):
                if isinstance(event, h11.Response):
                    status = event.status_code
                    continue
                *events, body = (body + event.data).split(b"\n\n")
                for text in events:
                    choices = json.loads(text[6:]).get("choices") if text.startswith(b"data: {") else None
                    times += [at] if choices else []
                    is_whole = is_whole or bool(choices and choices[0].get("finish_reason"))
        if status != 200 or not is_whole:
            self.failed.append(f"{tenant}: {status or 'no answer'}, ended after {len(times)} {body[-300:]!r}")
            return
        self.firsts.append(times[0] - began)
        self.gaps += [Gap(b - a, a) for a, b in pairwise(times)]


def stream(
    port: int, keys: Mapping[str, str], models: Sequence[str], num_tokens: int, is_over: Callable[[], bool]
) -> Seen:
    """Each tenant asks a model of its own, again and again until `is_over`. Streams that have begun end. What came is
    read afterwards.
    """
    seen, answers = Seen(), list[tuple[str, list[tuple[float, bytes]], float]]()

    async def go_on(tenant: str, secret: str, model: str) -> None:
        asked = {"model": model, "prompt": f"I am {tenant}", "max_tokens": num_tokens, "temperature": 0}
        body = json.dumps(asked | {"ignore_eos": True, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\nAuthorization: Bearer {secret}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        while not is_over():
            began, parts = time.perf_counter(), list[tuple[float, bytes]]()
            try:
                async with asyncio.timeout(_HUNG_S):
                    reader, writer = await asyncio.open_connection(LOOPBACK, port)
                    writer.write((head + body).encode())
                    while data := await reader.read(1 << 16):
                        parts.append((time.perf_counter(), data))
                writer.close()
            except OSError as e:  # a timeout too
                seen.failed.append(f"{tenant}: {e!r}")
                await asyncio.sleep(_AGAIN_S)
                continue
            answers.append((tenant, parts, began))
            if not parts or not parts[0][1].startswith(b"HTTP/1.1 200"):
                await asyncio.sleep(_AGAIN_S)

    async def look() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LOOK_S
            await asyncio.sleep(_LOOK_S)
            seen.late_s = max(seen.late_s, loop.time() - due)

    async def all_go_on() -> None:
        looking = asyncio.create_task(look())
        pairs = enumerate(keys.items())
        await asyncio.gather(*(go_on(tenant, key, models[i % len(models)]) for i, (tenant, key) in pairs))
        looking.cancel()

    asyncio.run(all_go_on())
    for answer in answers:
        seen.read(*answer)
    seen.gaps.sort(reverse=True)
    return seen


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
    took: Sequence[Took] = ()

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
        rows, told = {"alone": self.alone.row, "beside hostile requests": self.beside.row}, self.told
        lines = [f"{'streams; ms':<24}" + "".join(f"{name:>12}" for name in self.alone.row)]
        for name, row in rows.items():
            lines.append(f"{name:<24}" + "".join(f"{value:>12.0f}" for value in row.values()))
        if self.alone.longest_s > MAX_GAP_S:
            lines.append(f"without hostile requests there are gaps longer than {1e3 * MAX_GAP_S:.0f} ms too")
        lines.append("\nthe longest gaps, and the hostile requests that were under way")
        for gap in self.beside.gaps[:_SHOWN_GAPS]:
            over = [one for one in told.sent if one.began < gap.began + gap.seconds and one.ended > gap.began]
            over.sort(key=lambda one: one.began - one.ended)
            under_way = "; ".join(f"{one.number} {one.operation} {one.status}" for one in over)
            lines.append(f"{1e3 * gap.seconds:>6.0f} ms  {under_way}")
        lines.append("\nhostile requests, and how many were answered by which status (0: none within a minute)")
        for operation, statuses in sorted(self.statuses.items()):
            lines.append(f"{operation:<70}" + "  ".join(f"{status}: {num}" for status, num in sorted(statuses.items())))
        lines.append(f"{len(told.sent)} in {told.seconds:.0f} s; their client took {told.cores:.2f} cores")
        lines.append("\nprocesses: what they grew by, and the cores that they took")
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


@dataclass(frozen=True)
class Place:
    """A deployment. `names`: adapters of the tenant `default`. `processes`: pids of all that belong to it."""

    url: str
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


def run(place: Place, plan: Plan, say: Callable[[str], None]) -> Found:
    """Streams alone, then the same streams beside hostile requests."""
    callers, port = make_callers(place.catalog, place.base, place.names), urlsplit(place.url).port or 0
    documents = {}
    for path in _DOCUMENTS:
        headers = dict(callers.headers["administrator"])
        response = httpx.get(f"{place.url}{path}/openapi.json", headers=headers, timeout=60)
        documents[path] = response.raise_for_status().json()
    say(f"{plan.num} requests are drawn with seed {plan.seed}")
    asked = draw(documents, callers, plan.num, plan.seed)

    def streams(is_over: Callable[[], bool]) -> Seen:
        return stream(port, callers.streams, place.names, plan.num_tokens, is_over)

    attacker = sender(asked, place.folder, port, plan.at_once, plan.nice)
    with attacker as hostile, _real_time():  # all here but the hostile client
        streams(_after(plan.alone_s / 4))  # adapters are loaded, and processes have what they need
        say(f"streams go on alone for {plan.alone_s:g} s")
        alone = streams(_after(plan.alone_s))
        say(f"{len(asked)} hostile requests are sent, {plan.at_once} at once")
        told: list[Told] = []
        thread = threading.Thread(target=lambda: told.append(go(hostile)))
        with _watched(place.processes) as took:
            thread.start()
            beside = streams(lambda: not thread.is_alive())
            thread.join()
    (answers,) = told
    return Found(alone, beside, answers, list(took.values()))


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


@contextmanager
def _real_time() -> Iterator[None]:
    """Meanwhile this thread runs as soon as it has something to do, as a client on a machine of its own, where this
    user may say so.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


@contextmanager
def _watched(processes: Callable[[], Sequence[int]]) -> Iterator[dict[int, Took]]:
    """Each process by its pid. What has started meanwhile is compared with what it had when it was first seen."""
    first: dict[int, tuple[int, float]] = {}
    found: dict[int, Took] = {}
    over = threading.Event()

    def look() -> None:
        for pid in processes():
            try:
                process = psutil.Process(pid)
                memory, times = process.memory_info(), process.cpu_times()
            except psutil.Error:  # it has ended
                continue
            nbytes, cpu_s = memory.rss - memory.shared, times.user + times.system
            before = first.setdefault(pid, (nbytes, cpu_s))
            took = found.setdefault(pid, Took(command_line(pid)[:100]))
            took.nbytes, took.cpu_s = max(took.nbytes, nbytes - before[0]), cpu_s - before[1]

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


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all servers are ended
    sizes = {"pool_bytes": _POOL_BYTES, "host_bytes": _HOST_BYTES}
    numbers = {"num_replicas": NUM_REPLICAS, "num_gateways": NUM_GATEWAYS}
    spec = ServeSpec(base=BASE, dtype="float32", num_threads=1, **sizes, **numbers)
    with started(spec, NUM_STREAMS, click.echo) as world:

        def processes() -> list[int]:
            sessions = (world.local.pid, world.node.pid, world.s3.pid)
            return [pid for number in sessions for pid in session_members(number)] + tree(world.postgres.pid)

        place = Place(world.url, world.catalog, BASE, world.names, processes, world.folder)
        found = run(place, Plan(args.requests, args.seed, args.at_once, args.nice), click.echo)
    failures = found.failures()
    click.echo("\n".join(found.lines()))
    click.echo("FAILED" if failures else "passed")
    click.echo("\n".join(failure[:2000] for failure in failures[:40]))
    if args.json is not None:
        figures = {"alone": found.alone.row, "beside": found.beside.row, "statuses": found.statuses}
        figures |= {"processes": [vars(took) for took in found.took], "failures": failures}
        figures |= {"date": time.strftime("%Y-%m-%d"), "seconds": found.told.seconds, "cores": found.told.cores}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--requests", type=int, default=10_000, help="at least one (default %(default)d)")
    add("--seed", type=int, default=0)
    add("--at-once", type=int, default=8, help="hostile requests under way (default %(default)d)")
    add("--nice", type=int, default=0, help="of the hostile client, which has no machine of its own here (0 to 19)")
    add("--json", type=Path, help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
