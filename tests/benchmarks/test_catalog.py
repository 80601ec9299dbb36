"""The benchmark of the catalog, small: what it fills is a catalog like others, and each figure is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import catalog as benchmark
from loray.catalog import Catalog
from tests.fixtures.filled_catalog import adapter_name, fill

_NUM, _NUM_TENANTS = 1000, 10


def test_what_it_fills(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    fill(url, _NUM, _NUM_TENANTS)
    catalog = Catalog(url)
    snapshot = catalog.snapshot()
    assert set(snapshot.adapters) == {adapter_name(i, _NUM_TENANTS) for i in range(1, _NUM + 1)}
    for method in ("lora", "vera", "longlora"):
        expected = [entry.name for entry in snapshot.models() if entry.default.method == method]
        assert [entry.name for entry in catalog.adapters.page(limit=_NUM, method=method)] == expected
    assert {len(entry.refs) for entry in snapshot.models()} == {1, 3}
    name = adapter_name(1, _NUM_TENANTS)
    catalog.aliases.move(name, "prod", 2)
    after = catalog.snapshot(snapshot)
    assert (after.adapters[name].default.version, snapshot.adapters[name].default.version) == (2, 1)
    assert after == catalog.snapshot()
    catalog.close()


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    benchmark.main(["--adapters", "1000", "--tenants", "4", "--database", "sqlite", "--json", str(file)])
    written = json.loads(file.read_text())
    assert written["columns"] == ["", "sqlite", "wanted"]
    rows = {name: value for name, value, _ in written["rows"]}
    assert len(rows) == len(benchmark._ROWS)
    assert all(rows.values())
    assert "a change is served after at most, s" in capsys.readouterr().out
