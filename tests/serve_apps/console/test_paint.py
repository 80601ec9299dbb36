"""How soon pages are seen, and whether what is seen stays where it is, with 10,000 adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from loray.catalog.database import open_database, writing
from loray.catalog.schema import adapters, versions
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.console.browser import MARKS, served_site, watched
from tests.serve_apps.console.site import ROOT, ConsoleSite

pytestmark = MARKS
_NUM_ADAPTERS = 10_000
_FIRST_PAINT_S = 1.0
_SHIFT = 0.1  # cumulative layout shift: https://web.dev/articles/cls
_LIVE = ("", "/serving", "/serving/replicas/r1", "/jobs/train_1")
_OTHERS = ("/login", "/adapters", "/adapters/tone", "/jobs", "/playground", "/uploads", "/usage", "/keys")
_WATCH = """
    window.shifted = 0;
    new PerformanceObserver((list) => {
        for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
    }).observe({ type: "layout-shift", buffered: true });
"""
_PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[ConsoleSite]:
    site = ConsoleSite(tmp_path / "home", sqlite_catalog(tmp_path))
    site.catalog.register("first", "f1" * 32, site.catalog.version("tone", 1).manifest)
    engine = open_database(site.settings.catalog)
    with writing(engine) as c:
        adapter, version = (
            c.execute(sa.select(table).order_by(table.c.id.desc()).limit(1)).one()._mapping
            for table in (adapters, versions)
        )
        ids = range(adapter["id"] + 1, adapter["id"] + 1 + _NUM_ADAPTERS)
        c.execute(adapters.insert(), [dict(adapter) | {"id": n, "name": f"many-{n:06}"} for n in ids])
        c.execute(
            versions.insert(),
            [
                dict(version) | {"id": version["id"] + n - adapter["id"], "adapter_id": n, "digest": f"{n:064x}"}
                for n in ids
            ],
        )
    engine.dispose()
    site.train_some()
    yield site
    site.close()


def test_pages_are_seen_soon_and_stay_where_they_are(filled: ConsoleSite) -> None:
    key, slow, moved = filled.key("admin"), {}, {}
    with served_site(filled) as server, watched(server, ROOT) as seen:
        page = seen.page
        page.add_init_script(_WATCH)
        seen.open("/login")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Healthy")
        assert len(filled.catalog.names(limit=_NUM_ADAPTERS)) == _NUM_ADAPTERS
        for path in (*_LIVE, *_OTHERS):
            seen.open(path)
            if path in _LIVE:
                with page.expect_response(lambda answer: answer.url.endswith("/live"), timeout=10_000):
                    pass
                page.wait_for_timeout(200)  # until what came is drawn
            painted = page.evaluate(_PAINTED)
            slow |= {path: painted} if painted is None or painted > 1000 * _FIRST_PAINT_S else {}
            shifted = page.evaluate("window.shifted")
            moved |= {path: shifted} if shifted > _SHIFT else {}
        assert not slow
        assert not moved
        assert seen.problems == []
