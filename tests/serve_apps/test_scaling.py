"""The autoscaling policy without Serve, its log, and the demand that gateways leave for replicas that start."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import pytest
from ray.exceptions import RpcError
from ray.serve.config import AutoscalingContext

from loray.policy.demand import DemandMeter, EngineLoad, Observation
from loray.policy.warm_start import AdapterDemand, DemandRecord
from loray.schemas.status import AutoscalingStatus
from loray.spec import AdapterBytes, AutoscalingSpec, ServeSpec
from serve_apps import scaling
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.engines import DemandReporter
from serve_apps.scaling import (
    KEPT,
    POLICY_CLASS,
    AdapterDemandPolicy,
    DemandRecords,
    ScalingLog,
    autoscaling_config,
    observations,
    report_s,
)
from tests.fixtures.demand import adapter, observation

SPEC = AutoscalingSpec(max_replicas=4, window_s=60, upscale_delay_s=0, wait_slo_s=None)


class Point(NamedTuple):
    timestamp: float
    value: float


class Gcs:
    """The cluster's key-value store."""

    def __init__(self) -> None:
        self.stored: dict[bytes, bytes] = {}
        self.away = False

    def __call__(self) -> Gcs:
        return self

    def internal_kv_put(self, key: bytes, value: bytes, *, overwrite: bool, namespace: bytes, timeout: float) -> int:
        self._check(timeout)
        assert overwrite
        self.stored[key] = value
        return 1

    def internal_kv_get(self, key: bytes, *, namespace: bytes, timeout: float) -> bytes | None:
        self._check(timeout)
        return self.stored.get(key)

    def internal_kv_keys(self, prefix: bytes, *, namespace: bytes, timeout: float) -> list[bytes]:
        self._check(timeout)
        return [key for key in self.stored if key.startswith(prefix)]

    def internal_kv_multi_get(self, keys: list[bytes], *, namespace: bytes, timeout: float) -> dict[bytes, bytes]:
        return {key: self.stored[key] for key in keys}

    def internal_kv_del(self, key: bytes, *, del_by_prefix: bool, namespace: bytes, timeout: float) -> int:
        return int(self.stored.pop(key, None) is not None)

    def _check(self, timeout: float) -> None:
        assert timeout <= 1
        if self.away:
            raise RpcError("away")


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Gcs:
    found = Gcs()
    monkeypatch.setattr(scaling, "internal_kv_get_gcs_client", found)
    return found


def series(reports: dict[str, list[tuple[float, Observation]]]) -> dict[str, dict[str, list[Point]]]:
    """The reports as Serve's controller stores them: name → replica → points."""
    metrics: dict[str, dict[str, list[Point]]] = {}
    for replica, timed in reports.items():
        for at, seen in timed:
            for name, value in seen.to_stats().items():
                metrics.setdefault(name, {}).setdefault(replica, []).append(Point(at, value))
    return metrics


def context(now: float, target: int, metrics: Any, state: dict[str, Any], **bounds: int) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="engine",
        app_name="loray",
        current_num_replicas=target,
        target_num_replicas=target,
        running_replicas=[f"r{i}" for i in range(target)],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=lambda: metrics,
        capacity_adjusted_min_replicas=bounds.get("least", 1),
        capacity_adjusted_max_replicas=bounds.get("most", 4),
        policy_state=state,
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=None,
    )


FEW = series({"r0": [(1000.0, observation([1]))]})
BUSY = series({"r0": [(1000.0, observation([1], tokens=60 * 700.0, capacity=1000.0))]})
WIDE = series({"r0": [(999.0, observation(range(20)))]})


def policy_of(spec: AutoscalingSpec = SPEC) -> AdapterDemandPolicy:
    return AdapterDemandPolicy(**spec.model_dump(mode="json"))


def logged() -> AutoscalingStatus:
    status = ScalingLog("loray", "engine").read()
    assert status is not None
    return status


def test_the_last_report_counts_and_an_adapter_that_has_left_it_does_not() -> None:
    old, new = observation([1, 2], tokens=5.0), observation([2, 3], tokens=7.0, capacity=9.0)
    metrics = series({"a": [(100.0, old), (102.0, new)]})
    assert observations(["a", "b"], metrics, SPEC, 103.0) == [new, None]
    assert adapter(1).digest[:16] not in new.adapters


def test_a_report_grows_old_and_that_of_another_version_is_none() -> None:
    metrics = series({"a": [(100.0, observation())]})
    age = SPEC.window_s + 5 * report_s(SPEC)
    assert observations(["a"], metrics, SPEC, 100 + age) == [observation()]
    assert observations(["a"], metrics, SPEC, 100 + age + 1) == [None]
    del metrics["tokens"]
    assert observations(["a"], metrics, SPEC, 100 + age) == [None]


def test_decisions_are_logged_and_can_be_read(gcs: Gcs, caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of()
    with caplog.at_level("INFO", logger="loray.serve_apps.autoscaler"):
        target, state = policy(context(1000.0, 1, WIDE, {}))
        assert target == 3
        assert policy(context(1000.1, 3, WIDE, state)) == (3, state)  # too soon for another decision
        target, state = policy(context(1001.0, 3, WIDE, state))
        assert target == 3
    assert "replicas 1 → 3: working set 20.0 MiB of 20 adapters needs 3 replicas" in caplog.text
    status = logged()
    (decision,) = status.decisions
    assert (decision.time, decision.from_replicas, decision.to_replicas) == (1000.0, 1, 3)
    assert decision.reason.startswith("working set 20.0 MiB of 20 adapters needs 3 replicas at 8.0 MiB of pool each")
    assert status.target == 3
    assert ScalingLog("other", "engine").read() is None


def test_a_change_of_the_cause_is_reported(gcs: Gcs, caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of()
    state: dict[str, Any] = {}
    reasons = []
    with caplog.at_level("INFO", logger="loray.serve_apps.autoscaler"):
        for second, metrics in enumerate([{}, FEW, FEW, FEW, BUSY, BUSY]):
            _, state = policy(context(1001.0 + 3 * second, 1, metrics, state))
            reasons.append(logged().reason.split(" ")[0])
    assert reasons == ["no", "working", "working", "working", "tokens", "tokens"]
    assert len(caplog.records) == 3


def test_alternating_causes_are_not_reported_with_every_decision(gcs: Gcs) -> None:
    policy = policy_of()
    state: dict[str, Any] = {}
    written = []
    for number in range(40):  # ten seconds
        _, state = policy(context(1001.0 + number / 4, 1, (FEW, BUSY)[number % 2], state))
        written.append(gcs.stored[b"autoscaling/loray/engine"])
    assert len(set(written)) == 5


def test_a_deployment_begins_without_the_decisions_of_another_one(gcs: Gcs) -> None:
    for target in (1, 3):
        policy_of()(context(1000.0, target, WIDE, {}))
    status = logged()
    assert status.decisions == ()


def test_a_replicas_queue_reaches_the_decision(gcs: Gcs) -> None:
    """From the meter over Serve's series of numbers to the decision and its reason, without a delay."""
    meter = DemandMeter(
        window_s=60, max_num_seqs=32, pool_bytes=1e9, adapter_bytes=lambda ref: AdapterBytes(ref.nbytes), now=0.0
    )
    for number in range(50):
        meter.arrived(2000, 1, adapter(1), 100.0 + number / 50)
    for second in range(3):
        load = EngineLoad(num_running=1, num_waiting=49, num_loading=0, num_tokens=1000 * second, kv_bytes=0.0)
        meter.sample(load, 101.0 + second)
    seen = meter.observe(103.0, {adapter(1).digest})
    assert (seen.capacity, seen.backlog) == (pytest.approx(1000), 49 * 2000)
    policy = policy_of(SPEC.model_copy(update={"upscale_delay_s": 1000.0}))
    assert policy(context(103.5, 1, series({"r0": [(103.0, seen)]}), {}))[0] == 4
    status = logged()
    (decision,) = status.decisions
    assert decision.reason.startswith("backlog of 98000 tokens needs")


def test_the_bounds_come_from_serve(gcs: Gcs) -> None:
    policy = policy_of()
    wide = series({"r0": [(1000.0, observation(range(30)))]})
    assert policy(context(1000.0, 1, wide, {}, most=2))[0] == 2
    assert policy(context(2000.0, 0, wide, {}))[0] == 0  # the application is being deleted


def test_the_log_has_that_a_base_went_to_zero_and_that_serve_started_it_again(gcs: Gcs) -> None:
    spec = SPEC.model_copy(update={"min_replicas": 0, "downscale_to_zero_delay_s": 100.0})
    policy = policy_of(spec)
    target, state = policy(context(1000.0, 0, {}, {}, least=0))
    assert target == 0
    seen = observation(age_s=50.0)
    for now in (1051.0, 1100.0):  # Serve has started one by itself: it does not ask while a request waits for it
        target, state = policy(context(now, 1, series({"r0": [(now, seen)]}), state, least=0))
        assert target == 1
    target, state = policy(context(1151.0, 1, series({"r0": [(1151.0, seen)]}), state, least=0))
    assert target == 0
    status = logged()
    assert [d.to_replicas for d in status.decisions] == [1, 0]


def test_only_the_last_decisions_are_kept(gcs: Gcs) -> None:
    log = ScalingLog("loray", "engine")
    change = AutoscalingStatus.model_validate_json(
        '{"target":1,"reason":"","time":0,"decisions":[{"time":0,"from_replicas":1,"to_replicas":2,"reason":""}]}'
    ).decisions[0]
    for n in range(KEPT + 5):
        log.write(target=1, reason="r", now=float(n), decision=change.model_copy(update={"time": float(n)}))
    status = logged()
    assert [d.time for d in status.decisions] == [float(n) for n in range(5, KEPT + 5)]


def test_what_serve_is_given() -> None:
    assert autoscaling_config(ServeSpec()) is None
    spec = ServeSpec(autoscaling=AutoscalingSpec(min_replicas=2, max_replicas=5))
    config = autoscaling_config(spec)
    assert config is not None
    assert (config.min_replicas, config.max_replicas, config.initial_replicas) == (2, 5, None)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0, 0)
    assert (config.metrics_interval_s, config.look_back_period_s) == (2.0, 10.0)
    assert config.policy.policy_function == POLICY_CLASS
    assert config.policy.get_policy() is AdapterDemandPolicy
    assert AutoscalingSpec.model_validate(config.policy.policy_kwargs) == spec.autoscaling
    first = autoscaling_config(spec.model_copy(update={"num_replicas": 9}))
    assert first is not None
    assert first.initial_replicas == 5
    updated = autoscaling_config(spec.model_copy(update={"num_replicas": 9}), runs=True)
    assert updated is not None
    assert updated.initial_replicas is None


def test_replicas_report_often_enough_for_the_window() -> None:
    assert [report_s(SPEC.model_copy(update={"window_s": w})) for w in (1.0, 60.0, 3600.0)] == [0.5, 2.0, 5.0]


def test_what_the_gateways_wrote_is_read_as_one(gcs: Gcs) -> None:
    records = DemandRecords("loray", "engine-a")
    assert records.read() is None
    one = DemandRecord(5000.0, ("r1",), (AdapterDemand(adapter(1), 2.0), AdapterDemand(adapter(2), 1.0)))
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


def test_a_gateway_notes_its_demand_with_the_replicas(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert (found.replicas, [d.ref for d in found.adapters]) == (("r1",), [adapter(1)])
        monkeypatch.setattr(router, "_replicas", {})
        await notes.look()
        notes.came(adapter(2))  # it waits for the first replica, and is written at once
        await notes.look()
        found = records.read()
        assert found is not None
        assert found.replicas == ()
        assert {d.ref for d in found.adapters} == {adapter(1), adapter(2)}

    asyncio.run(scenario())
