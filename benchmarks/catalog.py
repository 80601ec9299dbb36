"""The catalog at its size: what a gateway and the catalog API wait for.

    python -m benchmarks.catalog                      100,000 adapters of 100 tenants, on SQLite and on PostgreSQL
    python -m benchmarks.catalog --adapters 10000
    python -m benchmarks.catalog --database postgresql://…    an empty database of another server

The gateway's directory of models runs in an event loop while another process changes the catalog; pages are those that
the catalog API reads. docs/benchmarks/catalog.md explains the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import click

from benchmarks.report import Report, machine_line, quantile, shown
from benchmarks.world import describe_machine, load_average, resident_bytes, run_modules
from loray.catalog import Catalog, CatalogSnapshot
from loray.catalog.snapshot_file import SnapshotFile
from loray.errors import AdapterNotFound
from loray.spec import OPERATOR, Principal
from serve_apps.catalog_watch import CatalogWatcher
from serve_apps.gateway.directory import ModelCards, ModelResolver
from tests.fixtures.filled_catalog import BASES, adapter_name, fill, tenant_name
from tests.fixtures.postgres import start_postgres

_PAGE = 100
_REPEATS = 7
_NUM_NAMES = 2000
_CHANGES = 20
_PAUSE_S = 0.3
_BEAT_S = 0.001


class _Row(NamedTuple):
    """A figure, in words, and what is wanted of it: at most `wanted`, or at least."""

    name: str
    text: str
    unit: str
    wanted: float | None = None
    at_least: bool = False

    def cells(self, found: Sequence[Mapping[str, float]]) -> list[str]:
        """A star marks what is not reached."""
        values = (shown(each[self.name]) + ("" if self.is_met(each[self.name]) else "*") for each in found)
        wanted = "" if self.wanted is None else f"{'≥' if self.at_least else '≤'} {self.wanted:,g}"
        return [f"{self.text}, {self.unit}", *values, wanted]

    def is_met(self, value: float) -> bool:
        return self.wanted is None or (value >= self.wanted if self.at_least else value <= self.wanted)


_ROWS = (
    _Row("change_s", "a change is served after at most", "s", 1.0),
    _Row("change_hold_ms", "a change holds the event loop for at most", "ms", 20.0),
    _Row("idle_hold_ms", "  (the loop's longest hold without a change)", "ms"),
    _Row("resolve_per_s", "known names resolved", "1/s", 200_000, at_least=True),
    _Row("unknown_ms", "an unknown name, of the snapshot (p95)", "ms", 2.0),
    _Row("unknown_database_ms", "an unknown name, of the database (p95)", "ms"),
    _Row("list_ms", "a page of a list (the slowest kind)", "ms", 50.0),
    _Row("search_ms", "a page of a search (the slowest kind)", "ms", 50.0),
    _Row("filter_ms", "a page of a filter (the slowest kind)", "ms", 50.0),
    _Row("memory_mb", "memory more than with no adapter", "MB", 200.0),
    _Row("first_s", "the first snapshot", "s"),
    _Row("first_hold_ms", "the first snapshot holds the event loop for", "ms"),
    _Row("models_s", "/v1/models, whole", "s"),
    _Row("models_mb", "/v1/models, whole", "MB"),
    _Row("models_hold_ms", "/v1/models, whole, holds the event loop for", "ms"),
    _Row("models_page_ms", "/v1/models, a page of 100", "ms"),
    _Row("disk_write_s", "the snapshot is written to disk", "s"),
    _Row("disk_hold_ms", "  and holds the event loop for", "ms"),
    _Row("disk_read_s", "the snapshot is read from disk", "s"),
    _Row("disk_mb", "the snapshot on disk", "MB"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table. The exit code is 1 if a wanted figure is not reached."""
    args = _arguments(argv)
    machine = describe_machine() | {"load": f"{load_average():.2f}"}
    click.echo(machine_line(machine))
    figures: dict[str, Mapping[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.database:
            with _database(kind, Path(folder)) as url:
                began, name = time.perf_counter(), kind.partition(":")[0]
                fill(url, args.adapters, args.tenants)
                click.echo(f"{name}: {args.adapters:,} adapters in {time.perf_counter() - began:.0f} s")
                setup = [url, str(args.adapters), str(args.tenants)]
                (figures[name],) = run_modules([["benchmarks.catalog", "--measure", *setup]], 1)
    found = list(figures.values())
    report = Report(machine, ("", *figures, "wanted"), [row.cells(found) for row in _ROWS], f"{args.adapters} adapters")
    click.echo("\n" + report.text())
    report.write(args.json)
    return 0 if all(row.is_met(each[row.name]) for row in _ROWS for each in found) else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.catalog", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--database", action="append", help="sqlite, postgresql or a URL (default: the first two)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    args.database = args.database or ["sqlite", "postgresql"]
    if args.adapters < 1000 or args.tenants < 4:
        parser.error("fill it with 1,000 adapters of 4 tenants at least")
    return args


@contextmanager
def _database(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder}/catalog.db"
    elif kind == "postgresql":
        with start_postgres(["shared_buffers=128MB"]) as server:
            yield server.new_database()
    else:
        yield kind


class Setup(NamedTuple):
    url: str
    num_adapters: int
    num_tenants: int


async def measured(setup: Setup, folder: Path) -> dict[str, float]:
    """One database's figures, in a process of its own."""
    none = _directory(f"sqlite:///{folder}/none.db")
    await none.follower.refresh()
    none.follower.close()
    gc.collect()
    before = resident_bytes()
    directory, figures = _directory(setup.url), {}
    async with heartbeat() as holds:
        began = time.perf_counter()
        while directory.num_adapters == 0:
            await directory.follower.refresh()
        figures["first_s"] = time.perf_counter() - began
    figures["first_hold_ms"] = 1e3 * holds.longest_s
    gc.collect()
    figures["memory_mb"] = (resident_bytes() - before) / 1e6
    await directory.follower.start()
    figures |= await _changes(directory, setup)
    await directory.follower.stop()
    figures |= await _names(directory, setup)
    figures |= await _models(directory)
    catalog = Catalog(setup.url)
    figures |= await _disk(directory.read(catalog, whole=False), folder, setup.url)
    figures |= _unknown(catalog, setup)
    figures |= _pages(catalog, setup)
    catalog.close()
    return figures


def _directory(url: str) -> ModelResolver:
    config = SimpleNamespace(max_position_embeddings=8192)
    base = SimpleNamespace(name="smollm2", fingerprint=BASES["smollm2"], config=config, of=None)
    return ModelResolver([cast("Any", base)], CatalogWatcher(lambda: Catalog(url)))


async def _changes(directory: ModelResolver, setup: Setup) -> dict[str, float]:
    """Seconds from a commit in another process until the gateway resolves to it, and how long its loop was held."""
    name = adapter_name(1, setup.num_tenants)
    command = [sys.executable, "-m", "benchmarks.catalog", "--change", setup.url, name]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    served: list[float] = []
    async with heartbeat() as idle:
        line = await process.stdout.readline()
    async with heartbeat() as holds:
        while line:
            version, committed_at = line.split()
            while (ref := (await directory.resolve(name, OPERATOR)).adapter) is None or ref.version != int(version):
                await asyncio.sleep(0.002)
            served.append(time.monotonic() - float(committed_at))
            process.stdin.write(b"\n")
            line = await process.stdout.readline()
    await process.wait()
    return {"change_s": max(served), "change_hold_ms": 1e3 * holds.longest_s, "idle_hold_ms": 1e3 * idle.longest_s}


async def _names(directory: ModelResolver, setup: Setup) -> dict[str, float]:
    step = max(1, setup.num_adapters // _NUM_NAMES)
    known = [adapter_name(i, setup.num_tenants) for i in range(1, setup.num_adapters + 1, step)]
    known = [name for i, name in enumerate(known) if (1 + i * step) % 500]  # those of the other base are refused
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < 1.0:
        for name in known:
            await directory.resolve(name, OPERATOR)
        rounds += 1
    return {"resolve_per_s": rounds * len(known) / (time.perf_counter() - began)}


def _unknown(catalog: Catalog, setup: Setup) -> dict[str, float]:
    """Names that resemble many, asked by an administrator and by a tenant, of a snapshot and of the database."""
    names = [adapter_name(i, setup.num_tenants) + "x" for i in range(1, setup.num_adapters, setup.num_adapters // 100)]
    names += [f"nobody-{i}" for i in range(50)]
    callers = (Principal(), Principal(tenant=tenant_name(1), scopes=frozenset({"infer"})))
    views = [catalog.view(caller) for caller in callers]
    snapshot = catalog.snapshot()
    in_memory = [_refusal_s(partial(snapshot.resolve, name, caller)) for name in names for caller in callers]
    in_database = [_refusal_s(partial(view.adapters.resolve, name)) for name in names for view in views]
    return {"unknown_ms": 1e3 * quantile(in_memory, 0.95), "unknown_database_ms": 1e3 * quantile(in_database, 0.95)}


def _refusal_s(resolve: Callable[[], object]) -> float:
    began = time.perf_counter()
    try:
        resolve()
    except AdapterNotFound:
        return time.perf_counter() - began
    raise AssertionError("the name is known")


async def _models(directory: ModelResolver) -> dict[str, float]:
    """`/v1/models` of all adapters, whole and a page of it."""
    cards = ModelCards(directory, lambda _, length: length)
    async with heartbeat() as holds:
        began = time.perf_counter()
        nbytes = 0
        async for part in cards.page(OPERATOR):
            nbytes += len(part)
        whole_s = time.perf_counter() - began
    began = time.perf_counter()
    async for _ in cards.page(OPERATOR, "support", _PAGE):
        pass
    return {
        "models_s": whole_s,
        "models_mb": nbytes / 1e6,
        "models_hold_ms": 1e3 * holds.longest_s,
        "models_page_ms": 1e3 * (time.perf_counter() - began),
    }


async def _disk(snapshot: CatalogSnapshot, folder: Path, url: str) -> dict[str, float]:
    file = SnapshotFile(folder / "snapshot.jsonl", url)
    async with heartbeat() as holds:
        began = time.perf_counter()
        await asyncio.to_thread(file.write, snapshot)
        write_s = time.perf_counter() - began
    began = time.perf_counter()
    if file.read() is None:
        raise AssertionError("the snapshot on disk cannot be read")
    return {
        "disk_write_s": write_s,
        "disk_hold_ms": 1e3 * holds.longest_s,
        "disk_read_s": time.perf_counter() - began,
        "disk_mb": file.path.stat().st_size / 1e6,
    }


def _pages(catalog: Catalog, setup: Setup) -> dict[str, float]:
    """The slowest kind of each page, by its median."""
    middle = adapter_name(setup.num_adapters // 2, setup.num_tenants)
    tenant = catalog.view(Principal(tenant=tenant_name(1), scopes=frozenset({"infer"})))
    queries: dict[str, list[dict[str, Any]]] = {
        "list_ms": [{}, {"after": middle}, {"tenant": tenant_name(2)}],
        "search_ms": [{"search": "tone"}, {"search": "00042"}, {"search": "TENANT-007"}, {"search": "nothing"}],
        "filter_ms": [
            {"method": "lora"},
            {"method": "vera"},
            {"base": "other"},
            {"base": "other", "method": "longlora"},
            {"tags": {"team": "team-7"}},
            {"tags": {"stage": None}},
            {"tags": {"team": "nobody"}},
        ],
    }
    return {
        name: 1e3
        * max(_median_s(partial(view.adapters.page, limit=_PAGE, **q)) for q in kinds for view in (catalog, tenant))
        for name, kinds in queries.items()
    }


def _median_s(ask: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        ask()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def change(url: str, name: str) -> None:
    """In another process: move alias `prod` of an adapter with three versions, the first of which has it, and print
    version and time of each move when it is committed. After each it waits for a line of its input: a gateway that
    looks now and then would miss one of two moves in quick succession.
    """
    catalog = Catalog(url)
    for i in range(_CHANGES):
        time.sleep(_PAUSE_S)
        version = (i + 1) % 3 + 1
        catalog.aliases.move(name, "prod", version)
        click.echo(f"{version} {time.monotonic()}")  # it flushes
        sys.stdin.readline()
    catalog.close()


class Holds:
    """`longest_s`: the longest time in which the loop did not run the task that was due."""

    def __init__(self) -> None:
        self.longest_s = 0.0


@asynccontextmanager
async def heartbeat() -> AsyncIterator[Holds]:
    """Measure how long the event loop is held up while the block runs, by a task that wants to run each millisecond."""
    holds = Holds()

    async def beat() -> None:
        while True:
            due = time.perf_counter() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            holds.longest_s = max(holds.longest_s, time.perf_counter() - due)

    task = asyncio.create_task(beat())
    await asyncio.sleep(0)
    try:
        yield holds
    finally:
        await asyncio.sleep(2 * _BEAT_S)  # so that what held the loop last is seen
        task.cancel()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--measure", url, num_adapters, num_tenants]:
            with tempfile.TemporaryDirectory() as folder:
                found = asyncio.run(measured(Setup(url, int(num_adapters), int(num_tenants)), Path(folder)))
            click.echo(json.dumps(found))
        case ["--change", url, name]:
            change(url, name)
        case _:
            raise SystemExit(main())
