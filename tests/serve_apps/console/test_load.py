"""The console beside an engine that answers: its pictures follow the load, without a reload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loray.publishing import Destination, publish
from tests.fixtures.cluster import Served
from tests.serve_apps.asking import answer_of
from tests.serve_apps.console.browser import MARKS, watched
from tests.serve_apps.console.site import ROOT

pytestmark = MARKS
_HELD = "tr:has(th:text-is('{}@1')) td.pool"


def test_the_heat_map_follows_the_requests(served_alone: Served, peft_folder: Callable[..., Path]) -> None:
    base = served_alone.base
    for seed, name in enumerate(("asked-first", "asked-second")):
        publish(peft_folder(base, seed=seed), base, Destination(name, served_alone.store, served_alone.catalog))
    with watched(served_alone.url, ROOT) as seen:
        page = seen.page
        seen.open("/serving")
        page.evaluate("window.loadedOnce = true")
        assert page.locator("text=asked-first").count() == page.locator("text=asked-second").count() == 0
        assert answer_of(served_alone, "asked-first")
        page.wait_for_selector(_HELD.format("asked-first"))
        page.wait_for_selector("svg.pool path[class='blocks-layered']", state="attached")  # where its rows are
        assert page.locator("text=asked-second").count() == 0
        assert answer_of(served_alone, "asked-second")
        page.wait_for_selector(_HELD.format("asked-second"))
        assert page.locator(_HELD.format("asked-first")).count() == 1
        assert page.evaluate("window.loadedOnce") is True
        assert seen.problems == []
