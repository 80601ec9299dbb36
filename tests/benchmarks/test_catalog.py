"""The benchmark of the catalog, small: what it fills is a catalog like others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.catalog.__main__ import _ROWS, _table
from benchmarks.catalog.console import console_pages
from benchmarks.catalog.fill import adapter_name, fill
from benchmarks.catalog.heartbeat import heartbeat
from benchmarks.catalog.measure import Setup, _pages
from loray.catalog import Catalog

_NUM, _NUM_TENANTS = 1000, 10


def test_what_it_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    fill(url, _NUM, _NUM_TENANTS)
    catalog = Catalog(url)
    snapshot = catalog.snapshot()
    assert set(snapshot.adapters) == {adapter_name(i, _NUM_TENANTS) for i in range(1, _NUM + 1)}
    for method in ("lora", "vera", "longlora"):
        expected = [entry.name for entry in snapshot.models() if entry.default.method == method]
        assert [entry.name for entry in catalog.names(limit=_NUM, method=method)] == expected
    assert {len(entry.refs) for entry in snapshot.models()} == {1, 3}
    name = adapter_name(1, _NUM_TENANTS)
    catalog.promote(name, "prod", 2)
    after = catalog.snapshot(snapshot)
    assert (after.adapters[name].default.version, snapshot.adapters[name].default.version) == (2, 1)
    assert after == catalog.snapshot()
    monkeypatch.setattr("benchmarks.catalog.measure._REPEATS", 1)
    assert _pages(catalog, Setup(url, _NUM, _NUM_TENANTS)).keys() <= {row.name for row in _ROWS}
    catalog.close()
    monkeypatch.setattr("benchmarks.catalog.history._NUM_STEPS", 100)
    asked = console_pages(url, tmp_path / "home", _NUM, _NUM_TENANTS, _once)
    assert {"console_ms", "serving_page_ms", "job_first_page_ms"} < asked.keys()


def _once(ask: Callable[[], object]) -> float:
    ask()
    return 0.0


def test_the_table_marks_what_is_not_reached() -> None:
    figures = {row.name: 1e9 for row in _ROWS}
    lines = _table({"sqlite": figures}).splitlines()
    assert len(lines) == len(_ROWS) + 1
    assert "1,000,000,000*" in next(line for line in lines if "served after" in line)
    assert "*" not in next(line for line in lines if "resolved" in line)
    assert json.dumps(figures)


def test_the_heartbeat_sees_what_holds_the_loop() -> None:
    async def run() -> float:
        async with heartbeat() as holds:
            await asyncio.sleep(0)
            sum(range(3_000_000))
        return holds.longest_s

    assert asyncio.run(run()) > 0.001
