"""How many replicas the demand needs, zero included.

There are three loads, each in fully used replicas; the largest one decides:

    tokens       tokens asked for per second / tokens per second of a saturated replica
    working set  (bytes of the union of the adapters in demand + bytes of KV cache in use) / bytes of a pool
    backlog      tokens + what the running replicas leave of the queue / `drain_s`

Until a replica has been saturated, its capacity is unknown; then the number of requests under way, divided by the size
of a batch, takes the place of the first load. The working set is a union, not a sum: an adapter in demand on three
replicas must fit once, and the tokens say whether it needs three. KV cache and adapters share the pool, so the KV
cache's mean over the window, summed over all replicas, is not available for adapters.

The backlog is the work of the requests that wait for their first token, in seconds of one replica. A replica that is
added now takes requests after `startup_s`. By then the running ones have worked off what they can do beyond the demand;
only what is left counts, and is to be worked off within `drain_s`. A burst shorter than the window, which is diluted in
the demand, is seen in its queue, and the next one is expected by what `Bursts` remembers. The number that backlog or
bursts need has no delay; the other loads have theirs meanwhile, and all ask for fewer replicas after the same delay.
Requests that have waited since before the window are work that is left and say nothing of what will come: the demand
beside the backlog is without them.

`decide` says how many replicas the demand needs while there is one; `decide_from_zero` also says none. The last replica
goes when no request has come and none has been under way for `downscale_to_zero_delay_s`. Ray Serve itself starts one
where a request waits and none runs, before it asks a policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal, NamedTuple

from loray.policy.demand import Observation, key_of_rank
from loray.spec import AutoscalingSpec

Cause = Literal["working set", "tokens", "requests", "backlog", "bursts", "bounds", "no statistics", "idle"]
Direction = Literal["up", "down", "none"]

BURST_MEMORY_S = 1200.0  # for which the largest burst is remembered
_MARK_S = BURST_MEMORY_S / 60  # by which a burst is forgotten too late, at most
_BURST_FACTOR = 2.0  # times the mean that a burst is expected to bring as long as the load is new
_FIRST_REPORT = 0.25  # share of the window: a rate over a shorter time is noise
_MARGIN = 0.1  # by which the utilization of the remaining replicas must stay below the target
_EPS = 1e-9
_MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class Bursts:
    """The largest bursts of late. It is immutable, since it is part of the state between two decisions.

    A replica that is added takes requests after `startup_s`. What comes meanwhile, those that run compute. So the
    tokens that come within such a time are measured all the time, and the most of them is remembered for
    BURST_MEMORY_S. Until the load has been watched for so long, a burst is expected to bring twice the mean.

    since   when the load was first seen; None: not yet
    marks   (time, tokens) of the largest bursts: each is larger than all that came after it
    """

    since: float | None = None
    marks: tuple[tuple[float, float], ...] = ()

    def noted(self, tokens: float, now: float) -> Bursts:
        """Return the bursts with the tokens that came within the time of a start, until now."""
        at = _MARK_S * ceil(now / _MARK_S)
        kept = tuple(m for m in self.marks if m[0] > now - BURST_MEMORY_S and m[1] > tokens)
        if kept and kept[-1][0] >= at:  # a larger one of the same time
            return Bursts(self.since, kept)
        return Bursts(now if self.since is None else self.since, (*kept, (at, tokens)))

    def largest(self, expected: float, now: float) -> float:
        """Return the tokens of the largest burst. `expected`: those of a burst as long as the load is new."""
        seen = self.marks[0][1] if self.marks else 0.0
        is_new = self.since is None or now - self.since < BURST_MEMORY_S
        return max(seen, expected) if is_new else seen


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
        """Return what is left of the backlog after so many seconds, in seconds of one replica's work; 0 while the
        capacity is unknown.
        """
        if self.capacity is None:
            return 0.0
        spare = max(0.0, self.num_replicas - self._by_new_demand)
        return max(0.0, self.backlog / self.capacity - spare * seconds)

    def by_backlog(self, spec: AutoscalingSpec) -> float:
        """Replicas that the demand and what is left of the backlog need; 0 if nothing is left."""
        left = self.left(spec.startup_s)
        return self._by_new_demand + left / spec.drain_s if left else 0.0

    def wait_s(self, spec: AutoscalingSpec) -> float:
        """Return how long a first token may wait in a burst: `wait_slo_s`, or a prompt's time where that is longer."""
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


@dataclass(frozen=True, slots=True)
class ScalingState:
    """The state that is remembered between two decisions.

    direction   in which demand has asked for a change since `since`
    since       time
    most        the largest number of replicas that demand has asked for since then
    changed_at  time of the last change of the target
    idle_since  time at or before which the base was last asked; None: it is asked, or a replica is silent
    """

    direction: Direction = "none"
    since: float = 0.0
    most: int = 0
    changed_at: float | None = None
    bursts: Bursts = field(default_factory=Bursts)
    idle_since: float | None = None

    def changed(self, now: float) -> ScalingState:
        """The target changes now."""
        return replace(self.settled(), changed_at=now)

    def settled(self) -> ScalingState:
        """Demand asks for no change."""
        return replace(self, direction="none", since=0.0, most=0)

    def asked(self, direction: Direction, number: int, now: float) -> ScalingState:
        """Demand asks for that number of replicas, which is a change in that direction."""
        if self.direction != direction:
            return replace(self, direction=direction, since=now, most=number)
        return replace(self, most=max(self.most, number))


class Decision(NamedTuple):
    """`cause` is the load that decides; `reason` explains it with numbers, for people."""

    target: int
    cause: Cause
    reason: str
    state: ScalingState


def decide(
    observations: Sequence[Observation | None], spec: AutoscalingSpec, state: ScalingState, *, target: int, now: float
) -> Decision:
    """Return the target that follows `target`; both are at least one. `observations`: one per running replica, None if
    nothing is known of it.

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
        return Decision(target, "no statistics", reason, state.settled())
    load = total(known, spec.window_s)
    if spec.wait_slo_s is not None:
        state = replace(state, bursts=state.bursts.noted(load.burst, now))
        expected = _BURST_FACTOR * load.tokens * burst_s(spec)
        load = replace(load, burst=state.bursts.largest(expected, now))
    num_silent = len(observations) - len(known)
    silent = f"; {num_silent} of {len(observations)} replicas are silent, so none goes" if num_silent else ""
    cause, reason = explain(load, spec)
    reason += silent
    more = load.replicas(spec, spec.target_utilization)
    if more > target:
        state = state.asked("up", more, now)
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
        state = state.asked("down", fewer, now)
        if now - state.since + _EPS >= spec.downscale_delay_s:
            # `target` may be lower by now: others can change it too.
            return Decision(min(state.most, target), cause, reason, state.changed(now))
        return Decision(target, cause, reason, state)
    return Decision(target, cause, reason, state.settled())


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
    k, b = whole(load.by_backlog(spec)), whole(load.by_burst(spec))
    backlog = (
        f"backlog of {load.backlog:.0f} tokens needs {_replicas(k)} ({load.left(spec.startup_s):.0f} s of one "
        f"replica's work are left when another has started, to be done in {spec.drain_s:g} s)"
    )
    bursts = (
        f"bursts need {_replicas(b)} ({load.burst:.0f} tokens within the {burst_s(spec):g} s of a start, for which "
        f"first tokens may wait {load.wait_s(spec):.1f} s)"
    )
    others: tuple[tuple[Cause, int, str], ...] = (("backlog", k, backlog), ("bursts", b, bursts))
    for name, number, sentence in others:
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


def _is_settled(known: Sequence[Observation], spec: AutoscalingSpec, state: ScalingState, now: float) -> bool:
    """Return whether a whole window has passed since the last change.

    By then the remaining replicas have measured the demand that a removed replica had.
    """
    since = float("inf") if state.changed_at is None else now - state.changed_at
    return min(since, max(o.age_s for o in known)) >= spec.window_s


def _replicas(number: int) -> str:
    return f"{number} replica{'s' if number != 1 else ''}"


def decide_from_zero(
    observations: Sequence[Observation | None],
    spec: AutoscalingSpec,
    state: ScalingState,
    *,
    target: int,
    num_queued: float,
    now: float,
) -> Decision:
    """Decide as `decide` does, for a deployment that may have no replica. To zero it goes from one replica alone.

    `num_queued`: requests that wait at gateways for a replica. While a replica is silent the number does not go to
    zero, since nothing is known of its requests.
    """
    if target == 0:
        return Decision(0, "idle", "no request; the next one starts a replica", ScalingState())
    known = [o for o in observations if o is not None]
    idle_since = None
    is_asked = num_queued > 0 or any(o.tokens > 0 or o.occupied_s > 0 or o.backlog > 0 for o in known)
    if known and len(known) == len(observations) and not is_asked:
        # Nothing in the windows: none came for so long. The youngest replica says nothing of the time before it.
        idle_since = now - min(spec.window_s, *(o.age_s for o in known))
        idle_since = idle_since if state.idle_since is None else min(state.idle_since, idle_since)
    if spec.min_replicas == 0 and idle_since is not None and now - idle_since >= spec.downscale_to_zero_delay_s:
        reason = f"no request for {now - idle_since:.0f} s; the next one starts a replica"
        return Decision(min(1, target - 1), "idle", reason, ScalingState(changed_at=now, idle_since=idle_since))
    return decide(observations, spec, replace(state, idle_since=idle_since), target=target, now=now)
