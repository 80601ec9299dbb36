"""Ray Serve's autoscaling policy for the engines: `loray.serving.scaling` on what the replicas report.

Serve makes one in its controller and calls it ten times a second. What is remembered between decisions goes through
Serve's policy state; a controller that restarts begins without any, and with it the delays begin again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from loray.api.status import ScalingDecision
from loray.serving.demand import Observation
from loray.serving.scaling import Decision, ScalingState, decide
from loray.spec import AutoscalingSpec, ServeSpec
from loray.telemetry import get_logger
from serve_apps.scaling.log import ScalingLog

_log = get_logger(__name__)

# By import path. Serve pickles by value what the named module defines, by reference what that merely imports.
POLICY_CLASS = "serve_apps.app.AdapterDemandPolicy"
_DECIDE_S = 0.25
_TELL_S = 10.0  # how old the reason that /status shows may be
_CHANGE_S = 2.0  # between two causes that are told, where the loads are about equal
_STATE = "loray"
_HISTORY = 5  # reports of which Serve sends every point each time; it wants more than one, we need the last
_STALE_REPORTS = 5  # reports that may be missing in a row


def autoscaling_config(spec: ServeSpec) -> AutoscalingConfig | None:
    """Serve's, with our policy; None where the number of replicas is fixed.

    The delays are the policy's own: Serve's would count from the first wish, whatever size the later ones have.
    `metrics_interval_s` is deprecated, but Serve's replicas do not read yet what is to replace it (an environment
    variable of the cluster), and without it they report every ten seconds.
    """
    scaling = spec.autoscaling
    if scaling is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            # Given to Serve it is the target of every update as well, and would throw away what demand has asked for.
            initial_replicas=_initial(spec.num_replicas, scaling),
            metrics_interval_s=report_s(scaling),
            look_back_period_s=_HISTORY * report_s(scaling),
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=POLICY_CLASS, policy_kwargs=scaling.model_dump(mode="json")),
        )


def report_s(scaling: AutoscalingSpec) -> float:
    """Seconds between two reports of a replica."""
    return min(max(scaling.window_s / 30, 0.5), 5.0)


class AdapterDemandPolicy:
    """`spec`: AutoscalingSpec's fields."""

    def __init__(self, **spec: Any) -> None:
        self._spec = AutoscalingSpec.model_validate(spec)
        self._decided_at = self._told_at = float("-inf")
        self._told: tuple[int, str] | None = None
        self._kept: ScalingLog | None = None
        _into_controllers_log(_log)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        now, target = float(ctx.current_time), int(ctx.target_num_replicas)
        if not target or 0 <= now - self._decided_at < _DECIDE_S:  # 0: it is being deleted
            return target, ctx.policy_state
        self._decided_at = now
        # `serve deploy` may lower the bounds for a while (target_capacity).
        bounds = {
            "min_replicas": ctx.capacity_adjusted_min_replicas,
            "max_replicas": ctx.capacity_adjusted_max_replicas,
        }
        decision = decide(
            observations(ctx.running_replicas, ctx.raw_metrics, self._spec, now),
            self._spec.model_copy(update=bounds),
            ScalingState(**ctx.policy_state.get(_STATE, {})),
            target=target,
            now=now,
        )
        self._kept = self._kept or ScalingLog(str(ctx.app_name), ctx.deployment_name)
        self._tell(decision, self._kept, target, now)
        return decision.target, {_STATE: asdict(decision.state)}

    def _tell(self, decision: Decision, log: ScalingLog, target: int, now: float) -> None:
        change = None
        if decision.target != target:
            change = ScalingDecision(
                time=now, from_replicas=target, to_replicas=decision.target, reason=decision.reason
            )
            _log.info("replicas %d → %d: %s", target, decision.target, decision.reason)
        elif self._told != (target, decision.cause) and now - self._told_at >= _CHANGE_S:
            _log.info("%d replicas stay: %s", target, decision.reason)
        elif now - self._told_at < _TELL_S:
            return
        self._told, self._told_at = (decision.target, decision.cause), now
        log.write(target=decision.target, reason=decision.reason, now=now, decision=change)


def observations(
    replicas: Sequence[Any], metrics: Mapping[str, Mapping[Any, Sequence[Any]]], spec: AutoscalingSpec, now: float
) -> list[Observation | None]:
    """One for each replica; None where the last report is missing or too old to be of use.

    `metrics`: name → replica → points with `timestamp` and `value`, the newest last. The series of an adapter that is
    not in the last report any more stays for a while.
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
    except KeyError:  # of another version, while replicas are being replaced: the controller must not fail over it
        return None


def _initial(num_replicas: int, scaling: AutoscalingSpec) -> int | None:
    return min(num_replicas, scaling.max_replicas) if num_replicas > scaling.min_replicas else None


def _into_controllers_log(logger: logging.Logger) -> None:
    """Serve's handlers: its controller writes no other logger to its file."""
    logger.setLevel(logging.INFO)
    for handler in logging.getLogger("ray.serve").handlers:
        if handler not in logger.handlers:
            logger.addHandler(handler)
    logger.propagate = not logger.handlers
