"""The waiting queue and its limits.

Requests whose adapter is being loaded have places of their own, so that they do not fill the queue of the others. One
that has waited for its adapter for too long is refused. If no load has ended well meanwhile, the store counts as stuck:
requests that need it are refused as they come, but for one that tries after a time, which doubles, until a load ends
well.

A request whose constraint is compiled has a place in the queue meanwhile.

A full queue is shared: a new request displaces the last one of the tenant that has most requests there, if that has at
least two more than its own tenant. So a tenant that floods fills the queue for itself alone.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from typing import Generic, NamedTuple

from loray.engine.memory.adapter_manager import AdapterManager, R, Tier
from loray.engine.memory.host_memory import P
from loray.engine.request import Request
from loray.engine.scheduling.fairness import FairQueue, rank_in_batch, rank_in_queue
from loray.errors import Overloaded, StoreError

_FIRST_S, _LAST_S = 2.0, 60.0  # until a stuck store is tried again


class _State(Enum):
    PREPARING = "preparing"  # its constraint is compiled, or its mask computed
    LOADING = "loading"  # its adapter is, or its prefix comes from host memory
    READY = "ready"
    REFUSED = "refused"  # its error has been returned; the caller removes it


class WaitingRequests(Generic[P, R]):
    """The requests that do not run. One enters a FairQueue when it has a mask for its constraint and its adapter has
    been loaded. Before that its tenant waits for other things than service, so its counter must not fall behind. It
    stays there, running, until its prompt has been computed.

    `len` and iteration are of the requests that do not run. Nobody else adds or removes waiters of the AdapterManager.
    """

    def __init__(self, adapter_manager: AdapterManager[P, R], *, lead: float) -> None:
        self.fair = FairQueue(lead)
        self.begun: dict[Request, None] = {}  # running, and in the queue
        self._adapter_manager = adapter_manager
        self._states: dict[Request, _State] = {}
        self._by_adapter: dict[str, dict[Request, None]] = {}  # without the refused ones
        self.num_loading = 0  # that wait for an adapter to be loaded
        self._crowded_out: tuple[Request, bool] | None = None  # by the last step, and whether for want of blocks
        self._entered: dict[str, None] = {}  # adapters for whose load requests wait since the last `admit_loaded`

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._states)

    def longest_wait_s(self, now: float) -> float:
        """Return how long the request has waited that waits longest for its first step, and for nothing else."""
        ready = (r.queued_at for r, state in self._states.items() if state is _State.READY)
        return max((now - at for at in ready if at is not None), default=0.0)

    def add(self, request: Request, *, again: bool = False, prepares: bool = False) -> None:
        """`again`: it was running before and has been preempted. `prepares`: it cannot run before `prepared`."""
        if again:
            self.leave(request)
        if request.adapter is not None:
            self._adapter_manager.add_waiter(request.adapter, again=again)
            self._by_adapter.setdefault(request.adapter.digest, {})[request] = None
        if prepares:
            self._set_state(request, _State.PREPARING)
        else:
            self._enter(request)

    def prepared(self, request: Request) -> None:
        """Queue a request, all of whose needs but its adapter are met, unless it runs or has been refused."""
        if self._states.get(request) is _State.PREPARING:
            self._enter(request)

    def remove(self, request: Request) -> None:
        """Remove a request that was cancelled or refused."""
        self._set_state(request, None)
        self._forget(request)

    def begin(self, request: Request) -> None:
        """Run the request that `pick` gave, whose adapter is pinned. It stays in the queue until `end_prompt`."""
        self.fair.begin(request)
        self.begun[request] = None
        del self._states[request]  # it was READY, and stays in the queue
        self._forget(request)

    def end_prompt(self, request: Request) -> None:
        """A running request is computed up to its newest token with the next step, or runs no more."""
        if request in self.begun:
            del self.begun[request]
            self.fair.remove(request)

    def leave(self, request: Request) -> None:
        """A running request runs no more."""
        self.end_prompt(request)
        self.fair.leave(request)

    def refuse(self, request: Request) -> None:
        """Keep a request from running; the engine removes it after it has returned the error. One that ran but has no
        token yet is refunded.
        """
        self._set_state(request, _State.REFUSED)
        if request.num_input_charged and not request.num_generated:
            self.fair.refund(request, num_input=request.num_input_charged)
        self._discard(request)

    def admit_loaded(self) -> list[tuple[Request, Exception]]:
        """Queue the requests whose adapter has been loaded; refuse and return those whose adapter failed."""
        failed: list[tuple[Request, Exception]] = []
        entered, self._entered = self._entered, {}
        for digest in {**entered, **dict.fromkeys(self._adapter_manager.take_changed())}:
            loading = [r for r in self._by_adapter.get(digest, ()) if self.is_loading(r)]
            if not loading:
                continue
            tier = self._tier(loading[0])
            if tier is Tier.FAILED:
                failed += self.fail(loading[0])
            elif not tier.is_on_its_way:
                for request in (r for r in loading if not r.prefix_is_coming):
                    self._set_state(request, _State.READY)
        return failed

    def has_prefix(self, request: Request) -> None:
        """A request's prefix has come from host memory."""
        request.prefix_is_coming = False
        if self.is_loading(request):
            self._enter(request)

    def has_failed(self, request: Request) -> bool:
        """Return whether its adapter could not be loaded or placed."""
        return self._tier(request) is Tier.FAILED

    def fail(self, request: Request) -> list[tuple[Request, Exception]]:
        """Refuse all requests that wait for the adapter of `request`, which could not be loaded or placed."""
        ref = request.adapter
        assert ref is not None
        same = list(self._by_adapter[ref.digest])
        for r in same:
            self.refuse(r)
        return [(r, self._adapter_manager.error(ref)) for r in same]

    def pick(self) -> Request | None:
        """Return the next request, see FairQueue.pick; it may have begun, and its adapter have failed since."""
        while (request := self.fair.pick(self._is_resident)) is not None:
            if request in self.begun or not (self._tier(request).is_on_its_way or request.prefix_is_coming):
                break
            self._enter(request)  # its adapter was dropped and is loaded again, or its prefix comes
        return request

    def pick_begun(self) -> Request | None:
        """Return the next one of those that have begun."""
        return min(self.begun, key=self.fair.key, default=None)

    def crowd_out(self, request: Request, *, of_blocks: bool = False) -> None:
        """`request` is next, and finds no place in the batch; or, of the pool, not blocks enough."""
        self._crowded_out = request, of_blocks

    def gives_place(self, running: Sequence[Request], *, is_full: bool) -> Request | None:
        """Return which of the batch is preempted for the request that the last step crowded out. One in the background
        gives place to any other that lacks a place or blocks. In a full batch, so that no tenant keeps all places for
        as long as its answers are, it is the last one of the tenant that has most places, if that has at least two more
        than the request's tenant; never a more urgent one.
        """
        crowded_out, self._crowded_out = self._crowded_out, None
        if crowded_out is None or not self.is_ready(request := crowded_out[0]) or not (is_full or crowded_out[1]):
            return None
        if not request.is_background and running and running[-1].is_background:
            return running[-1]
        if not is_full:
            return None
        num_running = self.fair.num_running
        most = num_running(request.tenant) + 1
        others = (r for r in running if r.priority >= request.priority and num_running(r.tenant) > most)
        return max(others, key=lambda r: (num_running(r.tenant), *rank_in_batch(r)), default=None)

    def gives_way(self, request: Request, others: Collection[Request]) -> Request | None:
        """Return which of a full queue is refused for a new request: the last one of the tenant that has most there, if
        that has at least two more than the request's tenant; neither a more urgent nor a begun one. `others` have given
        way already. Those in the background give way to all others. O(queue).
        """
        queued = [r for r in self._states if self.is_queued(r) and r not in others]
        number = Counter(r.tenant for r in queued)
        most = number[request.tenant] + 1
        able = [r for r in queued if not r.is_continued and not r.num_generated]
        background = [] if request.is_background else [r for r in able if r.is_background]
        able = background or [r for r in able if number[r.tenant] > most and r.priority >= request.priority]
        return max(able, key=lambda r: (number[r.tenant], *rank_in_queue(r)), default=None)

    def is_ready(self, request: Request) -> bool:
        """Return whether it waits for its turn alone."""
        return self._states.get(request) is _State.READY

    def is_preparing(self, request: Request) -> bool:
        return self._states.get(request) is _State.PREPARING

    def is_queued(self, request: Request) -> bool:
        """Return whether it has a place in the queue: it waits for its turn, or will when it is prepared."""
        return self.is_ready(request) or self.is_preparing(request)

    def is_loading(self, request: Request) -> bool:
        return self._states.get(request) is _State.LOADING

    def check_integrity(self) -> None:
        """Raise AssertionError unless every index holds exactly its requests, and those that wait for an adapter will
        be looked at when it has moved.
        """
        in_state = {state: {r for r, s in self._states.items() if s is state} for state in _State}
        assert self.fair.requests() == in_state[_State.READY] | self.begun.keys()
        assert self.num_loading == len(in_state[_State.LOADING])
        others = self._states.keys() - in_state[_State.REFUSED]
        by_adapter = {(r.adapter.digest, r) for r in others if r.adapter is not None}
        assert {(digest, r) for digest, same in self._by_adapter.items() for r in same} == by_adapter
        assert all(self._by_adapter.values())
        for request in in_state[_State.LOADING]:
            is_looked_at = request.adapter_digest in self._entered or self._adapter_manager.has_changed
            is_coming = self._tier(request).is_on_its_way or request.prefix_is_coming
            assert is_looked_at or is_coming, "who waits is not told"

    # -- private ------------------------------------------------------------------------------------------------------

    def _tier(self, request: Request) -> Tier:
        return Tier.POOL if request.adapter is None else self._adapter_manager.tier(request.adapter)

    def _is_resident(self, request: Request) -> bool:
        return self._tier(request) is Tier.POOL

    def _enter(self, request: Request) -> None:
        tier = self._tier(request)
        if request.adapter is not None and (tier.is_on_its_way or tier is Tier.FAILED):
            self._set_state(request, _State.LOADING)
            self._entered[request.adapter.digest] = None
        elif request.prefix_is_coming:
            self._set_state(request, _State.LOADING)
        else:
            self._set_state(request, _State.READY)

    def _set_state(self, request: Request, state: _State | None) -> None:
        """Nothing but this and `begin` changes the state of a request that does not run. None: it leaves."""
        before = self._states.get(request)
        if before is _State.READY:
            self.fair.remove(request)
        self.num_loading += (state is _State.LOADING) - (before is _State.LOADING)
        if state is None:
            del self._states[request]
            return
        self._states[request] = state
        if state is _State.READY:
            self.fair.push(request)

    def _discard(self, request: Request) -> None:
        if request.adapter is not None and (same := self._by_adapter.get(request.adapter.digest)) is not None:
            same.pop(request, None)
            if not same:
                del self._by_adapter[request.adapter.digest]

    def _forget(self, request: Request) -> None:
        self._discard(request)
        if request.adapter is not None:
            self._adapter_manager.remove_waiter(request.adapter)


class WaitLimits(NamedTuple):
    """How many requests may wait, and how long.

    max_queued      requests that wait, without those that wait for a load
    max_loading     requests that wait for a load
    load_timeout_s  seconds that a request waits for a load
    """

    max_queued: int = 1 << 30
    max_loading: int = 1 << 30
    load_timeout_s: float = math.inf


class QueueLimits(Generic[P, R]):
    """Refuses requests where too many wait, or where the store is stuck.

    retry_after_s  seconds until a request like this one would find a place
    clock          seconds
    """

    def __init__(
        self,
        waiting: WaitingRequests[P, R],
        adapter_manager: AdapterManager[P, R],
        limits: WaitLimits,
        retry_after_s: Callable[[Request], float],
        clock: Callable[[], float],
    ) -> None:
        self._waiting, self._adapter_manager = waiting, adapter_manager
        self._max_queued, self._max_loading, self._timeout_s = limits
        self._retry_after_s, self._clock = retry_after_s, clock
        self._displaced: dict[Request, None] = {}  # from a full queue, since the last step
        self._deadlines: deque[tuple[float, Request, int]] = deque()  # with the bytes loaded until the request came
        self._num_stuck = 0  # times that the store was found to be stuck, in a row
        self._stuck_until = -math.inf
        self._loaded_bytes = 0  # in all, when it was found last

    def accept(self, request: Request) -> None:
        """Raise Overloaded where too many wait and none gives way, StoreError where its adapter is in a store that is
        stuck. A request that another engine has begun is not one too many.
        """
        num_loading, is_cold = self._waiting.num_loading, self._is_cold(request)
        if not is_cold or request.has_constraint:
            num_waiting = len(self._waiting) - num_loading - sum(map(self._waiting.is_queued, self._displaced))
            if num_waiting >= self._max_queued and not request.is_continued:
                self._displace(request, num_waiting)
        if not is_cold:
            return
        self._try_store()
        if num_loading >= self._max_loading and not request.is_continued:
            raise Overloaded(f"{num_loading} requests wait for their adapters already", self._retry_after_s(request))
        self._deadlines.append(
            (self._clock() + self._timeout_s, request, self._adapter_manager.counts.num_loaded_bytes)
        )

    def next_deadline(self) -> float:
        """Return when the first request has waited too long for its adapter, in seconds of the clock, or infinity."""
        while self._deadlines and not self._waits(self._deadlines[0][1]):
            self._deadlines.popleft()
        return self._deadlines[0][0] if self._deadlines else math.inf

    def overdue(self) -> list[tuple[Request, Exception]]:
        """Return the requests that have waited too long for their adapters, or gave way, each with its error, once."""
        now = self._clock()
        found = [(r, self._too_many(r, self._max_queued)) for r in self._displaced if self._waiting.is_queued(r)]
        self._displaced.clear()
        is_stuck = False
        while self.next_deadline() <= now:
            _, request, loaded_bytes = self._deadlines.popleft()
            is_stuck |= loaded_bytes == self._adapter_manager.counts.num_loaded_bytes
            assert request.adapter is not None
            reason = f"adapter {request.adapter.label} was not loaded within {self._timeout_s:g} s: the store is slow"
            found.append((request, StoreError(f"{reason} or away; send the request again")))
        if is_stuck:
            self._num_stuck = 1 if self._has_loaded() else self._num_stuck + 1
            self._loaded_bytes = self._adapter_manager.counts.num_loaded_bytes
            self._stuck_until = now + min(_LAST_S, _FIRST_S * 2.0 ** (self._num_stuck - 1))
        return found

    def _displace(self, request: Request, num_waiting: int) -> None:
        """Overloaded if no other gives way to it."""
        other = self._waiting.gives_way(request, self._displaced)
        if other is None:
            raise self._too_many(request, num_waiting)
        self._displaced[other] = None

    def _too_many(self, request: Request, num_waiting: int) -> Exception:
        return Overloaded(f"{num_waiting} requests are waiting already", self._retry_after_s(request))

    def _try_store(self) -> None:
        """StoreError while it is stuck, but for the first call after its time: that request finds out."""
        if self._has_loaded():
            self._num_stuck = 0
        if not self._num_stuck:
            return
        now = self._clock()
        if (left := self._stuck_until - now) > 0:
            raise StoreError(f"the store does not answer; it is tried again in {left:.1f} s", left)
        self._stuck_until = now + self._timeout_s

    def _has_loaded(self) -> bool:
        return self._adapter_manager.counts.num_loaded_bytes != self._loaded_bytes

    def _is_cold(self, request: Request) -> bool:
        if request.adapter is None:
            return False
        entry = self._adapter_manager.entries.get(request.adapter.digest)
        return entry is None or self._adapter_manager.tier(request.adapter).is_on_its_way

    def _waits(self, request: Request) -> bool:
        waits = self._waiting.is_loading(request) or self._waiting.is_preparing(request)
        return waits and self._is_cold(request)
