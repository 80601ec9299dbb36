"""`loray adapters canary` on the catalog itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loray.catalog import Catalog
from loray.settings import Settings
from loray.spec import CanaryCounts
from tests.cli.run import Loray
from tests.fixtures.figures import counts
from tests.fixtures.versions import publish


@pytest.fixture
def catalog(home: Path) -> Catalog:
    catalog = Catalog(Settings.from_env().catalog)
    publish(catalog, "tone", 1, 2, 3)
    catalog.promote("tone", "prod", 2)
    return catalog


def test_a_canary_from_its_start_to_its_end(loray: Loray, catalog: Catalog) -> None:
    given = ("adapters", "canary", "tone", "--version", 3)
    started = loray(*given, "--percent", 10, "--max-error-rate", 0.5, "--min-requests", 10)
    assert started.code == 0
    assert "prod 2→3" in started.out
    grown = json.loads(loray(*given, "--percent", 20, "--max-ttft-ratio", 3, "--json").out)
    wanted = {"max_error_rate": 0.5, "max_ttft_ratio": 3.0, "max_itl_ratio": 2.0, "min_requests": 10}
    assert (grown["percent"], grown["bounds"]) == (20, wanted)
    running = catalog.canary("tone")
    catalog.report_canaries("a", {running.id: CanaryCounts(counts(80), counts(20, errors=3))})
    assert json.loads(loray("adapters", "canary", "tone", "--json").out)["counts"]["canary"]["num_requests"] == 20
    (row,) = json.loads(loray("adapters", "ls", "--json").out)
    assert row["weights"] == {"prod": {"2": 80, "3": 20}}
    catalog.report_canaries("a", {running.id: CanaryCounts(counts(80), counts(30, errors=16))})
    ended = json.loads(loray("adapters", "canary", "tone", "--json").out)
    assert (ended["outcome"], ended["reason"][:24]) == ("rolled_back", "16 of 30 requests failed")
    assert "rolled back" in loray("adapters", "show", "tone").out
    again = loray(*given, "--percent", 10, "--json")
    assert json.loads(again.out)["bounds"]["max_error_rate"] == 0.05
    assert loray("adapters", "promote", "tone@3").out == "tone@prod is version 3 now\n"
    assert catalog.canary("tone").outcome == "promoted"


def test_wrong_canaries(loray: Loray, catalog: Catalog) -> None:
    for wrong in (("--version", 3), ("--percent", 3), ("--end", "--version", 3, "--percent", 3), ("--min-requests", 5)):
        assert loray("adapters", "canary", "tone", *wrong).code == 2
    assert loray("adapters", "canary", "tone", "--version", 3, "--percent", 100).code == 2
    assert "has no canary" in loray("adapters", "canary", "tone").err
    assert "points at version 2 already" in loray("adapters", "canary", "tone", "--version", 2, "--percent", 5).err
