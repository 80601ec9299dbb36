"""One database's figures, in a process of its own: `python -m benchmarks.catalog.measure '{"url": …}'`."""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from benchmarks.catalog.console import console_pages
from benchmarks.catalog.fill import BASES, adapter_name, tenant_name
from benchmarks.catalog.heartbeat import heartbeat
from benchmarks.memory import resident_bytes
from loray.catalog import Catalog, CatalogSnapshot
from loray.catalog.snapshot_file import SnapshotFile
from loray.errors import AdapterNotFound
from loray.spec import OPERATOR, Principal
from serve_apps.catalog_watch import CatalogWatcher
from serve_apps.gateway.directory import ModelCards, ModelResolver

_PAGE = 100
_REPEATS = 7
_NUM_NAMES = 2000
_CHANGES = 20
_PAUSE_S = 0.3


class Setup(NamedTuple):
    url: str
    num_adapters: int
    num_tenants: int


def main(setup: Setup) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_measure(setup, Path(folder)))


async def _measure(setup: Setup, folder: Path) -> dict[str, float]:
    none = _directory(f"sqlite:///{folder}/none.db")
    await none.refresh()
    none.close()
    gc.collect()
    before = resident_bytes()
    directory, figures = _directory(setup.url), {}
    async with heartbeat() as holds:
        began = time.perf_counter()
        while directory.num_adapters == 0:
            await directory.refresh()
        figures["first_s"] = time.perf_counter() - began
    figures["first_hold_ms"] = 1e3 * holds.longest_s
    gc.collect()
    figures["memory_mb"] = (resident_bytes() - before) / 1e6
    await directory.start()
    figures |= await _changes(directory, setup)
    await directory.stop()
    figures |= await _names(directory, setup)
    figures |= await _models(directory)
    catalog = Catalog(setup.url)
    figures |= await _disk(directory.read(catalog, whole=False), folder, setup.url)
    figures |= _unknown(catalog, setup)
    figures |= _pages(catalog, setup)
    catalog.close()
    pages = partial(console_pages, setup.url, folder, setup.num_adapters, setup.num_tenants, _median_s)
    return figures | await asyncio.to_thread(pages)


def _directory(url: str) -> ModelResolver:
    config = SimpleNamespace(max_position_embeddings=8192)
    base = SimpleNamespace(name="smollm2", fingerprint=BASES["smollm2"], config=config)
    return ModelResolver([cast("Any", base)], CatalogWatcher(lambda: Catalog(url)))


async def _changes(directory: ModelResolver, setup: Setup) -> dict[str, float]:
    """Seconds from a commit in another process until the gateway resolves to it, and how long its loop was held."""
    name = adapter_name(1, setup.num_tenants)
    command = [sys.executable, "-m", "benchmarks.catalog.writer", setup.url, name, str(_CHANGES), str(_PAUSE_S)]
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
    in_database = [_refusal_s(partial(view.resolve, name)) for name in names for view in views]
    return {"unknown_ms": 1e3 * _p95(in_memory), "unknown_database_ms": 1e3 * _p95(in_database)}


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
        name: 1e3 * max(_median_s(partial(view.names, limit=_PAGE, **q)) for q in kinds for view in (catalog, tenant))
        for name, kinds in queries.items()
    }


def _median_s(ask: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        ask()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _p95(times: list[float]) -> float:
    return sorted(times)[int(0.95 * len(times))]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Setup(**json.loads(sys.argv[1])))) + "\n")
