"""Places for long operations, of which a few run at once for each key and tenant."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import NamedTuple, TypeVar

from loray.errors import Overloaded, RateLimited

T = TypeVar("T")

MOST_WAITING = 8  # of one tenant
_RETRY_S = 10.0


class MostPlaces(NamedTuple):
    """The most that have a place at once, of all, of a tenant and of a key (None: as many as its tenant).

    Who finds none waits for `wait_s` seconds at most, and of one tenant `waiting` wait (None: any number).
    """

    total: int
    of_tenant: int
    of_key: int | None = None
    wait_s: float = 0.0
    waiting: int | None = MOST_WAITING


class _Waiting(NamedTuple):
    wanted: dict[str, int]
    given: asyncio.Future[None]


class Places:
    """Gives places. A free one is given to the tenants that wait in turn, and of one tenant in the order in which they
    came. Used from one event loop. `what` says in messages what they are for.
    """

    def __init__(self, what: str, most: MostPlaces) -> None:
        self._what, self._most = what, most
        self._taken: Counter[str] = Counter()
        self._waiting: dict[str, deque[_Waiting]] = {}  # by tenant, in the order of their turns
        self._threads = ThreadPoolExecutor(most.total, thread_name_prefix=what)

    @asynccontextmanager
    async def one(self, tenant: str, account: str | None = None) -> AsyncIterator[None]:
        """Take a place for the block, of a tenant and of a key's account. Raises RateLimited where none is free,
        and Overloaded where none was in time.
        """
        wanted = await self._take(tenant, account)
        try:
            yield
        finally:
            self._leave(wanted)

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Return or raise what `work` does, in a place and in a thread of it: however many wait, other work finds its
        threads. Both are taken until it has ended, also where the caller is cancelled.
        """
        wanted = await self._take(tenant, None)
        running = asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, work)
        running.add_done_callback(lambda done: self._ended(wanted, done))
        return await asyncio.shield(running)

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    async def _take(self, tenant: str, account: str | None) -> dict[str, int]:
        """Return what is counted → how many there may be."""
        wanted = {"": self._most.total, f"tenant {tenant}": self._most.of_tenant}
        if self._most.of_key is not None and account is not None:
            wanted[f"key {account}"] = self._most.of_key
        if self._has(wanted):
            self._taken.update(wanted.keys())
        else:
            await self._wait(tenant, wanted)
        return wanted

    def _has(self, wanted: dict[str, int]) -> bool:
        return all(self._taken[counted] < most for counted, most in wanted.items())

    async def _wait(self, tenant: str, wanted: dict[str, int]) -> None:
        full, most = next(counted for counted, most in wanted.items() if self._taken[counted] >= most), self._most
        said = f"{wanted[full]} {self._what} are under way{full and f' for {full}'}"
        if not most.wait_s:
            raise RateLimited(f"{said}, which is the most at once: end one, or ask again later", _RETRY_S)
        if most.waiting is not None and len(self._waiting.get(tenant, ())) >= most.waiting:
            raise Overloaded(f"{said}, and {most.waiting} of tenant {tenant} wait for them: ask again later", _RETRY_S)
        one = _Waiting(wanted, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, deque()).append(one)
        try:
            async with asyncio.timeout(most.wait_s):
                await one.given
        except BaseException as e:
            if one.given.done() and not one.given.cancelled():  # it came at the same moment
                self._leave(wanted)
            else:
                self._withdraw(tenant, one)
            if not isinstance(e, TimeoutError):
                raise
            raise Overloaded(
                f"{said}, and tenant {tenant} had no turn in {most.wait_s:g} s: ask again", min(most.wait_s, _RETRY_S)
            ) from None

    def _ended(self, wanted: dict[str, int], done: asyncio.Future[T]) -> None:
        if not done.cancelled():
            done.exception()  # which nobody reads where the caller was cancelled
        self._leave(wanted)

    def _leave(self, wanted: dict[str, int]) -> None:
        for counted in wanted:
            self._taken[counted] -= 1
            if not self._taken[counted]:
                del self._taken[counted]
        while (following := self._next()) is not None:
            tenant, one = following
            self._withdraw(tenant, one)
            if tenant in self._waiting:
                self._waiting[tenant] = self._waiting.pop(tenant)  # behind the others
            self._taken.update(one.wanted.keys())
            one.given.set_result(None)

    def _next(self) -> tuple[str, _Waiting] | None:
        """Find the first that fits, and its tenant; None: nobody does."""
        for tenant, waiting in self._waiting.items():
            for one in waiting:
                if not one.given.done() and self._has(one.wanted):
                    return tenant, one
        return None

    def _withdraw(self, tenant: str, one: _Waiting) -> None:
        waiting = self._waiting[tenant]
        waiting.remove(one)
        if not waiting:
            del self._waiting[tenant]
