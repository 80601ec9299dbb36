"""Names that the snapshot lacks: looked up at once, but not as often as they are asked for."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import AdapterNotFound
from loray.spec import OPERATOR
from serve_apps.gateway.directory import LOOK_AGAIN_S, ModelDirectory
from tests.serve_apps.gateway.scripted import register


class Watched:
    """A catalog, with the times at which its counter was read."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.reads: list[float] = []

    def change_counter(self) -> int:
        self.reads.append(time.monotonic())
        return self._catalog.change_counter()

    def snapshot(self, before: Any = None) -> Any:
        return self._catalog.snapshot(before)

    def close(self) -> None:
        pass


@pytest.fixture
def watched(catalog: Catalog) -> Watched:
    return Watched(catalog)


async def directory_of(base: BaseModel, watched: Watched) -> ModelDirectory:
    directory = ModelDirectory(base, lambda: watched)  # type: ignore[arg-type, return-value]
    await directory.refresh()
    return directory


def test_concurrent_unknown_names_share_one_read(base: BaseModel, watched: Watched) -> None:
    async def run() -> None:
        directory = await directory_of(base, watched)
        asked = (directory.resolve(f"x{i}", OPERATOR) for i in range(500))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(o) for o in outcomes} == {AdapterNotFound}
        directory.close()

    asyncio.run(run())
    assert len(watched.reads) == 1


def test_unknown_names_in_turn_are_read_for_with_pauses(base: BaseModel, watched: Watched, catalog: Catalog) -> None:
    async def run() -> None:
        directory = await directory_of(base, watched)
        for i in range(4):
            with pytest.raises(AdapterNotFound):
                await directory.resolve(f"x{i}", OPERATOR)
        register(catalog, "tone", base.fingerprint)
        ref = await directory.resolve("tone", OPERATOR)  # published a moment ago, and found
        assert ref is not None
        directory.close()

    asyncio.run(run())
    pauses = [b - a for a, b in zip(watched.reads, watched.reads[1:], strict=False)]
    assert len(pauses) == 4
    assert min(pauses) > 0.8 * LOOK_AGAIN_S  # a read begins a little later than its refresh
