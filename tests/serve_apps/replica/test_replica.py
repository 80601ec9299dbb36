"""A replica's warm start with a real engine, which nothing hinders, and its logs of errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import MagicMock

import pytest

from loray.bases.registry import BaseModel
from loray.encryption import server_context
from loray.engine.metrics import EngineStats
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.errors import EngineError, IntegrityError, RequestError, StoreError
from loray.policy.routing import Held
from loray.policy.warm_start import AdapterDemand, DemandRecord
from loray.settings import Settings
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec
from serve_apps.channel.listener import Listener
from serve_apps.replica import replica as module
from serve_apps.replica.loading import AdapterLoader
from serve_apps.replica.replica import EngineReplica, warm_up, without_expected_tracebacks
from serve_apps.replica.startup import start_engine
from tests.fixtures.authority import Authority
from tests.fixtures.channel import until


class Place:
    """Published adapters, and an engine that has loaded none of them."""

    def __init__(self, base: BaseModel, settings: Settings, refs: list[AdapterRef]) -> None:
        self.base, self.refs = base, refs
        self.loader = AdapterLoader(base, settings)
        spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=1 << 20, num_threads=1)
        self.stream = start_engine(spec, base, self.loader)

    def read(self) -> DemandRecord | None:
        """Stands in for DemandRecords: the first replica of all starts, and each adapter was asked for."""
        demands = (AdapterDemand(ref, 9.0 - i) for i, ref in enumerate(self.refs))
        return DemandRecord(0.0, (), tuple(demands))

    def warm_up(self, timeout_s: float = 60.0) -> Any:
        records: Any = self
        return warm_up(self.stream, records, "own", self.base, timeout_s)

    def stats(self) -> EngineStats:
        """Of now, while the stream's own may be a step old."""
        return self.stream.call(self.stream._engine.stats).result()

    def ask(self, ref: AdapterRef) -> None:
        async def generate() -> None:
            request = GenerateRequest("r", (1, 2), SamplingParams(max_tokens=1), ref)
            assert [delta async for delta in self.stream.generate(request)]

        asyncio.run(generate())


@pytest.fixture
def place(base: BaseModel, settings: Settings, published: Callable[..., AdapterRef]) -> Iterator[Place]:
    place = Place(base, settings, [published(name, seed=seed) for seed, name in enumerate("abc")])
    yield place
    place.stream.stop()


def test_expected_adapters_are_in_the_pool_before_the_first_request(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="loray"):
        warm = place.warm_up()
    assert warm.adapters == (3, 0, 0, 0)
    assert 0 < warm.seconds < 60
    assert "3 are in the pool, 0 on the host" in caplog.text
    assert set(place.stats().adapters_in_pool) == {ref.digest for ref in place.refs}
    for ref in place.refs:
        place.ask(ref)
    stats = place.stats()
    assert (stats.num_pool_hits, stats.num_misses, stats.num_loads) == (3, 0, 3)


def test_a_store_that_hangs_costs_the_time_and_one_that_fails_none(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, load = Event(), AdapterLoader.__call__

    def hang(self: AdapterLoader, ref: AdapterRef, packer: Packer) -> PackedAdapter:
        if ref.name == "b":
            raise StoreError("away")
        if ref.name == "c":
            assert going.wait(60)
        return load(self, ref, packer)

    monkeypatch.setattr(AdapterLoader, "__call__", hang)
    began = time.monotonic()
    warm = place.warm_up(timeout_s=15.0)  # a fifth of it: no other replica runs
    try:
        assert warm.adapters == (1, 0, 1, 1)
        assert time.monotonic() - began < 15.0
        place.ask(place.refs[0])
    finally:
        going.set()
    place.ask(place.refs[2])  # the load went on


def test_nothing_hinders_the_start(
    place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "read", lambda: None)
    assert place.warm_up().adapters.total == 0
    assert not caplog.records

    def fail() -> None:
        raise ValueError("no record")

    monkeypatch.setattr(place, "read", fail)
    assert place.warm_up().adapters.total == 0
    assert "the replica starts without adapters" in caplog.text
    place.ask(place.refs[0])


@pytest.mark.parametrize(
    ("error", "level", "message"),
    [
        (RequestError("no", "prompt"), logging.INFO, "request refused: RequestError: no"),
        (IntegrityError("damaged"), logging.WARNING, "request failed: IntegrityError: damaged"),
        (EngineError("x"), logging.ERROR, "Request failed."),
        (KeyError("x"), logging.ERROR, "Request failed."),
    ],
)
def test_what_is_raised_on_purpose_is_one_line(error: Exception, level: int, message: str) -> None:
    info = (type(error), error, None)
    record = logging.LogRecord("ray.serve", logging.ERROR, "f", 1, "Request failed.", (), info)
    assert without_expected_tracebacks(record)
    assert (record.exc_info is None) == (level != logging.ERROR)
    assert (record.levelno, record.getMessage()) == (level, message)


async def test_a_replica_of_a_cluster_with_tls_reaches_gateways_on_other_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They take nobody without. Neither an engine nor Ray is there."""
    env = Authority(tmp_path).node("127.0.0.1")
    for name, value in (env | {"LORAY_HOME": str(tmp_path / "home")}).items():
        monkeypatch.setenv(name, value)
    for name in ("configure_logging", "get_base", "adapter_loader", "start_engine"):
        monkeypatch.setattr(module, name, MagicMock())
    for name in ("freeze_garbage", "collect_when_quiet", "_num_nodes", "_num_bases"):
        monkeypatch.setattr(module, name, MagicMock())
    monkeypatch.setattr(module, "set_num_threads", lambda spec, *numbers: spec)
    monkeypatch.setattr(module, "_replica_id", lambda: "replica")
    monkeypatch.setattr(module, "_node_id", lambda: "another")
    monkeypatch.setattr(EngineReplica, "_held", lambda self: Held())
    replica = EngineReplica(ServeSpec(base="tiny", dtype="float32", pool_bytes=1 << 20, warm_start_s=0.0))
    gateway = Listener()
    await gateway.start("node", "127.0.0.1", server_context(env))
    assert (await replica._connections.to(gateway.address)).is_open
    assert gateway.replicas() == {"replica"}
    replica._connections.close()
    await until(lambda: not gateway._all)
    await gateway.close()
