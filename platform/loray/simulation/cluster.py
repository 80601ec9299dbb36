"""Simulated replicas, their adapters and their clock."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

from loray.engine.memory.eviction import EvictionPolicy, EvictionScore, PriorityQueue, Reuse
from loray.engine.scheduling.fairness import OUTPUT_WEIGHT
from loray.engine.scheduling.step_budget import ALONE, MIN_SHARE
from loray.policy.demand import TrackedRequest
from loray.simulation.profile import Profile

POOL, HOST, NOWHERE = 0, 1, 2


class Slowdown(NamedTuple):
    """Work takes `shared` + contention · `beside` times as long as alone."""

    shared: float
    beside: float

    @classmethod
    def of(cls, num: int, processors: float) -> Slowdown:
        """Return the slowdown of `num` at work. As long as each has a processor, it makes every other slower by the
        contention; more of them have equal parts of the processors.
        """
        num = max(1, num)
        shared = max(1.0, num / processors)
        return cls(shared, (min(num, processors) - 1) * shared)


class Clock:
    """The time of all that are at work, which become slower by the same factor, see `Slowdown`. So all work has one
    time of its own: what takes s seconds alone ends s seconds of work later, whatever comes and goes meanwhile. Without
    contention, and with a processor for each, both times are equal.
    """

    def __init__(self, contention: float = 0.0, processors: float = math.inf) -> None:
        self._contention, self._processors = contention, processors
        self._is_shared = contention > 0 or processors < math.inf
        self._factor, self._offset = 1.0, 0.0
        self._crowd = 0

    def seconds(self, work: float) -> float:
        """Return when that time of work comes, if the crowd stays as it is."""
        return work * self._factor + self._offset

    def work(self, seconds: float) -> float:
        """The time of work at a time that is not before the last change of the crowd."""
        return (seconds - self._offset) / self._factor

    def joined(self, num: int, work: float) -> None:
        """So many more work from that time of work on; fewer where it is negative."""
        if not num or not self._is_shared:
            return
        self._crowd += num
        slowdown = Slowdown.of(self._crowd, self._processors)
        factor = slowdown.shared + self._contention * slowdown.beside
        self._offset = self.seconds(work) - work * factor
        self._factor = factor


class ReplicaAdapters:
    """One replica's pool and host. The pool is shared with the KV cache: see `take`.

    Loads are in order, `profile.num_loads` at once; the caller says when one has ended.
    """

    def __init__(self, replica: int, profile: Profile, sizes: list[int], router: Router) -> None:
        self._replica, self._profile, self._sizes, self._router = replica, profile, sizes, router
        self._eviction = EvictionPolicy()
        self._scores: dict[int, EvictionScore] = {}  # of those in the pool
        self._pins: dict[int, int] = {}  # of those in the pool
        self._idle: PriorityQueue[int] = PriorityQueue()  # adapters; of a conversation what follows -1, negative
        self._said: dict[int, int] = {}  # tokens, by conversation, of those whose prefix is in the pool and idle
        self._reuse = Reuse()
        self._host: OrderedDict[int, None] = OrderedDict()
        self._host_used = 0
        self._uses = 0
        self.free = profile.pool_bytes
        self.waiting: dict[int, int] = {}  # adapter → requests that wait for its load; it is loading or queued
        self._queued: deque[int] = deque()
        self._num_loading = 0
        self.num_loads = self.num_evictions = 0

    def tier(self, adapter: int) -> int:
        return POOL if adapter in self._pins else HOST if adapter in self._host else NOWHERE

    def add_waiter(self, adapter: int) -> tuple[bool, bool]:
        """A request comes: whether it may start now, and whether a load of its adapter begins now."""
        if adapter in self._host:
            self._host.move_to_end(adapter)
        if self.tier(adapter) != NOWHERE:
            return True, False
        if adapter in self.waiting:
            self.waiting[adapter] += 1
            return False, False
        self.waiting[adapter] = 1
        self.num_loads += 1
        if self._num_loading < self._profile.num_loads:
            self._num_loading += 1
            return False, True
        self._queued.append(adapter)
        return False, False

    def loaded(self, adapter: int) -> int | None:
        """The load has ended; returns an adapter whose load begins in its place."""
        del self.waiting[adapter]
        self._add(adapter)
        if self._queued:
            return self._queued.popleft()
        self._num_loading -= 1
        return None

    def _add(self, adapter: int) -> None:
        """Add the adapter to the host, from which the least recently used leave."""
        self._host[adapter] = None
        self._host_used += self._sizes[adapter]
        self._router.placed(self._replica, adapter, HOST)
        while self._host_used > self._profile.host_bytes and len(self._host) > 1:
            oldest, _ = self._host.popitem(last=False)
            self._host_used -= self._sizes[oldest]
            if oldest not in self._pins:
                self._router.placed(self._replica, oldest, NOWHERE)
            elif not self._pins[oldest]:
                self._set_idle(oldest)  # to have it again would take a load now

    def prefetch(self, adapter: int) -> None:
        """Put the adapter on the host, without a load that anybody waited for."""
        if self.tier(adapter) == NOWHERE and adapter not in self.waiting:
            self._add(adapter)

    def take(self, adapter: int, kv_bytes: float) -> float | None:
        """Pin the adapter and take `kv_bytes` of the pool, evicting idle adapters; the seconds of copying it there.

        None if pinned adapters and KV caches leave no room; nothing is changed then.
        """
        pins = self._pins.get(adapter)
        needed = kv_bytes + (0 if pins is not None else self._sizes[adapter])
        if pins == 0:
            self._idle.discard(adapter)
        while self.free < needed:
            least = self._idle.peek()
            if least is None:
                if pins == 0:
                    self._release(adapter)
                return None
            self._evict(least[1], least[0][0])
        self.free -= needed
        self._uses += 1
        if pins is not None:
            self._pins[adapter] = pins + 1
            self._eviction.used(self._scores[adapter])
            return 0.0
        seconds = self._profile.place_seconds(self._sizes[adapter])
        self._pins[adapter] = 1
        score = self._scores[adapter] = EvictionScore(load_seconds=self._profile.load_seconds(self._sizes[adapter]))
        self._eviction.placed(score, seconds)
        self._eviction.used(score)
        self._router.placed(self._replica, adapter, POOL)
        return seconds

    def take_said(self, talk: int) -> int:
        """Give up what the pool has of a conversation, which is the request's now; its tokens."""
        num_tokens = self._said.pop(talk, 0)
        if num_tokens:
            self._idle.discard(-1 - talk)
            self.free += num_tokens * self._profile.kv_token_bytes
            self._router.said(self._replica, talk, 0)
        return num_tokens

    def keep_said(self, talk: int, num_tokens: int, uses: int) -> None:
        """Keep the prefix of a conversation in what is free of the pool, until its room is needed. `uses`: turns that
        it had; 0: it is put back.
        """
        nbytes = num_tokens * self._profile.kv_token_bytes
        if not num_tokens or nbytes > self.free:
            return
        self.take_said(talk)
        self.free -= nbytes
        self._uses += 1
        self._said[talk] = num_tokens
        self._reuse.used(uses)
        seconds = self._reuse.expected(uses) * self._profile.prompt_seconds(num_tokens)
        self._idle.set(-1 - talk, (self._eviction.inflation.value + seconds / nbytes, self._uses))
        self._router.said(self._replica, talk, num_tokens)

    def give_back(self, adapter: int, kv_bytes: float) -> None:
        """A request that ran with the adapter has ended."""
        self.free += kv_bytes
        self._pins[adapter] -= 1
        if not self._pins[adapter]:
            self._release(adapter)

    def _release(self, adapter: int) -> None:
        self._eviction.released(self._scores[adapter])
        self._set_idle(adapter)

    def _set_idle(self, adapter: int) -> None:
        score = self._scores[adapter]
        value = self._eviction.value(score, self._sizes[adapter], on_host=adapter in self._host)
        self._idle.set(adapter, (value, self._uses))

    def _evict(self, adapter: int, value: float) -> None:
        self._eviction.inflation.evicted(value)
        self._idle.discard(adapter)
        if adapter < 0:
            self.take_said(-1 - adapter)
            return
        del self._pins[adapter], self._scores[adapter]
        self.free += self._sizes[adapter]
        self.num_evictions += 1
        self._router.placed(self._replica, adapter, HOST if adapter in self._host else NOWHERE)


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One request on a replica.

    factor      of what its prompt takes to compute
    stall       seconds in which the replica computes nothing before it
    came_at     its arrival, in seconds
    way         seconds to its replica
    rest        seconds of computing what is left of its prompt
    token_rate  tokens of its prompt in such a second
    talk        the conversation of which it is turn `num_turn`, from 1 on; None: of none
    num_known   tokens of its prompt that were in the pool; num_expected: that the router expected there
    tracked     of the meter of demand, if there is one
    """

    index: int
    num_prompt: int
    num_output: int
    adapter: int
    factor: float = 1.0
    stall: float = 0.0
    came_at: float = 0.0
    way: float = 0.0
    rest: float = 0.0
    kv_bytes: float = 0.0
    token_rate: float = 0.0
    first_token_at: float = math.inf
    talk: int | None = None
    num_turn: int = 1
    num_known: int = 0
    num_expected: int = 0
    tracked: TrackedRequest | None = None


class Ended(NamedTuple):
    """The requests to which something has happened by the time of an `advance`."""

    first_tokens: Sequence[SimulatedRequest]
    finished: Sequence[SimulatedRequest]


_NOTHING = Ended((), ())


class Replica:
    """One replica. `ready` and `advance` change it; then `next_event` is the time at which `advance` is to be called
    next. Its times are those of the clock's work.

    A step has the length that the engine's budget gives it (`engine.scheduling.step_budget`): with requests that
    decode, the target between two tokens, but at least a quarter of that for prompts; without, four times the target.
    What steps begin and end between events is not followed; so an event costs O(log requests), however many steps pass.

    Of the prompts the one with the smallest virtual finish is computed, as the engine's fair queue does for one tenant:
    the service that the replica had given when the request came, plus the prompt's tokens.
    """

    def __init__(self, profile: Profile, adapters: ReplicaAdapters, clock: Clock, now: float) -> None:
        self._profile, self.adapters, self._clock = profile, adapters, clock
        self._step_s, self._each_s = profile.step_s, profile.decode_s + profile.adapter_s
        self._target_s = profile.itl_slo_s
        self.now = now
        self._decoded = 0.0  # tokens of a request that has decoded since the start
        self._decoding: list[tuple[float, int, SimulatedRequest]] = []  # by the value of `_decoded` at which they end
        # By virtual finish; their adapters are on the host at least.
        self._waiting: list[tuple[float, int, SimulatedRequest]] = []
        self._begun: list[tuple[float, int, SimulatedRequest]] = []  # prompts that are partly computed
        self._stuck = False  # the first of `_waiting` found no place or no room, and nothing has ended since
        self._prompt_rate = self._decode_rate = 0.0
        self._step = 0.0  # seconds, while a prompt is computed
        self._prompt_tokens = self._output_tokens = 0.0
        self.num_jobs = 0  # all that have come and not ended
        self.next_event = math.inf

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._begun)

    def num_tokens(self, seconds: float) -> float:
        """Computed since the start, by that time in seconds, which is not after `next_event`."""
        rate = self._decode_rate * len(self._decoding)
        if self._begun:
            rate += self._prompt_rate * self._begun[0][2].token_rate
        return self._prompt_tokens + self._output_tokens + rate * (self._clock.work(seconds) - self.now)

    @property
    def kv_bytes(self) -> float:
        return sum(job.kv_bytes for queue in (self._decoding, self._begun) for _, _, job in queue)

    def ready(self, job: SimulatedRequest) -> None:
        """Its adapter is on the host or in the pool; the replica has been advanced to now."""
        finish = self._prompt_tokens + OUTPUT_WEIGHT * self._output_tokens + job.num_prompt
        job.rest = job.stall + job.factor * self._profile.prompt_seconds(job.num_prompt)
        job.token_rate = job.num_prompt / job.rest
        heappush(self._waiting, (finish, job.index, job))
        self._plan(started=not self._begun)

    def advance(self, now: float) -> Ended:
        """Let the time pass until `now`, which is at most `next_event`."""
        seconds = now - self.now
        self.now = now
        begun, decoding = self._begun, self._decoding
        if seconds > 0:
            tokens = seconds * self._decode_rate
            self._decoded += tokens
            self._output_tokens += tokens * len(decoding)
            if begun and self._prompt_rate:
                job = begun[0][2]
                done = seconds * self._prompt_rate
                if done > job.rest:
                    done = job.rest
                self._prompt_tokens += done * job.token_rate
                job.rest -= done
        answers = begun and begun[0][2].rest <= 1e-9
        if not answers and not (decoding and decoding[0][0] <= self._decoded + 1e-6):
            self._set_next_event()
            return _NOTHING
        first_tokens: list[SimulatedRequest] = []
        finished: list[SimulatedRequest] = []
        if answers:
            job = heappop(begun)[2]
            # A step that other prompts share goes on after the last token of this one.
            job.first_token_at = now + (0.5 * self._step if begun or self._waiting else 0.0)
            self._output_tokens += 1
            first_tokens.append(job)
            heappush(decoding, (self._decoded + job.num_output - 1, job.index, job))
        while decoding and decoding[0][0] <= self._decoded + 1e-6:
            job = heappop(decoding)[2]
            self.adapters.give_back(job.adapter, job.kv_bytes)
            if job.talk is not None:
                self.adapters.keep_said(job.talk, job.num_prompt + job.num_output, job.num_turn)
            finished.append(job)
            self._stuck = False
        self.num_jobs -= len(finished)
        self._plan(started=False)
        return Ended(first_tokens, finished)

    # -- private ------------------------------------------------------------------------------------------------------

    def _plan(self, *, started: bool) -> None:
        """Choose the prompt that is computed, and set the rates. `started`: no prompt was computed until now."""
        begun, waiting = self._begun, self._waiting
        while waiting and not self._stuck and (not begun or waiting[0] < begun[0]) and self._admit(waiting[0][2]):
            heappush(begun, heappop(waiting))
        num_decoding = len(self._decoding)
        fixed = self._step_s + num_decoding * self._each_s
        if not begun:
            self._prompt_rate, self._decode_rate = 0.0, 1 / fixed if num_decoding else 0.0
        else:
            job = begun[0][2]
            target = self._target_s if num_decoding else ALONE * self._target_s
            room = max(target - fixed, MIN_SHARE * target)
            room = min(room, self._profile.max_num_batched_tokens / job.token_rate)
            self._step = fixed + room
            self._prompt_rate = room / self._step
            self._decode_rate = 1 / self._step if num_decoding else 0.0
            if started:
                # The step under way ends first, and one step has the fixed cost, however short the prompt.
                delay = fixed * (1 - min(1.0, job.rest / room)) + (0.5 * fixed if num_decoding else 0.0)
                job.rest += delay * self._prompt_rate
        self._set_next_event()

    def _set_next_event(self) -> None:
        at = math.inf
        if self._begun and self._prompt_rate:
            at = self.now + self._begun[0][2].rest / self._prompt_rate
        if self._decoding and self._decode_rate:
            left = self._decoding[0][0] - self._decoded
            ends = self.now + (left if left > 0.0 else 0.0) / self._decode_rate
            if ends < at:
                at = ends
        self.next_event = at

    def _admit(self, job: SimulatedRequest) -> bool:
        """Take a place in the batch and room in the pool; False if one of them is missing."""
        profile = self._profile
        # Blocks come as tokens are generated: in the mean half of the output's.
        kv_bytes = profile.kv_token_bytes * (job.num_prompt + 0.5 * job.num_output)
        seconds, said = None, 0
        if self.num_running < profile.max_num_seqs:
            if job.talk is not None:
                said = self.adapters.take_said(job.talk)
            seconds = self.adapters.take(job.adapter, kv_bytes)
        if seconds is None:
            if job.talk is not None:
                self.adapters.keep_said(job.talk, said, 0)
            self._stuck = True
            return False
        job.kv_bytes = kv_bytes
        if said:
            job.num_known = min(said, job.num_prompt - 1)
            job.rest -= job.factor * profile.prompt_seconds(job.num_known)
            job.token_rate = (job.num_prompt - job.num_known) / job.rest
        job.rest += seconds
        return True


class Router(Protocol):
    """Chooses replicas; and is told what it may know. Replicas are named by slots, which are used again."""

    def added(self, slot: int, name: str) -> None: ...
    def removed(self, slot: int) -> None: ...
    def placed(self, replica: int, adapter: int, tier: int) -> None: ...  # in POOL, on HOST or NOWHERE
    def said(self, replica: int, talk: int, num_tokens: int) -> None: ...  # of a conversation in its pool; 0: nothing
    def load_changed(self, slot: int, load: int) -> None: ...
    def choose(self, job: SimulatedRequest, now: float) -> int: ...
    def answered(self, slot: int, job: SimulatedRequest) -> None: ...  # its first token has come


@dataclass(slots=True, eq=False)
class Member:
    """One replica from its start until it has ended. `num_unknown`: requests of whose end the router does not know."""

    slot: int
    name: str
    replica: Replica
    started_at: float
    num_unknown: int = 0


class Cluster:
    """Owns the replicas. `size` of them at most take requests or start. Its times are in seconds."""

    def __init__(
        self, profile: Profile, sizes: list[int], router: Router, size: int, clock: Clock | None = None
    ) -> None:
        self._profile, self._sizes, self._router, self.size = profile, sizes, router, size
        self._clock = clock or Clock()
        # Those that end take a slot until they have ended.
        self._free = list(range(2 * size - 1, -1, -1))
        self.members: dict[int, Member] = {}  # by slot; they take requests
        self.starting: list[Member] = []
        self.ending: set[Member] = set()
        self._num_started = 0
        self._seconds = 0.0  # of those that have ended
        self.num_loads = self.num_evictions = 0  # of those that have ended

    def start(self, now: float) -> Member | None:
        """A replica that takes requests from `admit` on; None while too many are ending."""
        if not self._free:
            return None
        slot, name = self._free.pop(), f"replica-{self._num_started}"
        self._num_started += 1
        adapters = ReplicaAdapters(slot, self._profile, self._sizes, self._router)
        member = Member(slot, name, Replica(self._profile, adapters, self._clock, self._clock.work(now)), now)
        self.starting.append(member)
        return member

    def admit(self, member: Member) -> None:
        if member in self.starting:  # it may have been stopped meanwhile
            self.starting.remove(member)
            self.members[member.slot] = member
            self._router.added(member.slot, member.name)

    def stop_one(self, now: float) -> None:
        """The youngest takes no more requests, and ends with its last one."""
        if self.starting:
            self._end(self.starting.pop(), now)
            return
        slot = next(reversed(self.members))
        member = self.members.pop(slot)
        self._router.removed(slot)
        self.ending.add(member)
        self.end_if_idle(member, now)

    def end_if_idle(self, member: Member, now: float) -> None:
        if member in self.ending and not member.replica.num_jobs:
            self.ending.remove(member)
            self._end(member, now)

    def _end(self, member: Member, now: float) -> None:
        self._seconds += now - member.started_at
        self._free.append(member.slot)
        self.num_loads += member.replica.adapters.num_loads
        self.num_evictions += member.replica.adapters.num_evictions

    @property
    def paid(self) -> list[Member]:
        """The replicas that take requests, start or end."""
        return [*self.members.values(), *self.starting, *self.ending]

    def hours(self, now: float) -> float:
        """Return the hours of all replicas, from the decision to start each until it had ended."""
        return (self._seconds + sum(now - member.started_at for member in self.paid)) / 3600

    def totals(self) -> tuple[int, int]:
        """Return the loads and evictions of all replicas."""
        adapters = [member.replica.adapters for member in self.paid]
        return (
            self.num_loads + sum(of.num_loads for of in adapters),
            self.num_evictions + sum(of.num_evictions for of in adapters),
        )
