"""Threads that tenants use in turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loray.errors import Overloaded

T = TypeVar("T")


class FairThreads:
    """Runs calls in threads: of each tenant one at a time, and of the tenants that wait each in turn. A call that has
    waited for `longest_s` raises Overloaded. Used from one event loop.
    """

    def __init__(self, num_threads: int, longest_s: float, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._num_free, self._longest_s, self._name = num_threads, longest_s, name
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant, in the order of their turns
        self._running: set[str] = set()

    async def run(self, tenant: str, call: Callable[[], T]) -> T:
        """What `call` returns or raises. The thread goes on where the caller is cancelled."""
        await self._turn(tenant)
        running = asyncio.get_running_loop().run_in_executor(self._threads, call)
        running.add_done_callback(lambda done: self._ended(tenant, done))
        return await asyncio.shield(running)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, tenant: str) -> None:
        if self._num_free and tenant not in self._running:
            self._begin(tenant)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            async with asyncio.timeout(self._longest_s):
                await turn
        except BaseException as e:
            if turn.done() and not turn.cancelled():
                self._leave(tenant)
            else:
                self._withdraw(tenant, turn)
            if not isinstance(e, TimeoutError):
                raise
            raise Overloaded(f"the gateway's {self._name} are busy, and tenant {tenant} has waited", 1.0) from e

    def _begin(self, tenant: str) -> None:
        self._num_free -= 1
        self._running.add(tenant)

    def _ended(self, tenant: str, done: asyncio.Future[T]) -> None:
        if not done.cancelled():
            done.exception()  # which nobody reads where the caller was cancelled
        self._leave(tenant)

    def _leave(self, tenant: str) -> None:
        self._num_free += 1
        self._running.discard(tenant)
        while (following := next((waits for waits in self._waiting if waits not in self._running), None)) is not None:
            turns = self._waiting.pop(following)
            turn = turns.popleft()
            if turns:
                self._waiting[following] = turns  # behind the others
            if not turn.done():  # else its caller has just been cancelled
                self._begin(following)
                turn.set_result(None)
                return

    def _withdraw(self, tenant: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(tenant, deque())
        if turn in turns:
            turns.remove(turn)
        if not turns:
            self._waiting.pop(tenant, None)
