"""How many replicas adapter demand needs: by tokens, and by the bytes of the adapters in demand.

Two loads, each in replicas at full use, of which the larger decides:

    tokens       tokens asked for per second / tokens per second that a replica manages when it is saturated
    working set  (bytes of the union of the adapters in demand + bytes of KV cache in use) / bytes of a pool

As long as no replica has been saturated its capacity is unknown, and the requests under way are compared with a batch
instead. The union, not the sum: an adapter that is hot on three replicas needs to fit once; that it needs three is what
tokens say. KV cache and adapters share the pool, so what KV cache takes (its mean over the window, wherever requests
run) is not there for adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, NamedTuple

from loray.serving.demand import Observation, adapter_rank
from loray.spec import AutoscalingSpec

Cause = Literal["working set", "tokens", "requests", "bounds", "no statistics"]

_MARGIN = 0.1  # below the target utilization, that the replicas which stay must have
_FIRST_REPORT = 0.25  # of the window: a rate over less than this is noise
_EPS = 1e-9
_MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class ScalingState:
    """Between two decisions. `wish` is the direction wished for since `since`, `most` the largest number of a wish for
    fewer, `changed_at` when the target changed last.
    """

    wish: Literal["more", "fewer", "none"] = "none"
    since: float = 0.0
    most: int = 0
    changed_at: float | None = None


class Decision(NamedTuple):
    """`cause` is the load that decides; `reason` says it all, with numbers."""

    target: int
    cause: Cause
    reason: str
    state: ScalingState


@dataclass(frozen=True, slots=True)
class Load:
    """Of all replicas together, per second where it is a rate."""

    tokens: float
    capacity: float | None
    occupied: float
    kv_bytes: float
    adapter_bytes: float
    num_adapters: float
    pool_bytes: float

    @property
    def by_demand(self) -> float:
        """Replicas at full use that tokens need, or requests while no capacity is known."""
        return self.occupied if self.capacity is None else self.tokens / self.capacity

    @property
    def by_bytes(self) -> float:
        """Pools that adapters and KV cache fill."""
        return (self.adapter_bytes + self.kv_bytes) / self.pool_bytes

    def replicas(self, utilization: float) -> int:
        return max(_ceil(self.by_demand / utilization), _ceil(self.by_bytes / utilization))


def decide(
    observations: Sequence[Observation | None], spec: AutoscalingSpec, state: ScalingState, *, target: int, now: float
) -> Decision:
    """The next target, after `target`. `observations`: one for each running replica, None where nothing is known of it.

    While a replica is silent none goes, and none comes for its sake. The others' mean says nothing of it: requests are
    routed by adapter, so one may have everything to do and its neighbour nothing, and what a replica that has
    just started does is still in the others' windows.
    """
    if not spec.min_replicas <= target <= spec.max_replicas:
        to = _bounded(target, spec)
        reason = f"from {spec.min_replicas} to {spec.max_replicas} replicas are allowed"
        return Decision(to, "bounds", reason, ScalingState(changed_at=now))
    known = [o for o in observations if o is not None]
    if not known:
        return Decision(target, "no statistics", f"no replica has reported; {_replicas(target)} stay", _wishless(state))
    load = total(known, spec.window_s)
    cause, reason = explain(load, spec)
    num_silent = len(observations) - len(known)
    if num_silent:
        reason += f"; {num_silent} of {len(observations)} replicas are silent, so none goes"
    more = _bounded(load.replicas(spec.target_utilization), spec)
    if more > target:
        state = _wishing(state, "more", more, now)
        if now - state.since + _EPS >= spec.upscale_delay_s:
            return Decision(more, cause, reason, ScalingState(changed_at=now))
        return Decision(target, cause, reason, state)
    fewer = _bounded(load.replicas(spec.target_utilization * (1 - _MARGIN)), spec)
    if fewer < target and not num_silent and _is_settled(known, spec, state, now):
        state = _wishing(state, "fewer", fewer, now)
        if now - state.since + _EPS >= spec.downscale_delay_s:
            # The target may have been changed by others since.
            return Decision(min(state.most, target), cause, reason, ScalingState(changed_at=now))
        return Decision(target, cause, reason, state)
    return Decision(target, cause, reason, _wishless(state))


def total(known: Sequence[Observation], window_s: float) -> Load:
    """Of replicas that have reported, at least one."""
    # The oldest one's age: what the younger ones have seen of the window, the older ones have not.
    seconds = min(window_s, max(*(o.age_s for o in known), _FIRST_REPORT * window_s))
    capacities = [o.capacity for o in known if o.capacity is not None]
    # Every replica names those adapters whose rank is below its sample; below the smallest sample, all do.
    sample = min(o.sample for o in known)
    union: dict[str, float] = {}
    pairs: dict[str, float] = {}
    for o in known:
        pairs |= o.pairs
        for key, nbytes in o.adapters.items():
            if adapter_rank(key) < sample:
                union[key] = max(nbytes, union.get(key, 0.0))
    return Load(
        tokens=sum(o.tokens for o in known) / seconds,
        capacity=sum(capacities) / len(capacities) if capacities else None,
        occupied=sum(o.occupied_s for o in known) / seconds,
        kv_bytes=sum(o.kv_byte_s for o in known) / seconds,
        adapter_bytes=sum(union.values()) / sample + sum(pairs.values()),
        num_adapters=len(union) / sample,
        pool_bytes=sum(o.pool_bytes for o in known) / len(known),
    )


def explain(load: Load, spec: AutoscalingSpec) -> tuple[Cause, str]:
    """Which load decides, and both in one sentence, the one that decides first."""
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
    reason = f"{by_bytes}; {by_demand}" if by_bytes_first else f"{by_demand}; {by_bytes}"
    if max(n, m) > spec.max_replicas:
        reason += f"; {_replicas(spec.max_replicas)} are the most allowed"
    elif max(n, m) < spec.min_replicas:
        reason += f"; {_replicas(spec.min_replicas)} are the fewest allowed"
    return ("working set" if by_bytes_first else demand), reason


def _is_settled(known: Sequence[Observation], spec: AutoscalingSpec, state: ScalingState, now: float) -> bool:
    """A whole window has been seen since the last change: what a replica knew that has gone, the others know by now."""
    since = float("inf") if state.changed_at is None else now - state.changed_at
    return min(since, max(o.age_s for o in known)) >= spec.window_s


def _wishing(state: ScalingState, wish: Literal["more", "fewer"], number: int, now: float) -> ScalingState:
    if state.wish != wish:
        return replace(state, wish=wish, since=now, most=number)
    return replace(state, most=max(state.most, number))


def _wishless(state: ScalingState) -> ScalingState:
    return ScalingState(changed_at=state.changed_at)


def _bounded(number: int, spec: AutoscalingSpec) -> int:
    return min(max(number, spec.min_replicas), spec.max_replicas)


def _ceil(load: float) -> int:
    return ceil(load - _EPS)


def _replicas(number: int) -> str:
    return f"{number} replica{'s' if number != 1 else ''}"
