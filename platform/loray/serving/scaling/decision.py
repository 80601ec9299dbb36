"""Autoscaling: the number of replicas that adapter demand needs, by tokens and by bytes of the adapters in demand.

There are three loads, each in fully used replicas; the largest one decides:

    tokens       tokens asked for per second / tokens per second of a saturated replica
    working set  (bytes of the union of the adapters in demand + bytes of KV cache in use) / bytes of a pool
    backlog      tokens + what the running replicas leave of the queue / `drain_s`

The backlog is the work of the requests that wait for their first token, in seconds of one replica. A replica that is
added now takes requests after `startup_s`. By then the running ones have worked off what they can do beyond the demand;
only what is left counts, and is to be worked off within `drain_s`. A burst shorter than the window, which is diluted in
the demand, is seen in its queue. The number that the backlog needs has no delay; the other loads have theirs meanwhile,
and all ask for fewer replicas after the same delay. Requests that have waited since before the window are work that is
left and say nothing of what will come: the demand beside the backlog is without them.

Until a replica has been saturated, its capacity is unknown; then the number of requests under way, divided by the size
of a batch, takes the place of the first load. The working set is a union, not a sum: an adapter in demand on three
replicas must fit once, and the tokens say whether it needs three. KV cache and adapters share the pool, so the KV
cache's mean over the window, summed over all replicas, is not available for adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from loray.serving.scaling.bursts import Bursts
from loray.serving.scaling.load import Load, bounded, burst_s, total, whole
from loray.serving.scaling.observation import Observation
from loray.spec import AutoscalingSpec

Cause = Literal["working set", "tokens", "requests", "backlog", "bursts", "bounds", "no statistics", "idle"]
Direction = Literal["up", "down", "none"]

_MARGIN = 0.1  # by which the utilization of the remaining replicas must stay below the target
_EPS = 1e-9
_MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What is remembered between two decisions.

    direction   in which demand has asked for a change since `since`
    since       time
    most        the largest number of replicas that demand has asked for since then
    changed_at  time of the last change of the target
    bursts      see there
    """

    direction: Direction = "none"
    since: float = 0.0
    most: int = 0
    changed_at: float | None = None
    bursts: Bursts = field(default_factory=Bursts)

    def changed(self, now: float) -> ScalingState:
        """The target changes now."""
        return ScalingState(changed_at=now, bursts=self.bursts)


class Decision(NamedTuple):
    """`cause` is the load that decides; `reason` explains it with numbers, for people."""

    target: int
    cause: Cause
    reason: str
    state: ScalingState


def decide(
    observations: Sequence[Observation | None], spec: AutoscalingSpec, state: ScalingState, *, target: int, now: float
) -> Decision:
    """The target that follows `target`, which is at least one; `loray.serving.scaling.idle` says when it is none.
    `observations`: one per running replica, None if nothing is known of it.

    While a replica is silent, no replica is removed, and none is added on its account. The mean of the others says
    nothing about it: requests are routed by adapter, so one replica may have all the load and another none, and the
    requests that moved to a new replica are still in the windows of the others.
    """
    to = bounded(target, spec)
    if to != target:
        reason = f"from {spec.min_replicas} to {spec.max_replicas} replicas are allowed"
        return Decision(to, "bounds", reason, state.changed(now))
    known = [o for o in observations if o is not None]
    if not known:
        reason = f"no replica has reported; {_replicas(target)} stay"
        return Decision(target, "no statistics", reason, _without_direction(state))
    load = total(known, spec.window_s)
    if spec.wait_slo_s is not None:
        state = replace(state, bursts=state.bursts.noted(load.burst, now, spec.burst_memory_s))
        expected = spec.burst_factor * load.tokens * burst_s(spec)
        load = replace(load, burst=state.bursts.largest(expected, now, spec.burst_memory_s))
    num_silent = len(observations) - len(known)
    silent = f"; {num_silent} of {len(observations)} replicas are silent, so none goes" if num_silent else ""
    cause, reason = explain(load, spec)
    reason += silent
    more = load.replicas(spec, spec.target_utilization)
    if more > target:
        state = _with_direction(state, "up", more, now)
        if now - state.since + _EPS >= spec.upscale_delay_s:
            return Decision(more, cause, reason, state.changed(now))
        at_once = load.at_once(spec)
        if at_once > target:
            # The other loads' delay goes on where they ask for more.
            state = replace(state, changed_at=now) if more > at_once else state.changed(now)
            cause, reason = explain(load, spec, at_once=True)
            return Decision(at_once, cause, reason + silent, state)
        return Decision(target, cause, reason, state)
    fewer = load.replicas(spec, spec.target_utilization * (1 - _MARGIN))
    if fewer < target and not num_silent and _is_settled(known, spec, state, now):
        state = _with_direction(state, "down", fewer, now)
        if now - state.since + _EPS >= spec.downscale_delay_s:
            # `target` may be lower by now: others can change it too.
            return Decision(min(state.most, target), cause, reason, state.changed(now))
        return Decision(target, cause, reason, state)
    return Decision(target, cause, reason, _without_direction(state))


def explain(load: Load, spec: AutoscalingSpec, *, at_once: bool = False) -> tuple[Cause, str]:
    """The load that decides, and a sentence about the loads that begins with it; about the backlog if any is left,
    and about bursts where they decide.

    `at_once`: bursts or the backlog decide, though another load may be larger.
    """
    n = max(1, whole(load.by_bytes / spec.target_utilization))
    kv = load.kv_bytes / n
    room = spec.target_utilization * load.pool_bytes - kv
    by_bytes = (
        f"working set {load.adapter_bytes / _MIB:.1f} MiB of {load.num_adapters:.0f} adapters needs {_replicas(n)} at "
        f"{room / _MIB:.1f} MiB of pool each, beside {kv / _MIB:.1f} MiB of KV cache"
    )
    m = max(1, whole(load.by_demand / spec.target_utilization))
    demand: Cause = "requests" if load.capacity is None else "tokens"
    if load.capacity is None:
        by_demand = f"requests need {_replicas(m)} ({load.occupied:.2f} batches under way, capacity not yet measured)"
    else:
        by_demand = f"tokens need {_replicas(m)} ({load.tokens:.0f} of {load.capacity:.0f} tokens/s each)"
    by_bytes_first = load.by_bytes >= load.by_demand
    cause: Cause = "working set" if by_bytes_first else demand
    said = [by_bytes, by_demand] if by_bytes_first else [by_demand, by_bytes]
    most = 0 if at_once else max(n, m)
    for name, number, sentence in (_backlog(load, spec), _bursts(load, spec)):
        if number > most:
            most, cause = number, name
            said.insert(0, sentence)
        elif number and name == "backlog":
            said.append(sentence)
    reason, number = "; ".join(said), most
    if number > spec.max_replicas:
        reason += f"; {_replicas(spec.max_replicas)} are the most allowed"
    elif number < spec.min_replicas:
        reason += f"; {_replicas(spec.min_replicas)} are the fewest allowed"
    return cause, reason


def _backlog(load: Load, spec: AutoscalingSpec) -> tuple[Cause, int, str]:
    """The number of replicas that it needs, and a sentence about it."""
    k = whole(load.by_backlog(spec))
    sentence = (
        f"backlog of {load.backlog:.0f} tokens needs {_replicas(k)} ({load.left(spec.startup_s):.0f} s of one "
        f"replica's work are left when another has started, to be done in {spec.drain_s:g} s)"
    )
    return "backlog", k, sentence


def _bursts(load: Load, spec: AutoscalingSpec) -> tuple[Cause, int, str]:
    k = whole(load.by_burst(spec))
    sentence = (
        f"bursts need {_replicas(k)} ({load.burst:.0f} tokens within the {burst_s(spec):g} s of a start, for which "
        f"first tokens may wait {load.wait_s(spec):.1f} s)"
    )
    return "bursts", k, sentence


def _is_settled(known: Sequence[Observation], spec: AutoscalingSpec, state: ScalingState, now: float) -> bool:
    """Whether a whole window has passed since the last change.

    By then the remaining replicas have measured the demand that a removed replica had.
    """
    since = float("inf") if state.changed_at is None else now - state.changed_at
    return min(since, max(o.age_s for o in known)) >= spec.window_s


def _with_direction(state: ScalingState, direction: Direction, number: int, now: float) -> ScalingState:
    if state.direction != direction:
        return replace(state, direction=direction, since=now, most=number)
    return replace(state, most=max(state.most, number))


def _without_direction(state: ScalingState) -> ScalingState:
    return ScalingState(changed_at=state.changed_at, bursts=state.bursts)


def _replicas(number: int) -> str:
    return f"{number} replica{'s' if number != 1 else ''}"
