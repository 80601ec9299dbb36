"""The demand that gateways leave for replicas that start: written, read, added up, and removed when it is old."""

from __future__ import annotations

import asyncio
import time

import pytest
from ray.exceptions import RpcError

from loray.policy.routing import Held, RoutingReports, RoutingSeries
from loray.policy.warm_start import AdapterDemand, DemandRecord
from serve_apps import scaling
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.engines import DemandReporter
from serve_apps.scaling import DemandRecords
from tests.fixtures.demand import adapter


class Gcs:
    """The cluster's key-value store."""

    def __init__(self) -> None:
        self.stored: dict[bytes, bytes] = {}
        self.away = False

    def __call__(self) -> Gcs:
        return self

    def internal_kv_put(self, key: bytes, value: bytes, *, overwrite: bool, namespace: bytes, timeout: float) -> int:
        if self.away:
            raise RpcError("away")
        self.stored[key] = value
        return 1

    def internal_kv_keys(self, prefix: bytes, *, namespace: bytes, timeout: float) -> list[bytes]:
        if self.away:
            raise RpcError("away")
        return [key for key in self.stored if key.startswith(prefix)]

    def internal_kv_multi_get(self, keys: list[bytes], *, namespace: bytes, timeout: float) -> dict[bytes, bytes]:
        return {key: self.stored[key] for key in keys}

    def internal_kv_del(self, key: bytes, *, del_by_prefix: bool, namespace: bytes, timeout: float) -> int:
        return int(self.stored.pop(key, None) is not None)


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Gcs:
    found = Gcs()
    monkeypatch.setattr(scaling, "internal_kv_get_gcs_client", found)
    return found


def test_what_the_gateways_wrote_is_read_as_one(gcs: Gcs) -> None:
    records = DemandRecords("loray", "engine-a")
    assert records.read() is None
    one = DemandRecord(5000.0, ("r1",), (AdapterDemand(adapter(1), 2.0, ("r1",)), AdapterDemand(adapter(2), 1.0)))
    records.write("g1", one)
    assert records.read() == one
    records.write("g2", DemandRecord(5000.0, ("r1",), (AdapterDemand(adapter(2), 3.0),)))
    records.write("gone", DemandRecord(1000.0, ("r0",), (AdapterDemand(adapter(3), 9.0),)))
    DemandRecords("loray", "engine-b").write("g1", DemandRecord(9000.0))
    found = records.read()
    assert found is not None
    assert [d.ref for d in found.adapters[:2]] == [adapter(2), adapter(1)]
    assert {key.rpartition(b"/")[2] for key in gcs.stored} == {b"g1", b"g2"}  # the oldest is not kept


def test_a_cluster_that_does_not_answer_costs_a_line(gcs: Gcs, caplog: pytest.LogCaptureFixture) -> None:
    records = DemandRecords("loray", "engine-a")
    gcs.away = True
    for _ in range(3):
        records.write("g1", DemandRecord(5000.0))
    assert len(caplog.records) == 1
    with pytest.raises(RpcError):
        records.read()


def test_a_gateway_notes_its_demand_with_who_has_the_adapters(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = RoutingReports()
    for name in ("r1", "r2"):
        (delta,) = RoutingSeries(name).deltas(Held((adapter(1).digest,) if name == "r1" else ()))
        reports.take(name, delta, time.monotonic())
    monkeypatch.setattr(router, "reports", reports)
    monkeypatch.setattr(router, "_replicas", {"engine-a": frozenset({"r1", "r2"})})
    records = DemandRecords("loray", "engine-a")
    notes = DemandReporter(records, "g1", "engine-a")

    async def scenario() -> None:
        await notes.look()
        assert records.read() is None  # nobody asked for an adapter
        notes.came(adapter(1))
        await notes.look()  # the replicas have been written: the next note is in five seconds
        assert records.read() is None
        monkeypatch.setattr(router, "_replicas", {"engine-a": frozenset({"r1"})})
        await notes.look()
        found = records.read()
        assert found is not None
        assert (found.replicas, found.adapters[0].holders) == (("r1",), ("r1",))
        monkeypatch.setattr(router, "_replicas", {})
        await notes.look()
        notes.came(adapter(2))  # it waits for the first replica, and is written at once
        await notes.look()
        found = records.read()
        assert found is not None
        assert found.replicas == ()
        assert {d.ref for d in found.adapters} == {adapter(1), adapter(2)}

    asyncio.run(scenario())
