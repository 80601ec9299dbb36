"""Adapters from another replica: after the node's cache and before the store, verified, and never waited for long."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loray.errors import NotFoundError, ReplicaUnavailable
from loray.settings import Settings
from loray.spec import AdapterOf
from loray.store import AdapterCopy
from loray.store.copies import read_copy
from serve_apps.replica.loading import AdapterLoader
from serve_apps.replica.metrics import LoadCounts
from serve_apps.replica.peers import giving
from serve_apps.replica.peers.asking import ReplicaPeers
from serve_apps.replica.peers.giving import CopyGiver
from tests.fixtures.replica import World, same


class Other:
    """Stands in for Serve's handle: another replica, whose node has a cache of its own."""

    def __init__(self, *results: Any) -> None:
        self.results, self.asked, self.cancelled = list(results), list[AdapterOf](), 0
        self.give_adapter = self

    def remote(self, asked: AdapterOf) -> Other:
        self.asked.append(asked)
        return self

    def result(self, timeout_s: float) -> AdapterCopy | None:
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[no-any-return]

    def cancel(self) -> None:
        self.cancelled += 1


class Asker:
    """A replica on another node: its home is empty, the store is the world's."""

    def __init__(self, world: World, other: Other, home: Path) -> None:
        settings = Settings.from_env({"LORAY_HOME": str(home), "LORAY_STORE": world.settings.store})
        self.world, self.now, self.counts = world, 0.0, LoadCounts()
        self.peers = ReplicaPeers("here", lambda: other, self.counts, 2.0, lambda: self.now)
        self.loader = AdapterLoader(world.base, settings, self.counts, self.peers)
        self.cached = home / "cache" / "adapters" / world.ref.digest

    def load(self, *holders: str) -> Any:
        self.peers.told(self.world.ref.digest, holders)
        return self.world.load(loader=self.loader)

    @property
    def seen(self) -> dict[str, float]:
        """What was counted."""
        return {name: n for (name,), n in (self.counts.sources | self.counts.answers).items() if n}


def given(world: World) -> Any:
    return asyncio.run(CopyGiver(world.loader.cache).give(world.ref.digest))


def without_store(world: World) -> None:
    shutil.rmtree(world.settings.home / "store")


@pytest.mark.parametrize("world", ["lora", "vera"], indirect=True)
def test_a_replica_loads_from_another_one_while_the_store_is_away(world: World, tmp_path: Path) -> None:
    expected, copy = world.load(), given(world)
    without_store(world)
    other = Other(copy)
    asker = Asker(world, other, tmp_path / "other")
    assert same(asker.load("here", "there", "elsewhere"), expected)
    assert other.asked == [AdapterOf(world.ref.digest, "there")]
    assert same(asker.load("there"), expected)
    assert asker.seen == {"peer": 1, "given": 1, "cache": 1}
    assert read_copy(asker.cached, 1 << 30) is not None  # and gives it to others itself


@pytest.mark.parametrize(
    ("answer", "name"),
    [(None, "absent"), (TimeoutError(), "late"), (ReplicaUnavailable("gone"), "failed"), ("damaged", "failed")],
)
def test_whatever_the_other_replica_answers_the_store_has_it(
    world: World, tmp_path: Path, answer: Any, name: str
) -> None:
    expected, copy = world.load(), given(world)
    if answer == "damaged":
        data = copy.files["adapter_model.safetensors"].copy()
        data[-1] ^= 1
        answer = copy._replace(files={**copy.files, "adapter_model.safetensors": data})
    other = Other(answer)
    asker = Asker(world, other, tmp_path / "other")
    assert same(asker.load("there"), expected)
    assert asker.seen == {"store": 1, name: 1}
    assert other.cancelled == (isinstance(answer, Exception))


def test_a_copy_of_another_adapter_is_refused(world: World, tmp_path: Path) -> None:
    world.load()
    copy = given(world)
    other = Other(copy._replace(manifest=copy.manifest.replace(b'"', b" ", 1)), copy._replace(files={}))
    without_store(world)
    asker = Asker(world, other, tmp_path / "other")
    for _ in range(2):
        with pytest.raises(NotFoundError):
            asker.load("there")
    assert not asker.cached.exists()
    assert asker.seen == {"store": 2, "failed": 2}


def test_one_that_did_not_answer_is_left_alone_for_a_while(world: World, tmp_path: Path) -> None:
    world.load()
    other = Other(TimeoutError(), None, given(world))
    asker = Asker(world, other, tmp_path / "other")
    digest = world.ref.digest
    asker.peers.told(digest, ("slow",))
    assert asker.peers.copy(digest) is None
    assert asker.peers.copy(digest) is None
    asker.peers.told(digest, ("slow", "quick"))
    assert asker.peers.copy(digest) is None  # it does not have it
    asker.now += 11
    assert asker.peers.copy(digest) is not None
    assert [asked.replica for asked in other.asked] == ["slow", "quick", "slow"]
    asker.peers.told(digest, ("here",))
    assert asker.peers.copy(digest) is None
    assert len(other.asked) == 3


def test_what_is_not_there_whole_is_not_given_and_nobody_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert given(world) is None
    world.load()
    with world.loader.cache._lock(world.ref.digest, fcntl.LOCK_EX):  # it is being evicted, or made
        assert given(world) is None
    copy = given(world)
    assert sum(map(np.size, copy.files.values())) > 0
    monkeypatch.setattr(giving, "_MAX_BYTES", 100)
    assert given(world) is None
    monkeypatch.undo()
    (world.cached / "loray.json").chmod(0o644)
    (world.cached / "loray.json").write_text("{")
    assert given(world) is None
