"""Autoscaling on Ray Serve: our policy, the log of its decisions, and the demand that warms new replicas up.

Serve creates the policy in its controller and calls it ten times a second. The state between two decisions is Serve's
policy state. A controller that restarts begins without one, so the delays begin again.

Decisions and demand are in the cluster's key-value store (Ray's GCS), which every node can read and which needs no
process or file. Records there outlive every process that knows them, and a replica that starts needs nobody's answer.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter
from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client  # internal: Ray has no public key-value store
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from loray.policy.autoscaling import Bursts, Decision, ScalingState, decide_from_zero
from loray.policy.demand import Observation
from loray.policy.warm_start import DemandRecord, merged
from loray.schemas.status import AutoscalingStatus, ScalingDecision
from loray.spec import AutoscalingSpec, ServeSpec
from loray.telemetry import get_logger

_log = get_logger(__name__)

# By import path. Serve pickles a class by value if the named module defines it, and by reference if it imports it.
POLICY_CLASS = "serve_apps.app.AdapterDemandPolicy"
KEPT = 20  # decisions
_NAMESPACE = b"loray"
_TIMEOUT_S = 1.0  # Serve's controller is blocked meanwhile
_DECIDE_S = 0.25  # between two decisions
_REPORT_S = 10.0  # the maximum age of the reason that /status shows
_CHANGE_S = 2.0  # between two reported changes of the cause, if the loads are nearly equal
_STATE = "loray"
_WOKEN = "a request waited and no replica ran"
_HISTORY = 5  # reports that Serve keeps and sends each time; it requires more than one, only the last is used
_STALE_REPORTS = 5  # consecutive reports that may be missing
_OLD_S = 3600.0  # older than the newest record of demand: its gateway is gone
_RECORD = TypeAdapter(DemandRecord)


class ScalingLog:
    """The decisions for one deployment of an application, as one small record with one writer.

    The writer is created with the policy, at every deployment and every restart of the controller, and begins without
    decisions, so those of an earlier deployment are not shown. A failure to read or write them is only logged.
    """

    def __init__(self, application: str, deployment: str) -> None:
        self._key = f"autoscaling/{application}/{deployment}".encode()
        self._decisions: tuple[ScalingDecision, ...] = ()

    def write(self, *, target: int, reason: str, now: float, decision: ScalingDecision | None = None) -> None:
        """Write the record. `decision`: if the target has just changed. Blocks for a second at most."""
        if decision is not None:
            self._decisions = (*self._decisions, decision)[-KEPT:]
        status = AutoscalingStatus(target=target, reason=reason, time=now, decisions=self._decisions)
        try:
            internal_kv_get_gcs_client().internal_kv_put(
                self._key, status.model_dump_json().encode(), overwrite=True, namespace=_NAMESPACE, timeout=_TIMEOUT_S
            )
        except RayError as e:
            _log.warning("a scaling decision could not be kept for /status: %s", e)

    def read(self) -> AutoscalingStatus | None:
        """Read the last record; None if there is none, or if the GCS does not answer. Blocks for at most a second."""
        try:
            raw = internal_kv_get_gcs_client().internal_kv_get(self._key, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
            return None if raw is None else AutoscalingStatus.model_validate_json(raw)
        except (RayError, ValueError) as e:
            _log.warning("the scaling decisions cannot be read: %s", e)
            return None


def autoscaling_config(spec: ServeSpec, *, runs: bool = False) -> AutoscalingConfig | None:
    """Make Serve's configuration with our policy; None if the number of replicas is fixed. `runs`: the deployment is
    scaled already: then the number that demand has required stays, also zero.

    The policy has its own delays, because Serve's count from the first change of the demand, whatever its later size.
    `metrics_interval_s` is deprecated, but Serve's replicas do not read its replacement yet (an environment variable of
    the cluster), and without it they report every ten seconds.
    """
    scaling = spec.autoscaling
    if scaling is None:
        return None
    is_more = spec.num_replicas > scaling.min_replicas
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            # Serve uses it as the target of every update, too.
            initial_replicas=None if runs or not is_more else min(spec.num_replicas, scaling.max_replicas),
            metrics_interval_s=report_s(scaling),
            look_back_period_s=_HISTORY * report_s(scaling),
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=POLICY_CLASS, policy_kwargs=scaling.model_dump(mode="json")),
        )


def report_s(scaling: AutoscalingSpec) -> float:
    """Return the seconds between two reports of a replica."""
    return min(max(scaling.window_s / 30, 0.5), 5.0)


class AdapterDemandPolicy:
    """Decides the number of a base's replicas by the demand for its adapters. `spec`: AutoscalingSpec's fields."""

    def __init__(self, **spec: Any) -> None:
        self._spec = AutoscalingSpec.model_validate(spec)
        self._decided_at = self._reported_at = float("-inf")
        self._reported: tuple[int, str] | None = None
        self._target: int | None = None  # of the last decision
        self._scaling_log: ScalingLog | None = None
        _log_with_controller(_log)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        now, target = float(ctx.current_time), int(ctx.target_num_replicas)
        is_deleted = not target and self._spec.min_replicas > 0
        if is_deleted or 0 <= now - self._decided_at < _DECIDE_S:
            return target, ctx.policy_state
        self._decided_at = now
        # `serve deploy` can lower the bounds temporarily (target_capacity).
        bounds = {
            "min_replicas": ctx.capacity_adjusted_min_replicas,
            "max_replicas": ctx.capacity_adjusted_max_replicas,
        }
        decision = decide_from_zero(
            observations(ctx.running_replicas, ctx.raw_metrics, self._spec, now),
            self._spec.model_copy(update=bounds),
            _state_of(ctx.policy_state.get(_STATE)),
            target=target,
            num_queued=0.0 if self._spec.min_replicas else ctx.total_queued_requests or 0.0,
            now=now,
        )
        self._scaling_log = self._scaling_log or ScalingLog(str(ctx.app_name), ctx.deployment_name)
        self._report(decision, self._scaling_log, target, now)
        self._target = decision.target
        return decision.target, {_STATE: asdict(decision.state)}

    def _report(self, decision: Decision, log: ScalingLog, target: int, now: float) -> None:
        change = None
        if self._target == 0 < target:  # Serve has started it before it asked
            change = ScalingDecision(time=now, from_replicas=0, to_replicas=target, reason=_WOKEN)
            _log.info("replicas 0 → %d: %s", target, _WOKEN)
        elif decision.target != target:
            change = ScalingDecision(
                time=now, from_replicas=target, to_replicas=decision.target, reason=decision.reason
            )
            _log.info("replicas %d → %d: %s", target, decision.target, decision.reason)
        elif self._reported != (target, decision.cause) and now - self._reported_at >= _CHANGE_S:
            _log.info("%d replicas stay: %s", target, decision.reason)
        elif now - self._reported_at < _REPORT_S:
            return
        self._reported, self._reported_at = (decision.target, decision.cause), now
        log.write(target=decision.target, reason=decision.reason, now=now, decision=change)


def _state_of(kept: Mapping[str, Any] | None) -> ScalingState:
    """Inverse of `asdict`. Serve copies its policy state as plain data."""
    return ScalingState() if kept is None else ScalingState(**{**kept, "bursts": Bursts(**kept["bursts"])})


def observations(
    replicas: Sequence[Any], metrics: Mapping[str, Mapping[Any, Sequence[Any]]], spec: AutoscalingSpec, now: float
) -> list[Observation | None]:
    """Make one observation per replica; None if its last report is missing or too old.

    `metrics`: name → replica → points with `timestamp` and `value`, the newest last. Serve keeps the series of an
    adapter for a while after the adapter has left the reports.
    """
    max_age_s = spec.window_s + _STALE_REPORTS * report_s(spec)
    reported = metrics.get("age_s", {})
    last = {r: reported[r][-1].timestamp for r in replicas if reported.get(r)}
    stats: dict[Any, dict[str, float]] = {r: {} for r in last if now - last[r] <= max_age_s}
    for name, series in metrics.items():
        for replica, points in series.items():
            if replica in stats and points and points[-1].timestamp == last[replica]:
                stats[replica][name] = points[-1].value
    return [_observation(stats.get(r)) for r in replicas]


def _observation(stats: Mapping[str, float] | None) -> Observation | None:
    try:
        return None if stats is None else Observation.from_stats(stats)
    except KeyError:  # from a replica of another version during an update, on which the controller must not fail
        return None


def _log_with_controller(logger: logging.Logger) -> None:
    """Give the logger Serve's handlers: the controller writes only their records to its file."""
    logger.setLevel(logging.INFO)
    for handler in logging.getLogger("ray.serve").handlers:
        if handler not in logger.handlers:
            logger.addHandler(handler)
    logger.propagate = not logger.handlers


class DemandRecords:
    """The demand for adapters of one deployment of an application, of which each gateway writes a record of its own.

    Each call blocks for a second or two at most.
    """

    def __init__(self, application: str, deployment: str) -> None:
        self._prefix = f"demand/{application}/{deployment}/".encode()
        self._fails = False

    def write(self, gateway: str, record: DemandRecord) -> None:
        """Replace the gateway's record. A failure is logged once."""
        data = zlib.compress(_RECORD.dump_json(record), 1)
        try:
            internal_kv_get_gcs_client().internal_kv_put(
                self._prefix + gateway.encode(), data, overwrite=True, namespace=_NAMESPACE, timeout=_TIMEOUT_S
            )
            self._fails = False
        except RayError as e:
            if not self._fails:
                _log.warning("the demand for adapters could not be kept for replicas that start: %s", e)
            self._fails = True

    def read(self) -> DemandRecord | None:
        """Read the demand at all gateways; None if there was none. Removes what gateways have left that are long gone.

        Raises RayError where the GCS does not answer, ValueError where a record is not one.
        """
        gcs = internal_kv_get_gcs_client()
        keys = gcs.internal_kv_keys(self._prefix, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
        found = gcs.internal_kv_multi_get(keys, namespace=_NAMESPACE, timeout=_TIMEOUT_S) if keys else {}
        records = {key: _RECORD.validate_json(zlib.decompress(data)) for key, data in found.items()}
        if not records:
            return None
        newest = max(record.at for record in records.values())
        for key in [key for key, record in records.items() if record.at < newest - _OLD_S]:
            gcs.internal_kv_del(key, del_by_prefix=False, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
        return merged(list(records.values()))
