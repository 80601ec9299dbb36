"""How many requests may wait, and how long for their adapter: a store that is slow or away costs only those that need
it.

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
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple

from loray.engine.request import Request
from loray.engine.residency.residency import Residency
from loray.engine.residency.table import P, R, Tier
from loray.engine.scheduling.waiting import WaitingRequests
from loray.errors import Overloaded, StoreError

_FIRST_S, _LAST_S = 2.0, 60.0  # until a stuck store is tried again


class WaitLimits(NamedTuple):
    """
    max_queued      requests that wait, without those that wait for a load
    max_loading     requests that wait for a load
    load_timeout_s  seconds that a request waits for a load
    """

    max_queued: int = 1 << 30
    max_loading: int = 1 << 30
    load_timeout_s: float = math.inf


class QueueLimits(Generic[P, R]):
    """`retry_after_s`: seconds until a request like this one would find a place. `clock`: seconds."""

    def __init__(
        self,
        waiting: WaitingRequests[P, R],
        residency: Residency[P, R],
        limits: WaitLimits,
        retry_after_s: Callable[[Request], float],
        clock: Callable[[], float],
    ) -> None:
        self._waiting, self._residency = waiting, residency
        self._max_queued, self._max_loading, self._timeout_s = limits
        self._retry_after_s, self._clock = retry_after_s, clock
        self._displaced: dict[Request, None] = {}  # from a full queue, since the last step
        self._deadlines: deque[tuple[float, Request, int]] = deque()  # with the bytes loaded until the request came
        self._num_stuck = 0  # times that the store was found to be stuck, in a row
        self._stuck_until = -math.inf
        self._loaded_bytes = 0  # in all, when it was found last

    def accept(self, request: Request) -> None:
        """Overloaded where too many wait and none gives way; StoreError where its adapter is in a store that is stuck.
        A request that another engine has begun is not one too many.
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
        self._deadlines.append((self._clock() + self._timeout_s, request, self._residency.counts.num_loaded_bytes))

    def next_deadline(self) -> float:
        """When the first request has waited for its adapter for too long, in seconds of the clock; may be infinite."""
        while self._deadlines and not self._waits(self._deadlines[0][1]):
            self._deadlines.popleft()
        return self._deadlines[0][0] if self._deadlines else math.inf

    def overdue(self) -> list[tuple[Request, Exception]]:
        """The requests that have waited for their adapters for too long, or gave way, each with its error, once."""
        now = self._clock()
        found = [(r, self._too_many(r, self._max_queued)) for r in self._displaced if self._waiting.is_queued(r)]
        self._displaced.clear()
        is_stuck = False
        while self.next_deadline() <= now:
            _, request, loaded_bytes = self._deadlines.popleft()
            is_stuck |= loaded_bytes == self._residency.counts.num_loaded_bytes
            assert request.adapter is not None
            reason = f"adapter {request.adapter.label} was not loaded within {self._timeout_s:g} s: the store is slow"
            found.append((request, StoreError(f"{reason} or away; send the request again")))
        if is_stuck:
            self._num_stuck = 1 if self._has_loaded() else self._num_stuck + 1
            self._loaded_bytes = self._residency.counts.num_loaded_bytes
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
        return self._residency.counts.num_loaded_bytes != self._loaded_bytes

    def _is_cold(self, request: Request) -> bool:
        if request.adapter is None:
            return False
        entry = self._residency.table.entries.get(request.adapter.digest)
        return entry is None or self._residency.table.tier(request.adapter) is Tier.LOADING

    def _waits(self, request: Request) -> bool:
        waits = self._waiting.is_loading(request) or self._waiting.is_preparing(request)
        return waits and self._is_cold(request)
