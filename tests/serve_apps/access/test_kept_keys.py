"""Keys on disk: a server that starts while the database is away."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from loray.catalog import Catalog
from loray.catalog.snapshot_file import KeysFile
from loray.errors import CatalogError, Unauthenticated
from loray.policy.auth import KeyRing
from loray.spec import Principal
from serve_apps.auth import Authenticator
from serve_apps.catalog_watch import CatalogWatcher
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.access.conftest import bearer


class World:
    """A catalog that can be away, and the file of one home."""

    def __init__(self, folder: Path) -> None:
        self.url = sqlite_catalog(folder)
        self.file = KeysFile(folder / "keys.jsonl", self.url)
        self.is_away = False

    def open(self) -> Catalog:
        if self.is_away:
            raise CatalogError("the database is away")
        return Catalog(self.url)

    def server(self, max_age_s: float = 3600.0) -> Authenticator:
        follower = CatalogWatcher(self.open)
        return Authenticator(KeyRing(max_age_s=max_age_s), follower, host="0.0.0.0", kept=self.file)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def admitted(access: Authenticator, *secrets: str, refreshes: int = 1) -> list[Principal | Exception]:
    async def ask() -> list[Principal | Exception]:
        for _ in range(refreshes):
            await access.refresh()
        answers: list[Principal | Exception] = []
        for secret in secrets:
            try:
                principal = await access.admit("POST", "infer", {k.lower(): v for k, v in bearer(secret).items()})
                assert principal is not None
                answers.append(principal)
            except (CatalogError, Unauthenticated) as e:
                answers.append(e)
        return answers

    try:
        return asyncio.run(ask())
    finally:
        access.close()


def test_a_server_starts_while_the_database_is_away(world: World) -> None:
    with closing(world.open()) as catalog:
        catalog.create_tenant("acme")
        good, key = catalog.create_key("ci", tenant="acme", scopes=("infer",))
        revoked, other = catalog.create_key("old", scopes=("infer",))
        catalog.revoke_key(other.id)
    assert len(admitted(world.server())) == 0  # the first server writes the file
    assert good not in world.file.path.read_text()
    assert world.file.path.stat().st_mode & 0o077 == 0
    world.is_away = True
    first, second = admitted(world.server(), good, revoked)
    assert isinstance(first, Principal)
    assert (first.tenant, first.key_id) == ("acme", key.id)
    assert isinstance(second, Unauthenticated)
    (too_old,) = admitted(world.server(max_age_s=0.0), good)
    assert isinstance(too_old, CatalogError)


def test_what_the_database_says_replaces_what_was_kept(world: World) -> None:
    with closing(world.open()) as catalog:
        good, key = catalog.create_key("ci", scopes=("infer",))
    admitted(world.server())
    with closing(world.open()) as catalog:
        catalog.revoke_key(key.id)
    world.is_away = True
    server = world.server()

    async def ask() -> None:
        await server.refresh()
        assert (await server.admit("POST", "infer", {"authorization": f"Bearer {good}"})) is not None
        world.is_away = False
        await server.refresh()
        with pytest.raises(Unauthenticated):
            await server.admit("POST", "infer", {"authorization": f"Bearer {good}"})

    try:
        asyncio.run(ask())
    finally:
        server.close()
    kept = world.file.read()
    assert kept is not None
    assert [found.key.id for found in kept.state.keys] == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace('"format":3', '"format":2')),
        lambda path: path.write_text(path.read_text().replace('"catalog":"', '"catalog":"0')),
        lambda path: path.write_text(path.read_text().replace('"infer"', '"admin"')),
        lambda path: path.chmod(0o644),
        lambda path: path.unlink(),
    ],
)
def test_a_file_that_cannot_be_used(world: World, harm: Callable[[Path], object]) -> None:
    with closing(world.open()) as catalog:
        good, _ = catalog.create_key("ci", scopes=("infer",))
    admitted(world.server())
    harm(world.file.path)
    world.is_away = True
    (answer,) = admitted(world.server(), good)
    assert isinstance(answer, CatalogError)


def test_keys_from_disk_are_as_old_as_they_are(world: World) -> None:
    key = Catalog(world.url).create_key("ci", scopes=("infer",)).secret
    with closing(world.server()) as before:
        assert before.age_s == float("inf")
        assert isinstance(admitted(before, key)[0], Principal)
        assert 0 <= before.age_s < 60
    world.is_away = True
    at = time.time() - 600
    os.utime(world.file.path, (at, at))
    with closing(world.server()) as after:
        assert isinstance(admitted(after, key)[0], Principal)
        assert 600 <= after.age_s < 660
        world.is_away = False
        admitted(after, refreshes=2)
        assert 0 <= after.age_s < 60
