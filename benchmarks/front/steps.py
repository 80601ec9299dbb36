"""Steps of an engine that computes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Steps(Generic[T]):
    """Each step gives every member one token. It begins `interval_s` after the one before, and not before every token
    of that one has been taken: so it never runs ahead of who reads.

    begin  gives each of these members a token
    """

    def __init__(self, interval_s: float, begin: Callable[[list[T]], None]) -> None:
        self._interval_s, self._begin = interval_s, begin
        self._members: dict[T, bool] = {}  # True: it has not taken its token of this step
        self._num_open = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def join(self, member: T) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        self._members[member] = False
        self._changed.set()

    def leave(self, member: T) -> None:
        self.taken(member)
        del self._members[member]

    def taken(self, member: T) -> None:
        if self._members[member]:
            self._members[member] = False
            self._num_open -= 1
            if not self._num_open:
                self._changed.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            while self._num_open or not self._members:
                self._changed.clear()
                await self._changed.wait()
            due = max(due + self._interval_s, loop.time())
            if (wait_s := due - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            self._members = dict.fromkeys(self._members, True)
            self._num_open = len(self._members)
            self._begin(list(self._members))
