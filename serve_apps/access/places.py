"""Places for work that takes long: few at once, and few of one tenant and of one key."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import NamedTuple, TypeVar

from loray.errors import Overloaded, RateLimited
from loray.spec import Principal

T = TypeVar("T")

MOST_WAITING = 8  # of one tenant
_RETRY_S = 10.0


class MostPlaces(NamedTuple):
    """How many have a place at once, of all, of a tenant and of a key (None: as many as its tenant).

    Who finds none waits in turn for `wait_s` seconds at most, and few of a tenant wait.
    """

    total: int
    of_tenant: int
    of_key: int | None = None
    wait_s: float = 0.0


class _Waiting(NamedTuple):
    tenant: str
    wanted: dict[str, int]
    given: asyncio.Future[None]


class Places:
    """Used from one event loop. `what` says in messages what they are for."""

    def __init__(self, what: str, most: MostPlaces) -> None:
        self._what, self._most = what, most
        self._taken: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []
        self._threads = ThreadPoolExecutor(most.total, thread_name_prefix="places")

    @asynccontextmanager
    async def one(self, asking: Principal) -> AsyncIterator[None]:
        """A place for the block. Raises RateLimited where none is free, and Overloaded where none was in time."""
        wanted = self._wanted(asking)
        if self._has(wanted):
            self._taken.update(wanted.keys())
        else:
            await self._wait(asking.tenant, wanted)
        try:
            yield
        finally:
            self._leave(wanted)

    async def run(self, asking: Principal, work: Callable[[], T]) -> T:
        """`work` in a place, and in a thread of it: however many wait, other work finds its threads."""
        async with self.one(asking):
            return await asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    def _wanted(self, asking: Principal) -> dict[str, int]:
        """What is counted → how many there may be."""
        wanted = {"": self._most.total, f"tenant {asking.tenant}": self._most.of_tenant}
        if self._most.of_key is not None and asking.account is not None:
            wanted[f"key {asking.account}"] = self._most.of_key
        return wanted

    def _has(self, wanted: dict[str, int]) -> bool:
        return all(self._taken[counted] < most for counted, most in wanted.items())

    async def _wait(self, tenant: str, wanted: dict[str, int]) -> None:
        full = next(counted for counted, most in wanted.items() if self._taken[counted] >= most)
        said = f"{wanted[full]} {self._what} are under way{full and f' for {full}'}"
        if not self._most.wait_s:
            raise RateLimited(f"{said}, which is the most at once: end one, or ask again later", _RETRY_S)
        if sum(one.tenant == tenant for one in self._waiting) >= MOST_WAITING:
            raise Overloaded(f"{said}, and {MOST_WAITING} of tenant {tenant} wait for them: ask again later", _RETRY_S)
        one = _Waiting(tenant, wanted, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        try:
            async with asyncio.timeout(self._most.wait_s):
                await one.given
        except BaseException as e:
            if one.given.done() and not one.given.cancelled():  # it came at the same moment
                self._leave(wanted)
            if isinstance(e, TimeoutError):
                raise Overloaded(f"{said}, and none ended in {self._most.wait_s:g} s: ask again", _RETRY_S) from None
            raise
        finally:
            if one in self._waiting:
                self._waiting.remove(one)

    def _leave(self, wanted: dict[str, int]) -> None:
        for counted in wanted:
            self._taken[counted] -= 1
            if not self._taken[counted]:
                del self._taken[counted]
        for one in list(self._waiting):  # the first that fits, not the first alone: its tenant may have all it may
            if not one.given.done() and self._has(one.wanted):
                self._taken.update(one.wanted.keys())
                self._waiting.remove(one)
                one.given.set_result(None)
