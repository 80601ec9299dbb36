"""Engines that compute nothing: every request that runs gets one token a step, as from an engine."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict

from prometheus_client.core import Metric as Family

from benchmarks.front.steps import Steps
from loray.schemas.status import AutoscalingStatus, ReplicaStatus
from loray.spec import GenerateRequest, TokenDelta
from serve_apps.channel.inbox import Inbox
from serve_apps.channel.listener import Listener

NODE = "front"


class FakeEngines:
    """Implements `serve_apps.gateway.bases.Engines`. The tokens are `token_ids`, again and again."""

    def __init__(self, token_ids: Sequence[int], interval_s: float) -> None:
        self._token_ids, self._interval_s = token_ids, interval_s
        self._steps: Steps[asyncio.Queue[None]] | None = None

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        steps = self._steps = self._steps or Steps(self._interval_s, _put)
        queue: asyncio.Queue[None] = asyncio.Queue()
        last = request.params.max_tokens - 1
        steps.join(queue)
        try:
            for i in range(last + 1):
                await queue.get()
                steps.taken(queue)
                yield TokenDelta((self._token_ids[i % len(self._token_ids)],), "length" if i == last else None)
        finally:
            steps.leave(queue)

    def running(self, late: Callable[[float], None]) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def healthy(self) -> bool:
        return True

    async def stats(self, layout: bool | frozenset[str] = False) -> list[ReplicaStatus]:
        return []

    async def autoscaling(self) -> AutoscalingStatus | None:
        return None

    async def metrics(self) -> list[list[Family] | None]:
        return []

    def is_cold(self) -> bool:
        return False

    def start_failed(self) -> bool:
        return False

    def routing_decisions(self) -> Mapping[str, int]:
        return {}

    def resumes(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        """Ends what the engines have started."""


def _put(queues: list[asyncio.Queue[None]]) -> None:
    for queue in queues:
        queue.put_nowait(None)


class ChannelEngines(FakeEngines):
    """The same with an engine in another process, whose tokens come over the channel of `loray up`, one frame a step.

    That process hears of requests and steps over a pipe, in the place of Ray Serve's call.
    """

    def __init__(self, token_ids: Sequence[int], interval_s: float) -> None:
        super().__init__(token_ids, interval_s)
        self._listener = Listener()
        self._replica: subprocess.Popen[bytes] | None = None
        self._inbox_steps: Steps[Inbox] = Steps(interval_s, lambda _: self._tell("step"))
        self._starting: asyncio.Task[None] | None = None

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        self._starting = self._starting or asyncio.create_task(self._start())
        await asyncio.shield(self._starting)
        inbox = self._listener.open()
        self._tell(f"{inbox.stream} {request.params.max_tokens}")
        self._inbox_steps.join(inbox)
        try:
            while True:
                delta = await inbox.take()
                self._inbox_steps.taken(inbox)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._inbox_steps.leave(inbox)
            self._listener.forget(inbox, "abort")

    async def _start(self) -> None:
        await self._listener.start(NODE, "127.0.0.1")
        command = [sys.executable, "-m", "benchmarks.front.replica"]
        self._replica = subprocess.Popen(command, stdin=subprocess.PIPE)
        self._tell(json.dumps({"address": asdict(self._listener.address), "token_ids": list(self._token_ids)}))

    def _tell(self, line: str) -> None:
        assert self._replica is not None
        assert self._replica.stdin is not None
        os.write(self._replica.stdin.fileno(), f"{line}\n".encode())

    def close(self) -> None:
        if self._replica is not None:
            assert self._replica.stdin is not None
            self._replica.stdin.close()
            self._replica.wait()
