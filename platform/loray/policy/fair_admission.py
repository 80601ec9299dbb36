"""Turns of tenants: whose requests a gateway works on while it cannot keep up.

A gateway is one thread, and shares processors with others, so that whatever one request costs delays all others. As
long as the gateway is on time, or only one tenant asks, a request is admitted as it comes. While it is late and several
tenants ask, no more than `limit` requests are under way, and others wait. A tenant that has less than its equal part of
the limit under way is admitted all the same; so one that floods waits for itself alone. So is one that has hardly more
under way than the mean of all: where nobody floods, waiting would help nobody.

The limit follows the lateness (additive increase, multiplicative decrease: Chiu and Jain 1989): it falls while the
gateway is late, and grows while it is not and requests wait.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from statistics import fmean
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_STEP_S = 0.25  # between two changes of the limit
_NUM_LATE = 2  # steps in which the gateway is late before the limit falls: one may be a pause
_EVEN = 1.25  # of the mean of all tenants: so many under way are no flood
_DECREASE = 0.75  # of the limit, where the gateway was late
_BEGIN = 0.5  # of what is under way, where nothing was limited before
_SMOOTHING = 0.3  # the newest step's share in the mean that the limit grows by
_EXCESS = 1.2  # of the limit; with more under way, the last decrease has not come to bear yet
_INCREASE = 0.05  # and where it was on time, but at least by one a second
_FAST = 0.5  # and where it was late by less than a quarter of what it may be
_FORGET_S = 2.0  # in which nobody looked how late it is, after which nothing is limited


class _Tenant(Generic[T]):
    __slots__ = ("num", "seen_at", "waiting")

    def __init__(self) -> None:
        self.num = 0  # requests under way
        self.waiting: dict[T, None] = {}  # in the order in which they came
        self.seen_at = -math.inf


class FairAdmission(Generic[T]):
    """The turns at one gateway. `T` stands for a request that waits. Times are seconds of one clock. Not thread-safe.

    target    how late the gateway may be, in the mean, in the units of `observe`
    least     requests that may always be under way
    active_s  since its last request, in which a tenant counts
    """

    def __init__(self, target: float = 1.0, least: int = 4, active_s: float = 10.0) -> None:
        self._target, self._least, self._active_s = target, least, active_s
        self._tenants: dict[str, _Tenant[T]] = {}  # those that count, the one that was seen last at the end
        self._num = self._num_waiting = 0
        self._late: list[float] = []  # since the last change of the limit
        self._changed_at, self._num_late = -math.inf, 0
        self._mean = 0.0
        self.limit = math.inf

    @property
    def is_crowded(self) -> bool:
        """True if lateness matters: `observe` is to be called."""
        return len(self._tenants) > 1 and self._num >= self._least

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def ask(self, tenant: str, request: T, now: float) -> bool:
        """Return whether the request is admitted; else it waits. Each that is admitted ends once."""
        one = self._seen(tenant, now)
        self._look(now)
        if not one.waiting and self._has_room(one):
            self._begin(one)
            return True
        one.waiting[request] = None
        self._num_waiting += 1
        return False

    def withdraw(self, tenant: str, request: T) -> None:
        """The request waits no more."""
        one = self._tenants.get(tenant)
        if one is not None and request in one.waiting:
            del one.waiting[request]
            self._num_waiting -= 1

    def ended(self, tenant: str, now: float) -> list[T]:
        """An admitted request has ended. Returns those that are admitted instead."""
        self._seen(tenant, now).num -= 1
        self._num -= 1
        return self._admitted(now)

    def observe(self, lateness: float, now: float) -> list[T]:
        """Tell how late the gateway was just now, by what it may be. Returns the requests that are admitted."""
        self._late.append(lateness)
        if now - self._changed_at < _STEP_S:
            return []
        newest = fmean(self._late)
        self._mean += _SMOOTHING * (newest - self._mean)
        self._num_late = self._num_late + 1 if newest > self._target else 0
        self._changed_at = now
        self._late.clear()
        if self._num_late >= _NUM_LATE and self._num <= _EXCESS * self.limit:
            factor = _BEGIN if self.limit == math.inf else _DECREASE
            self.limit = max(self._least, factor * min(self.limit, self._num))
        elif not self._num_late and self._mean < self._target:
            self.limit += max(_STEP_S, (_FAST if 4 * self._mean < self._target else _INCREASE) * self.limit)
        return self._admitted(now)

    def _admitted(self, now: float) -> list[T]:
        self._look(now)
        found: list[T] = []
        while self._num_waiting:
            one = min((t for t in self._tenants.values() if t.waiting), key=lambda tenant: tenant.num)
            if not self._has_room(one):
                break
            request = next(iter(one.waiting))
            del one.waiting[request]
            self._num_waiting -= 1
            self._begin(one)
            found.append(request)
        return found

    def _has_room(self, one: _Tenant[T]) -> bool:
        return self._num < self.limit or one.num * len(self._tenants) < max(self.limit, _EVEN * self._num)

    def _begin(self, one: _Tenant[T]) -> None:
        one.num += 1
        self._num += 1

    def _seen(self, tenant: str, now: float) -> _Tenant[T]:
        one = self._tenants.pop(tenant, None) or _Tenant[T]()
        self._tenants[tenant] = one
        one.seen_at = now
        return one

    def _look(self, now: float) -> None:
        """Forgets tenants that do not count any more. Where one is left, nothing is limited; nor after a while in which
        so few requests were under way that nobody looked at the loop.
        """
        while self._tenants:
            tenant, one = next(iter(self._tenants.items()))
            if now - one.seen_at < self._active_s:
                break
            del self._tenants[tenant]
            if one.num or one.waiting:
                self._tenants[tenant], one.seen_at = one, now
        if len(self._tenants) <= 1 or now - self._changed_at > _FORGET_S:
            self.limit = math.inf
