"""Wrong keys in great numbers: right ones are served all the same, and nothing is remembered of the wrong ones."""

from __future__ import annotations

import asyncio
import secrets
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from loray.catalog import Catalog
from loray.errors import Unauthenticated
from loray.policy import auth
from serve_apps import auth as door
from serve_apps import auth as middleware
from serve_apps.auth import Authenticator
from tests.fixtures.access import Site, bearer
from tests.serve_apps.keys import access_of

KEPT_BY = [module.__file__ for module in (auth, door, middleware)]


def wrong_key() -> str:
    return "sk-lr-" + secrets.token_urlsafe(32)


def test_right_keys_are_served_beside_a_flood_of_wrong_ones(site_of: Callable[..., Site]) -> None:
    site = site_of()
    key = site.key("infer")
    for _ in range(20):
        refused = [site.complete(bearer(wrong_key())) for _ in range(20)]
        refused += [site.api.get("adapters", headers=bearer(wrong_key())) for _ in range(5)]
        assert {answer.status_code for answer in refused} == {401}
        assert site.complete(key).status_code == 200
        assert site.api.get("adapters", headers=key).status_code == 200
    assert len(site.engines.requests) == 20


def kept_bytes() -> int:
    """Allocated by the modules of keys, and alive."""
    found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, name) for name in KEPT_BY])
    return sum(trace.size for trace in found.traces)


def test_the_memory_of_keys_is_bounded(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    with closing(Catalog(url)) as catalog:
        right = catalog.create_key("ci").secret

    async def ask(access: Authenticator, secret: str) -> None:
        await access.admit("POST", "infer", {"authorization": f"Bearer {secret}"})

    async def flood(access: Authenticator, number: int) -> None:
        for _ in range(number):
            with pytest.raises(Unauthenticated):
                await ask(access, wrong_key())

    async def run() -> tuple[int, int]:
        access = access_of(url, host="0.0.0.0")
        await access.start()
        await ask(access, right)
        tracemalloc.start()
        try:
            await flood(access, 100)
            before = kept_bytes()
            await flood(access, 3000)
            await ask(access, right)
            return before, kept_bytes()
        finally:
            tracemalloc.stop()
            await access.stop()

    before, after = asyncio.run(run())
    assert after <= before + 16_384, "each of 3,000 wrong keys has left something"
