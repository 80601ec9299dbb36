"""Names that the snapshot lacks: looked up at once, but not as often as they are asked for."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.catalog.snapshot_file import SnapshotFile
from loray.errors import AdapterNotFound, BaseMismatch, CatalogError
from loray.spec import OPERATOR
from serve_apps.catalog_watch import CatalogWatcher
from serve_apps.gateway.directory import LOOK_AGAIN_S, ModelResolver, ResolvedModel
from serve_apps.gateway.errors import failure_of
from tests.fixtures.gateway import register


class Watched:
    """A catalog that can be away, with the times at which its counter was read, and whether all of it was read."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.is_away = False
        self.looks: list[float] = []
        self.reads: list[bool] = []

    def __call__(self) -> Any:
        if self.is_away:
            raise CatalogError("the database is away")
        return self

    def change_counter(self) -> int:
        self()
        self.looks.append(time.monotonic())
        return self._catalog.change_counter()

    def snapshot(self, before: Any = None, *, whole: bool = False) -> Any:
        self.reads.append(whole)
        return self._catalog.snapshot(before, whole=whole)

    def close(self) -> None:
        pass


@pytest.fixture
def watched(catalog: Catalog) -> Watched:
    return Watched(catalog)


@asynccontextmanager
async def resolving(
    base: BaseModel, watched: Watched, kept: SnapshotFile | None = None
) -> AsyncIterator[ModelResolver]:
    """One that has looked at the catalog once."""
    directory = ModelResolver([base], CatalogWatcher(watched), kept)
    await directory.follower.refresh()
    watched.looks.clear()
    yield directory
    directory.follower.close()


async def test_adapters_are_served_on_quantised_forms_of_their_base(base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "tone", base.fingerprint)
    register(catalog, "other", "0" * 64)
    int8 = replace(base, name="int8", fingerprint="8" * 64, of=base.fingerprint)
    fp8 = replace(int8, name="fp8", fingerprint="f" * 64)
    stranger = replace(int8, name="stranger", of=None)
    for bases, expected in (([int8, fp8], int8), ([int8, base], base), ([fp8, int8], fp8)):
        directory = ModelResolver(bases, CatalogWatcher(Watched(catalog)))
        await directory.follower.refresh()
        found = await directory.resolve("tone", OPERATOR)
        assert found.base == expected
        assert found.adapter is not None
        found.adapter.check_base(found.base.name, found.base.fingerprint, found.base.of)
        assert (await directory.resolve("int8:tone", OPERATOR)).base == int8
        assert [directory.num_adapters_of(b) for b in bases] == [int(b == expected) for b in bases]
        assert {directory.longest_context(b) for b in bases} == {base.config.max_position_embeddings}
        directory.follower.close()
    directory = ModelResolver([stranger], CatalogWatcher(Watched(catalog)))
    await directory.follower.refresh()
    for name in ("tone", "stranger:tone"):
        with pytest.raises(BaseMismatch, match="was trained on another base"):
            await directory.resolve(name, OPERATOR)
    directory.follower.close()


async def test_concurrent_unknown_names_share_one_read(base: BaseModel, watched: Watched) -> None:
    async with resolving(base, watched) as directory:
        asked = (directory.resolve(f"x{i}", OPERATOR) for i in range(500))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(o) for o in outcomes} == {AdapterNotFound}
    assert len(watched.looks) == 1


async def test_unknown_names_in_turn_are_read_for_with_pauses(
    base: BaseModel, watched: Watched, catalog: Catalog
) -> None:
    async with resolving(base, watched) as directory:
        for i in range(4):
            with pytest.raises(AdapterNotFound):
                await directory.resolve(f"x{i}", OPERATOR)
        register(catalog, "tone", base.fingerprint)
        _, ref = await directory.resolve("tone", OPERATOR)  # published a moment ago, and found
        assert ref is not None
    pauses = [b - a for a, b in zip(watched.looks, watched.looks[1:], strict=False)]
    assert len(pauses) == 4
    assert min(pauses) > 0.8 * LOOK_AGAIN_S  # a read begins a little later than its refresh


async def test_before_the_first_snapshot_no_name_is_unknown(
    base: BaseModel, watched: Watched, catalog: Catalog
) -> None:
    register(catalog, "tone", base.fingerprint)
    watched.is_away = True
    async with resolving(base, watched) as directory:
        assert await directory.resolve(base.name, OPERATOR) == ResolvedModel(base)
        for name in ("tone", "nobody"):
            with pytest.raises(CatalogError, match=r"could not be read yet \(CatalogError: the database is away\)"):
                await directory.resolve(name, OPERATOR)
        assert (directory.num_adapters, directory.longest_context(base)) == (0, base.config.max_position_embeddings)
        watched.is_away = False
        assert (await directory.resolve("tone", OPERATOR)).adapter is not None
        assert directory.num_adapters == 1
    assert failure_of(CatalogError("away")).status == 503


async def test_a_gateway_that_starts_without_database_serves_what_is_on_disk(
    base: BaseModel,
    watched: Watched,
    catalog: Catalog,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_apps.catalog_watch.SPREAD_S", 0.0)
    register(catalog, "tone", base.fingerprint, context_length=4096)
    kept = SnapshotFile(tmp_path / "snapshot", "sqlite:///somewhere")
    first = ModelResolver([base], CatalogWatcher(watched), kept)
    await first.follower.start()
    while not kept.path.exists():
        await asyncio.sleep(0.01)
    await first.follower.stop()
    watched.is_away = True
    async with resolving(base, watched, kept) as directory:
        _, ref = await directory.resolve("tone", OPERATOR)
        assert ref is not None
        assert (ref.label, directory.longest_context(base), directory.num_adapters) == ("tone@1", 4096, 1)
        assert directory.follower.failure is not None
        assert 0 < directory.age_s < 600
        with pytest.raises(AdapterNotFound, match="nobody"):
            await directory.resolve("nobody", OPERATOR)
        register(catalog, "tone", base.fingerprint)
        watched.is_away, watched.reads = False, []
        for _ in range(3):
            await directory.follower.refresh()
        _, ref = await directory.resolve("tone", OPERATOR)
        assert ref is not None
        assert (ref.label, directory.follower.failure) == ("tone@2", None)
        assert watched.reads == [True]  # what was on disk was compared with all of the database
        register(catalog, "tone", base.fingerprint)
        await directory.follower.refresh()
        assert watched.reads == [True, False]
    assert "kept on disk" in caplog.text


def test_collections_pass_a_large_snapshot_by(
    base: BaseModel, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None begins while the first one is made, and none looks through it afterwards; each of the next is small."""
    register(catalog, "tone", base.fingerprint)
    frozen: list[bool] = []
    monkeypatch.setattr("serve_apps.gateway.directory.exempt_all", lambda: frozen.append(gc.isenabled()))

    class Collected(Catalog):
        def snapshot(self, *given: Any, **fields: Any) -> Any:
            enabled.append(gc.isenabled())
            return super().snapshot(*given, **fields)

    async def run(many: int) -> None:
        monkeypatch.setattr("serve_apps.gateway.directory._MANY", many)
        directory = ModelResolver([base], CatalogWatcher(lambda: Collected(str(catalog._db.engine.url))))
        for _ in range(2):
            await directory.follower.refresh()
            register(catalog, "tone", base.fingerprint)
        directory.follower.close()

    for many, times in ((1000, 0), (1, 1)):
        enabled: list[bool] = []
        asyncio.run(run(many))
        assert enabled == [False, True]
        assert frozen == [False] * times  # before one can begin
        assert gc.isenabled()
