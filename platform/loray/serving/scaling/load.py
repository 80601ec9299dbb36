"""The load of all replicas together, in fully used replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from loray.serving.scaling.observation import Observation, key_of_rank
from loray.spec import AutoscalingSpec

_FIRST_REPORT = 0.25  # share of the window: a rate over a shorter time is noise
_EPS = 1e-9


@dataclass(frozen=True, slots=True)
class Load:
    """The load of all replicas together, `num_replicas` that have reported. `tokens` is per second; `capacity` and
    `pool_bytes` are one replica's; `backlog` is in tokens. `old_tokens` is the part of `tokens` that is in the backlog
    because it came before the window. `burst` are the tokens that came within the time of a start. `prompt` is the mean
    length of the prompt that a token of a prompt is part of.
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
    burst: float = 0.0
    prompt: float = 0.0

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

    def wait_s(self, spec: AutoscalingSpec) -> float:
        """That a first token may wait in a burst: `wait_slo_s`, or as long as a prompt takes where that is longer."""
        prompt_s = self.prompt / self.capacity if self.capacity else 0.0
        return max(spec.wait_slo_s or 0.0, prompt_s)

    def by_burst(self, spec: AutoscalingSpec) -> float:
        """Replicas that have done the work of a burst when a first token may have waited for no longer; 0 while the
        capacity is unknown.
        """
        if spec.wait_slo_s is None or self.capacity is None or not self.burst:
            return 0.0
        return self.burst / self.capacity / (burst_s(spec) + self.wait_s(spec))

    def at_once(self, spec: AutoscalingSpec) -> int:
        """The bounded number that bursts need, the present one and the next."""
        return bounded(whole(max(self.by_backlog(spec), self.by_burst(spec))), spec)

    @property
    def _by_new_demand(self) -> float:
        """`by_demand` without what is in the backlog as well. The capacity is known."""
        return max(0.0, self.tokens - self.old_tokens) / self.capacity if self.capacity else 0.0

    def replicas(self, spec: AutoscalingSpec, utilization: float) -> int:
        """The bounded number that all loads need."""
        largest = max(self.by_demand / utilization, self.by_bytes / utilization)
        return max(bounded(whole(largest), spec), self.at_once(spec))


def total(known: Sequence[Observation], window_s: float) -> Load:
    """The load of the replicas that have reported, at least one."""
    # The age of the oldest replica: requests that a younger one has counted, the older ones have not.
    seconds = min(window_s, max(*(o.age_s for o in known), _FIRST_REPORT * window_s))
    capacities = [o.capacity for o in known if o.capacity is not None]
    # A replica lists the adapters whose rank is below its sample. Below the smallest sample, the lists are complete.
    sample = min(o.sample for o in known)
    end = key_of_rank(sample)
    union: dict[str, float] = {}
    pairs: dict[str, float] = {}
    for o in known:
        pairs |= o.pairs
        for key, nbytes in o.adapters.items():
            if key < end and (key not in union or nbytes > union[key]):
                union[key] = nbytes
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
        burst=sum(o.burst for o in known),
        prompt=sum(o.prompt_squares for o in known) / (sum(o.prompt_tokens for o in known) or 1.0),
    )


def burst_s(spec: AutoscalingSpec) -> float:
    """The time over which bursts are measured: as long as a replica takes to start, at most the window."""
    return min(spec.startup_s, spec.window_s)


def bounded(number: int, spec: AutoscalingSpec) -> int:
    return min(max(number, spec.min_replicas, 1), spec.max_replicas)


def whole(load: float) -> int:
    return ceil(load - _EPS)
