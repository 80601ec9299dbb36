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
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, NamedTuple

from loray.serving.demand import Observation, adapter_rank
from loray.spec import AutoscalingSpec

Cause = Literal["working set", "tokens", "requests", "backlog", "bounds", "no statistics", "idle"]
Direction = Literal["up", "down", "none"]

_MARGIN = 0.1  # by which the utilization of the remaining replicas must stay below the target
_FIRST_REPORT = 0.25  # share of the window: a rate over a shorter time is noise
_EPS = 1e-9
_MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What is remembered between two decisions.

    direction   in which demand has asked for a change since `since`
    since       time
    most        the largest number of replicas that demand has asked for since then
    changed_at  time of the last change of the target
    """

    direction: Direction = "none"
    since: float = 0.0
    most: int = 0
    changed_at: float | None = None


class Decision(NamedTuple):
    """`cause` is the load that decides; `reason` explains it with numbers, for people."""

    target: int
    cause: Cause
    reason: str
    state: ScalingState


@dataclass(frozen=True, slots=True)
class Load:
    """The load of all replicas together, `num_replicas` that have reported. `tokens` is per second; `capacity` and
    `pool_bytes` are one replica's; `backlog` is in tokens. `old_tokens` is the part of `tokens` that is in the backlog
    because it came before the window.
    """

    num_replicas: int
    backlog: float
    tokens: float
    old_tokens: float
    capacity: float | None
    occupied: float
    kv_bytes: float
    adapter_bytes: float
    num_adapters: float
    pool_bytes: float

    @property
    def by_demand(self) -> float:
        """Fully used replicas that the tokens need, or the requests while the capacity is unknown."""
        return self.occupied if self.capacity is None else self.tokens / self.capacity

    @property
    def by_bytes(self) -> float:
        """Number of pools that adapters and KV cache fill."""
        return (self.adapter_bytes + self.kv_bytes) / self.pool_bytes

    def left(self, seconds: float) -> float:
        """Of the backlog, after so many seconds: seconds of one replica's work. 0 while the capacity is unknown."""
        if self.capacity is None:
            return 0.0
        spare = max(0.0, self.num_replicas - self._by_new_demand)
        return max(0.0, self.backlog / self.capacity - spare * seconds)

    def by_backlog(self, spec: AutoscalingSpec) -> float:
        """Replicas that the demand and what is left of the backlog need; 0 if nothing is left."""
        left = self.left(spec.startup_s)
        return self._by_new_demand + left / spec.drain_s if left else 0.0

    @property
    def _by_new_demand(self) -> float:
        """`by_demand` without what is in the backlog as well. The capacity is known."""
        return max(0.0, self.tokens - self.old_tokens) / self.capacity if self.capacity else 0.0

    def replicas(self, spec: AutoscalingSpec, utilization: float) -> int:
        """The bounded number that all loads need."""
        largest = max(self.by_demand / utilization, self.by_bytes / utilization, self.by_backlog(spec))
        return _bounded(_ceil(largest), spec)


def decide(
    observations: Sequence[Observation | None], spec: AutoscalingSpec, state: ScalingState, *, target: int, now: float
) -> Decision:
    """The target that follows `target`, which is at least one; `loray.serving.idle` says when it is none.
    `observations`: one per running replica, None if nothing is known of it.

    While a replica is silent, no replica is removed, and none is added on its account. The mean of the others says
    nothing about it: requests are routed by adapter, so one replica may have all the load and another none, and the
    requests that moved to a new replica are still in the windows of the others.
    """
    to = _bounded(target, spec)
    if to != target:
        reason = f"from {spec.min_replicas} to {spec.max_replicas} replicas are allowed"
        return Decision(to, "bounds", reason, ScalingState(changed_at=now))
    known = [o for o in observations if o is not None]
    if not known:
        reason = f"no replica has reported; {_replicas(target)} stay"
        return Decision(target, "no statistics", reason, _without_direction(state))
    load = total(known, spec.window_s)
    num_silent = len(observations) - len(known)
    silent = f"; {num_silent} of {len(observations)} replicas are silent, so none goes" if num_silent else ""
    cause, reason = explain(load, spec)
    reason += silent
    more = load.replicas(spec, spec.target_utilization)
    if more > target:
        state = _with_direction(state, "up", more, now)
        if now - state.since + _EPS >= spec.upscale_delay_s:
            return Decision(more, cause, reason, ScalingState(changed_at=now))
        at_once = _bounded(_ceil(load.by_backlog(spec)), spec)
        if at_once > target:
            # The other loads' delay goes on where they ask for more.
            state = replace(state, changed_at=now) if more > at_once else ScalingState(changed_at=now)
            cause, reason = explain(load, spec, backlog_alone=True)
            return Decision(at_once, cause, reason + silent, state)
        return Decision(target, cause, reason, state)
    fewer = load.replicas(spec, spec.target_utilization * (1 - _MARGIN))
    if fewer < target and not num_silent and _is_settled(known, spec, state, now):
        state = _with_direction(state, "down", fewer, now)
        if now - state.since + _EPS >= spec.downscale_delay_s:
            # `target` may be lower by now: others can change it too.
            return Decision(min(state.most, target), cause, reason, ScalingState(changed_at=now))
        return Decision(target, cause, reason, state)
    return Decision(target, cause, reason, _without_direction(state))


def total(known: Sequence[Observation], window_s: float) -> Load:
    """The load of the replicas that have reported, at least one."""
    # The age of the oldest replica: requests that a younger one has counted, the older ones have not.
    seconds = min(window_s, max(*(o.age_s for o in known), _FIRST_REPORT * window_s))
    capacities = [o.capacity for o in known if o.capacity is not None]
    # A replica lists the adapters whose rank is below its sample. Below the smallest sample, the lists are complete.
    sample = min(o.sample for o in known)
    union: dict[str, float] = {}
    pairs: dict[str, float] = {}
    for o in known:
        pairs |= o.pairs
        for key, nbytes in o.adapters.items():
            if adapter_rank(key) < sample:
                union[key] = max(nbytes, union.get(key, 0.0))
    return Load(
        num_replicas=len(known),
        backlog=sum(o.backlog for o in known),
        tokens=sum(o.tokens for o in known) / seconds,
        old_tokens=sum(o.old_backlog for o in known) / seconds,
        capacity=sum(capacities) / len(capacities) if capacities else None,
        occupied=sum(o.occupied_s for o in known) / seconds,
        kv_bytes=sum(o.kv_byte_s for o in known) / seconds,
        adapter_bytes=sum(union.values()) / sample + sum(pairs.values()),
        num_adapters=len(union) / sample,
        pool_bytes=sum(o.pool_bytes for o in known) / len(known),
    )


def explain(load: Load, spec: AutoscalingSpec, *, backlog_alone: bool = False) -> tuple[Cause, str]:
    """The load that decides, and a sentence about the loads that begins with it; about the backlog if any is left.

    `backlog_alone`: the backlog decides, though another load may be larger.
    """
    n = max(1, _ceil(load.by_bytes / spec.target_utilization))
    kv = load.kv_bytes / n
    room = spec.target_utilization * load.pool_bytes - kv
    by_bytes = (
        f"working set {load.adapter_bytes / _MIB:.1f} MiB of {load.num_adapters:.0f} adapters needs {_replicas(n)} at "
        f"{room / _MIB:.1f} MiB of pool each, beside {kv / _MIB:.1f} MiB of KV cache"
    )
    m = max(1, _ceil(load.by_demand / spec.target_utilization))
    demand: Cause = "requests" if load.capacity is None else "tokens"
    if load.capacity is None:
        by_demand = f"requests need {_replicas(m)} ({load.occupied:.2f} batches under way, capacity not yet measured)"
    else:
        by_demand = f"tokens need {_replicas(m)} ({load.tokens:.0f} of {load.capacity:.0f} tokens/s each)"
    by_bytes_first = load.by_bytes >= load.by_demand
    cause: Cause = "working set" if by_bytes_first else demand
    said = [by_bytes, by_demand] if by_bytes_first else [by_demand, by_bytes]
    k = _ceil(load.by_backlog(spec))
    if k:
        by_backlog = (
            f"backlog of {load.backlog:.0f} tokens needs {_replicas(k)} ({load.left(spec.startup_s):.0f} s of one "
            f"replica's work are left when another has started, to be done in {spec.drain_s:g} s)"
        )
        first = backlog_alone or k > max(n, m)
        cause = "backlog" if first else cause
        said.insert(0 if first else len(said), by_backlog)
    reason = "; ".join(said)
    number = k if backlog_alone else max(n, m, k)
    if number > spec.max_replicas:
        reason += f"; {_replicas(spec.max_replicas)} are the most allowed"
    elif number < spec.min_replicas:
        reason += f"; {_replicas(spec.min_replicas)} are the fewest allowed"
    return cause, reason


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
    return ScalingState(changed_at=state.changed_at)


def _bounded(number: int, spec: AutoscalingSpec) -> int:
    return min(max(number, spec.min_replicas, 1), spec.max_replicas)


def _ceil(load: float) -> int:
    return ceil(load - _EPS)


def _replicas(number: int) -> str:
    return f"{number} replica{'s' if number != 1 else ''}"
