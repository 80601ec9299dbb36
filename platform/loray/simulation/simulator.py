"""`Simulator` runs one policy over the requests, event by event; `summary` and `course` say what came of it."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np

from loray.errors import SpecError
from loray.simulation.cluster import Clock, Cluster, Ended, Member, Router, SimulatedRequest
from loray.simulation.profile import Profile
from loray.simulation.scalers import Scaler
from loray.simulation.workload import Floats, Ints, RequestTrace

_DECIDE_S = 2.0  # between two looks at the number of replicas: as often as they report
_AT_ONCE = 1 << 14  # requests, of which objects of Python are made
_Event = tuple[float, int, Callable[[float], None]]  # at, number, what happens then


@dataclass(frozen=True)
class Policy:
    """A router and a scaler. `foresees`: adapters are on the host before requests come, and replicas start early."""

    name: str
    router: Router
    scaler: Scaler
    foresees: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of R requests under one policy.

    ttft_R         seconds from arrival to first token; end_R from arrival to last
    slot_R         the replica's slot
    num_warming    the first so many came in the warm-up
    num_known_R    tokens of its prompt that were in the replica's pool
    cold_loads     loads from the store for which requests waited, since the warm-up
    evictions      of adapters from pools, since then
    replica_hours  from the decision to start each replica until it had ended, since then and up to the last arrival
    replicas       (seconds, replicas that take requests, start or end) at each decision
    loads          (seconds, cold loads so far) at each decision
    """

    policy: str
    ttft_R: Floats
    end_R: Floats
    slot_R: Ints
    num_known_R: Ints
    num_warming: int
    cold_loads: int
    evictions: int
    replica_hours: float
    replicas: list[tuple[float, int]]
    loads: list[tuple[float, int]]


class Simulator:
    """One run. Events of equal times come in the order in which they were made.

    What replicas do, loads, and the requests' way to the router are work, whose events have times of the clock's work.
    Arrivals, decisions and starts come at their seconds, and these are what policies and results are given.

    warm_up  seconds whose loads, evictions and replicas are not counted
    seed     of what each request takes beside its steps, and of the factor of its prompt
    """

    def __init__(
        self,
        requests: RequestTrace,
        profile: Profile,
        policy: Policy,
        *,
        initial: int,
        size: int,
        warm_up: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._requests, self._profile, self._policy = requests, profile, policy
        self._num_warming = int(np.searchsorted(requests.at_R, warm_up))
        self._outside_R = np.random.default_rng(seed).choice(np.array(profile.outside_s), len(requests))
        self._factor_R = np.random.default_rng((seed, 1)).choice(np.array(profile.prompt_factors), len(requests))
        self._sizes = adapter_sizes(profile, requests.num_adapters)
        self._clock = Clock(profile.contention, profile.processors or math.inf)
        self.cluster = Cluster(profile, self._sizes, policy.router, size, self._clock)
        self._work: list[_Event] = []
        self._timed: list[_Event] = []
        self._num_events = 0
        self._turns: Counter[int] = Counter()  # that have come, by conversation
        self._is_deciding = True  # until the last request has come
        self._waiting: dict[tuple[Member, int], list[SimulatedRequest]] = {}  # for the load of an adapter
        # One number at a time is written, which arrays of NumPy are slow at.
        self._ttft_R = array("d", [math.nan]) * len(requests)
        self._end_R = array("d", [math.nan]) * len(requests)
        self._slot_R = array("q", [0]) * len(requests)
        self._num_known_R = array("q", [0]) * len(requests)
        self._replicas: list[tuple[float, int]] = []
        self._loads: list[tuple[float, int]] = []
        for _ in range(initial):
            member = self.cluster.start(0.0)
            assert member is not None
            self.cluster.admit(member)

    def run(self, progress: Callable[[float], None] | None = None) -> Outcome:
        """Run once. `progress` is told the share of the requests that have come."""
        requests = self._requests
        before, hours_before = (0, 0), 0.0
        self._push(self._timed, 0.0, self._decide)
        for start in range(0, len(requests), _AT_ONCE):
            if progress is not None:
                progress(start / len(requests))
            for job, wait in self._jobs(start):
                self._pass(job.came_at)
                if job.index and job.index == self._num_warming:
                    before, hours_before = self.cluster.totals(), self.cluster.hours(job.came_at)
                self._arrive(job, wait)
        hours, (_, evictions) = self.cluster.hours(requests.seconds) - hours_before, self.cluster.totals()
        self._is_deciding = False
        self._pass(math.inf)
        loads, _ = self.cluster.totals()
        return Outcome(
            self._policy.name,
            np.array(self._ttft_R),
            np.array(self._end_R),
            np.array(self._slot_R),
            np.array(self._num_known_R),
            self._num_warming,
            loads - before[0],
            evictions - before[1],
            hours,
            self._replicas,
            self._loads,
        )

    # -- private ------------------------------------------------------------------------------------------------------

    def _push(self, events: list[_Event], at: float, happen: Callable[[float], None]) -> None:
        self._num_events += 1
        heappush(events, (at, self._num_events, happen))

    def _jobs(self, start: int) -> Iterator[tuple[SimulatedRequest, float]]:
        """The next requests, each with its seconds until the router chooses."""
        part, requests = slice(start, start + _AT_ONCE), self._requests
        asked = (requests.prompt_R, requests.output_R, requests.adapter_R)
        columns = (requests.at_R, *asked, self._factor_R, *self._outside_R.T)
        rows = zip(*(column[part].tolist() for column in columns), strict=True)
        talks = None if requests.talk_R is None else requests.talk_R[part].tolist()
        for index, (at, prompt, output, adapter, factor, wait, way, stall) in enumerate(rows, start):
            job = SimulatedRequest(index, prompt, output, adapter, factor, stall, came_at=at, way=way)
            if talks is not None:
                job.talk = talks[index - start]
                self._turns[job.talk] += 1
                job.num_turn = self._turns[job.talk]
            yield job, wait

    def _pass(self, until: float) -> None:
        """All events up to that time in seconds."""
        work, timed, seconds = self._work, self._timed, self._clock.seconds
        while work or timed:
            at = seconds(work[0][0]) if work else math.inf
            if timed and timed[0][0] <= at and (not work or timed[0][:2] < (at, work[0][1])):
                events, at = timed, timed[0][0]
            else:
                events = work
            if at > until:
                return
            at, _, happen = heappop(events)
            happen(at)

    def _arrive(self, job: SimulatedRequest, wait: float) -> None:
        now = self._clock.work(job.came_at)
        if wait:
            self._clock.joined(1, now)
            self._push(self._work, now + wait, partial(self._leave_gateway, job))
        else:
            self._route(job, now)

    def _leave_gateway(self, job: SimulatedRequest, now: float) -> None:
        self._clock.joined(-1, now)
        self._route(job, now)

    def _route(self, job: SimulatedRequest, now: float) -> None:
        seconds = self._clock.seconds(now)
        slot = self._policy.router.choose(job, seconds)
        member = self.cluster.members[slot]
        replica = member.replica
        self._clock.joined(not replica.num_jobs, now)
        replica.num_jobs += 1
        self._slot_R[job.index] = slot
        self._tell_load(member)
        self._policy.scaler.arrived(member, job, seconds)
        if job.way:
            self._push(self._work, now + job.way, partial(self._handed, member, job))
        else:
            self._handed(member, job, now)

    def _handed(self, member: Member, job: SimulatedRequest, now: float) -> None:
        replica = member.replica
        if self._policy.foresees:
            replica.adapters.prefetch(job.adapter)
        is_ready, loads = replica.adapters.add_waiter(job.adapter)
        if is_ready:
            self._begin(member, [job], now)
            return
        self._waiting.setdefault((member, job.adapter), []).append(job)
        if loads:
            self._load(member, job.adapter, now)

    def _load(self, member: Member, adapter: int, now: float) -> None:
        ends = now + self._profile.load_seconds(self._sizes[adapter])
        self._push(self._work, ends, partial(self._end_load, member, adapter))

    def _end_load(self, member: Member, adapter: int, now: float) -> None:
        following = member.replica.adapters.loaded(adapter)
        if following is not None:
            self._load(member, following, now)
        self._begin(member, self._waiting.pop((member, adapter), []), now)

    def _begin(self, member: Member, jobs: list[SimulatedRequest], now: float) -> None:
        replica = member.replica
        ended = replica.advance(now)
        for job in jobs:
            replica.ready(job)
        self._took(member, ended)

    def _advance(self, member: Member, now: float) -> None:
        if member.replica.next_event == now:  # it may have changed since
            self._took(member, member.replica.advance(now))

    def _took(self, member: Member, ended: Ended) -> None:
        """The replica has been advanced."""
        replica, now = member.replica, member.replica.now
        seconds = self._clock.seconds
        for job in ended.first_tokens:
            self._num_known_R[job.index] = job.num_known
            self._ttft_R[job.index] = seconds(job.first_token_at) - job.came_at
            self._policy.scaler.answered(member, job, seconds(now))
            self._policy.router.answered(member.slot, job)
        for job in ended.finished:
            assert math.isnan(self._end_R[job.index]), "it has ended before"
            self._end_R[job.index] = seconds(max(now, job.first_token_at)) - job.came_at
            self._policy.scaler.finished(member, job, seconds(now))
        if ended.finished:
            self._clock.joined(-(not replica.num_jobs), now)
            if member in self.cluster.ending:
                self.cluster.end_if_idle(member, seconds(now))
            elif late := self._profile.end_known_s:
                member.num_unknown += len(ended.finished)
                self._push(self._work, now + late, partial(self._hear_ends, member, len(ended.finished)))
            else:
                self._tell_load(member)
        if replica.next_event < math.inf:
            self._push(self._work, max(now, replica.next_event), partial(self._advance, member))

    def _hear_ends(self, member: Member, num: int, now: float) -> None:
        member.num_unknown -= num
        self._tell_load(member)

    def _tell_load(self, member: Member) -> None:
        if self.cluster.members.get(member.slot) is member:
            self._policy.router.load_changed(member.slot, member.replica.num_jobs + member.num_unknown)

    def _decide(self, now: float) -> None:
        if not self._is_deciding:
            return
        cluster = self.cluster
        target = self._policy.scaler.target(cluster, now)
        num = len(cluster.members) + len(cluster.starting)
        for _ in range(num, min(target, cluster.size)):
            lead = self._profile.start_s if self._policy.foresees else 0.0
            member = cluster.start(now - lead)
            if member is None:
                break
            if self._policy.foresees:
                cluster.admit(member)
            else:
                self._push(self._timed, now + self._profile.start_s, partial(self._admit, member))
        for _ in range(max(1, target), num):
            if len(cluster.members) > 1 or cluster.starting:
                cluster.stop_one(now)
        self._replicas.append((now, len(cluster.paid)))
        self._loads.append((now, cluster.totals()[0]))
        self._push(self._timed, now + _DECIDE_S, self._decide)

    def _admit(self, member: Member, now: float) -> None:
        self.cluster.admit(member)


def adapter_sizes(profile: Profile, num_adapters: int) -> list[int]:
    """Return the bytes of each adapter: the profile's sizes in turn."""
    return [profile.adapter_bytes[a % len(profile.adapter_bytes)] for a in range(num_adapters)]


class Summary(NamedTuple):
    """Figures of one policy over one run or several, without the warm-up. Times in seconds, without probes; means over
    the runs where they are quantiles.

    prefix_hits   share of the prompts' tokens that were in the replica's pool
    max_replicas  the most at a time, of those there when the first of these requests came and later
    tokens_per_s  generated, from the first arrival to the last token
    """

    p50_ttft_s: float
    p99_ttft_s: float
    mean_ttft_s: float
    mean_latency_s: float
    cold_loads: float
    cold_share: float
    prefix_hits: float
    evictions: float
    replica_hours: float
    max_replicas: float
    tokens_per_s: float

    def to_json(self) -> dict[str, Any]:
        return {name: round(value, 6) for name, value in self._asdict().items()}


def summary(outcome: Outcome, requests: RequestTrace) -> Summary:
    counted = slice(outcome.num_warming, None)
    ttft_R, end_R = outcome.ttft_R[counted], outcome.end_R[counted]
    at_R, output_R = requests.at_R[counted], requests.output_R[counted]
    timed_R = np.ones(len(ttft_R), bool) if requests.probe_R is None else ~requests.probe_R[counted]
    if not timed_R.any():
        raise SpecError("all requests after the warm-up are probes")
    p50, p99 = np.quantile(ttft_R[timed_R], (0.5, 0.99))
    times = [at for at, _ in outcome.replicas]
    first = max(0, bisect_right(times, at_R[0]) - 1) if outcome.num_warming else 0
    return Summary(
        p50_ttft_s=float(p50),
        p99_ttft_s=float(p99),
        mean_ttft_s=float(ttft_R[timed_R].mean()),
        mean_latency_s=float(end_R[timed_R].mean()),
        cold_loads=outcome.cold_loads,
        cold_share=outcome.cold_loads / len(ttft_R),
        prefix_hits=float(outcome.num_known_R[counted].sum() / requests.prompt_R[counted].sum()),
        evictions=outcome.evictions,
        replica_hours=outcome.replica_hours,
        max_replicas=max((number for _, number in outcome.replicas[first:]), default=0),
        tokens_per_s=float(output_R.sum() / ((at_R + end_R).max() - at_R[0])),
    )


def mean(summaries: Sequence[Summary]) -> Summary:
    return Summary(*(sum(column) / len(summaries) for column in zip(*summaries, strict=True)))


class Course(NamedTuple):
    """Figures of one policy by time: `at_B` are the ends of B equal parts of the run, in seconds.

    p50_B, p99_B   seconds to the first token, of the requests that came in the part; NaN without one
    loads_B        cold loads in the part
    replicas_B     replicas at its end
    """

    policy: str
    at_B: Floats
    p50_B: Floats
    p99_B: Floats
    loads_B: Floats
    replicas_B: Floats


def course(outcome: Outcome, requests: RequestTrace, num_parts: int = 60) -> Course:
    edges = np.linspace(0.0, requests.seconds, num_parts + 1)
    part_R = np.clip(np.searchsorted(edges, requests.at_R, side="right") - 1, 0, num_parts - 1)
    starts = np.searchsorted(part_R, np.arange(num_parts + 1))
    quantiles = np.full((2, num_parts), np.nan)
    for part in range(num_parts):
        ttft = outcome.ttft_R[starts[part] : starts[part + 1]]
        if len(ttft):
            quantiles[:, part] = np.quantile(ttft, (0.5, 0.99))
    times, replicas = np.array(outcome.replicas).T
    loads = np.interp(edges, *np.array(outcome.loads, float).T)
    at = np.clip(np.searchsorted(times, edges[1:], side="right") - 1, 0, None)
    return Course(outcome.policy, edges[1:], quantiles[0], quantiles[1], np.diff(loads), replicas[at])
