"""Scalers: how the policies that are compared choose the number of replicas."""

from __future__ import annotations

from collections import deque
from math import ceil

import numpy as np

from loray.policy.autoscaling import ScalingState, burst_s, decide
from loray.policy.demand import DemandMeter, EngineLoad, Observation
from loray.simulation.cluster import NOWHERE, Cluster, Member, ReplicaAdapters, SimulatedRequest
from loray.simulation.profile import Profile
from loray.simulation.workload import RequestTrace, digest
from loray.spec import AdapterBytes, AdapterRef, AutoscalingSpec


class Scaler:
    """Is asked every few seconds how many replicas there should be, and told of each request. This one keeps the number
    as it is; others override what they need.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def target(self, cluster: Cluster, now: float) -> int:
        return self._number

    def arrived(self, member: Member, job: SimulatedRequest, now: float) -> None:
        pass

    def answered(self, member: Member, job: SimulatedRequest, now: float) -> None:
        """The first token has come."""

    def finished(self, member: Member, job: SimulatedRequest, now: float) -> None:
        pass


class AdapterDemandScaler(Scaler):
    """Scales as loray does: with a `DemandMeter` on each replica, and `policy.autoscaling.decide`."""

    def __init__(self, spec: AutoscalingSpec, number: int, profile: Profile, sizes: list[int]) -> None:
        super().__init__(number)
        self._spec, self._profile = spec, profile
        self._state = ScalingState()
        self._refs = [
            AdapterRef(digest(adapter), f"adapter-{adapter}", 1, "lora", "0" * 64, 1 << 20, size)
            for adapter, size in enumerate(sizes)
        ]
        self._numbers = {ref.digest: adapter for adapter, ref in enumerate(self._refs)}
        self._bytes = {size: AdapterBytes(size) for size in sizes}
        self._meters: dict[Member, DemandMeter] = {}
        self.reasons: list[tuple[float, int, str]] = []  # of each change

    def target(self, cluster: Cluster, now: float) -> int:
        members = list(cluster.members.values())
        self._meters = {m: self._meter(m) for m in members}
        observations = [self.observe(member, now) for member in members]
        decision = decide(observations, self._spec, self._state, target=self._number, now=now)
        if decision.target != self._number:
            self.reasons.append((now, decision.target, decision.reason))
        self._number, self._state = decision.target, decision.state
        return self._number

    def observe(self, member: Member, now: float) -> Observation:
        """Return what the replica reports. As the engine does, it counts requests that wait for a load as waiting."""
        meter, replica = self._meters[member], member.replica
        loading = sum(replica.adapters.waiting.values())
        waiting = replica.num_jobs - replica.num_running
        meter.sample(
            EngineLoad(replica.num_running, waiting, loading, int(replica.num_tokens(now)), replica.kv_bytes), now
        )
        return meter.observe(now, _Loaded(replica.adapters, self._numbers))

    def arrived(self, member: Member, job: SimulatedRequest, now: float) -> None:
        meter = self._meters[member] = self._meter(member)
        # Clients ask for more tokens than they get.
        job.tracked = meter.arrived(job.num_prompt, 2 * job.num_output, self._refs[job.adapter], now)

    def answered(self, member: Member, job: SimulatedRequest, now: float) -> None:
        if job.tracked is not None:
            job.tracked.num_output_tokens = 1

    def finished(self, member: Member, job: SimulatedRequest, now: float) -> None:
        tracked = job.tracked
        meter = self._meters.get(member)
        if meter is not None and tracked is not None:
            tracked.num_output_tokens = job.num_output
            meter.finished(tracked, now)

    def _meter(self, member: Member) -> DemandMeter:
        meter = self._meters.get(member)
        return meter or DemandMeter(
            window_s=self._spec.window_s,
            max_num_seqs=self._profile.max_num_seqs,
            pool_bytes=self._profile.pool_bytes,
            adapter_bytes=lambda ref: self._bytes[ref.nbytes],
            now=member.started_at,
            burst_s=burst_s(self._spec),
        )


class _Loaded:
    """The adapters that are on a replica, by digest."""

    def __init__(self, adapters: ReplicaAdapters, numbers: dict[str, int]) -> None:
        self._adapters, self._numbers = adapters, numbers

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and self._adapters.tier(self._numbers[digest]) != NOWHERE


class OngoingRequests(Scaler):
    """Scales as Ray Serve does: by the mean requests under way over 30 s (its defaults, but the target)."""

    _LOOK_BACK_S, _UP_S, _DOWN_S = 30.0, 30.0, 600.0

    def __init__(self, number: int, most: int, each: float) -> None:
        super().__init__(number)
        self._most, self._each = most, each
        self._seen: deque[tuple[float, int]] = deque()
        self._direction, self._since = 0, 0.0

    def target(self, cluster: Cluster, now: float) -> int:
        self._seen.append((now, sum(m.replica.num_jobs for m in cluster.members.values())))
        while self._seen[0][0] <= now - self._LOOK_BACK_S:
            self._seen.popleft()
        mean = sum(n for _, n in self._seen) / len(self._seen)
        wanted = min(max(1, ceil(mean / self._each)), self._most)
        direction = (wanted > self._number) - (wanted < self._number)
        if direction != self._direction:
            self._direction, self._since = direction, now
        if direction and now - self._since >= (self._UP_S if direction > 0 else self._DOWN_S):
            self._number, self._direction = wanted, 0
        return self._number


class OracleScaler(Scaler):
    """Knows all arrivals and lengths: it runs what the busiest ten seconds of the coming minute need."""

    _SPAN_S, _AHEAD = 10.0, 6

    def __init__(self, requests: RequestTrace, profile: Profile, utilization: float, most: int) -> None:
        work_R = profile.work_seconds(requests.prompt_R, requests.output_R)
        spans = np.bincount((requests.at_R / self._SPAN_S).astype(int), work_R, minlength=1)
        rates = spans / self._SPAN_S / utilization
        coming = [float(rates[i : i + self._AHEAD].max()) for i in range(len(rates))]
        self._numbers: list[int] = [min(max(1, ceil(rate)), most) for rate in coming]
        super().__init__(self._numbers[0])

    def target(self, cluster: Cluster, now: float) -> int:
        return self._numbers[min(int(now / self._SPAN_S), len(self._numbers) - 1)]
