"""The replicas of a simulated deployment: which take requests, which start or end, and what they cost."""

from __future__ import annotations

from typing import Protocol

from loray.simulation.clock import Clock
from loray.simulation.profile import Profile
from loray.simulation.replica import Job, Replica
from loray.simulation.residency import ReplicaAdapters


class Router(Protocol):
    """Chooses replicas; and is told what it may know. Replicas are named by slots, which are used again."""

    def added(self, slot: int, name: str) -> None: ...
    def removed(self, slot: int) -> None: ...
    def placed(self, replica: int, adapter: int, tier: int) -> None: ...
    def load_changed(self, slot: int, load: int) -> None: ...
    def choose(self, job: Job, now: float) -> int: ...
    def answered(self, slot: int, job: Job) -> None: ...  # its first token has come


class Member:
    """One replica from its start until it has ended. `num_unknown`: requests of whose end the router does not know."""

    __slots__ = ("ended_at", "name", "num_unknown", "replica", "slot", "started_at")

    def __init__(self, slot: int, name: str, replica: Replica, started_at: float) -> None:
        self.slot, self.name, self.replica, self.started_at = slot, name, replica, started_at
        self.ended_at: float | None = None
        self.num_unknown = 0


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
        member.ended_at = now
        self._seconds += now - member.started_at
        self._count(member)
        self._free.append(member.slot)

    def _count(self, member: Member) -> None:
        self.num_loads += member.replica.adapters.num_loads
        self.num_evictions += member.replica.adapters.num_evictions

    @property
    def num_paid(self) -> int:
        return len(self.members) + len(self.starting) + len(self.ending)

    def hours(self, now: float) -> float:
        """Of all replicas, from the decision to start each until it had ended."""
        alive = [*self.members.values(), *self.starting, *self.ending]
        return (self._seconds + sum(now - m.started_at for m in alive)) / 3600

    def totals(self) -> tuple[int, int]:
        """Loads and evictions of all replicas."""
        alive = [*self.members.values(), *self.starting, *self.ending]
        return (
            self.num_loads + sum(m.replica.adapters.num_loads for m in alive),
            self.num_evictions + sum(m.replica.adapters.num_evictions for m in alive),
        )
