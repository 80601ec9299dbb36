"""Engines that compute nothing: every request that runs gets one token a step, as from an engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from prometheus_client.core import Metric as Family

from loray.api.status import AutoscalingStatus, ReplicaStatus
from loray.spec import GenerateRequest, TokenDelta


class Steps:
    """Gives each of its members a token a step. A step begins `interval_s` after the one before, and not before every
    token of that one has been taken: so it never runs ahead of who reads.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._members: dict[Member, None] = {}
        self._num_open = 0  # tokens of this step that have not been taken
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def join(self, member: Member) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        self._members[member] = None
        self._changed.set()

    def leave(self, member: Member) -> None:
        del self._members[member]
        self.taken(member.clear())

    def taken(self, num_tokens: int = 1) -> None:
        self._num_open -= num_tokens
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
            self._num_open = len(self._members)
            for member in self._members:
                member.put()


class Member:
    """One request: its tokens that have come and have not been taken."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._num_ready = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def put(self) -> None:
        self._num_ready += 1
        while self._waiting:
            if not (waiting := self._waiting.popleft()).done():
                waiting.set_result(None)

    def clear(self) -> int:
        num_ready, self._num_ready = self._num_ready, 0
        return num_ready

    async def take(self) -> None:
        while not self._num_ready:
            self._waiting.append(waiting := asyncio.get_running_loop().create_future())
            await waiting
        self._num_ready -= 1
        self._steps.taken()


class FakeEngines:
    """Implements `serve_apps.gateway.engines.Engines`. The tokens are `token_ids`, again and again."""

    def __init__(self, token_ids: Sequence[int], interval_s: float) -> None:
        self._token_ids = token_ids
        self._steps: Steps | None = None
        self._interval_s = interval_s

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        if self._steps is None:
            self._steps = Steps(self._interval_s)
        member, last = Member(self._steps), request.params.max_tokens - 1
        self._steps.join(member)
        try:
            for i in range(last + 1):
                await member.take()
                yield TokenDelta((self._token_ids[i % len(self._token_ids)],), "length" if i == last else None)
        finally:
            self._steps.leave(member)

    async def healthy(self) -> bool:
        return True

    async def stats(self) -> list[ReplicaStatus]:
        return []

    async def autoscaling(self) -> AutoscalingStatus | None:
        return None

    async def metrics(self) -> list[list[Family] | None]:
        return []

    def routing_decisions(self) -> dict[str, int]:
        return {}
