"""The engines behind a Ray Serve handle: routing, retries and errors through a call, tokens through the channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from prometheus_client.core import Metric as Family
from ray.serve.handle import DeploymentHandle

from loray.api.status import AutoscalingStatus, ReplicaStatus
from loray.errors import ReplicaLost, ReplicaUnavailable
from loray.spec import GenerateRequest, TokenDelta
from loray.telemetry import get_logger
from serve_apps.channel.inbox import reading
from serve_apps.channel.listener import Listener
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.broadcast import Broadcast
from serve_apps.gateway.replicas.call import Call
from serve_apps.gateway.replicas.quarantine import Records, SharedQuarantine

_log = get_logger(__name__)

ATTEMPTS = 3
_BACKOFF_S = 0.2
_ASK_S = 1.0  # between looks for replicas that do not report yet


class ServeEngines:
    """Used from one event loop. `node` and `host`: Ray's id and the address of this process' node. `open_records`: see
    `SharedQuarantine`.
    """

    def __init__(
        self, handle: DeploymentHandle[Any], node: str, host: str, open_records: Callable[[], Records] | None = None
    ) -> None:
        self._calls = handle.options(stream=True)
        self._replicas = Broadcast(handle)
        self._place = node, host
        self._listener: asyncio.Task[Listener] | None = None
        self._quarantine = SharedQuarantine(open_records)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Meanwhile the replicas report to this gateway which adapters they hold, also those that it sends nothing."""
        asking = asyncio.create_task(self._ask_for_reports())
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask_for_reports(self) -> None:
        is_first = True
        while True:
            try:
                listener = await self._listening()
                if is_first or router.replicas() - listener.replicas():
                    is_first = False
                    await self._replicas.ask("report_to", listener.address)
            except Exception as e:  # noqa: BLE001 - without reports requests are routed by hash
                _log.warning("the replicas could not be asked to report: %s", e)
            await asyncio.sleep(_ASK_S)

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        """As `Engines.generate`. A request is retried only if its replica was lost or had stopped.

        Any other error would be the same on every replica. Raises AdapterQuarantined where the adapter seems to kill
        replicas.
        """
        for attempt in range(ATTEMPTS):
            async with aclosing(self._attempt(request, attempt, fit)) as deltas:
                started = False
                try:
                    async for delta in deltas:
                        started = True
                        yield delta
                except ReplicaUnavailable as e:
                    if e.replica is not None:
                        router.suspect(e.replica)
                    if started or attempt == ATTEMPTS - 1:
                        raise
                    _log.warning("request %s is sent again: %s", request.request_id, e)
                else:
                    return
            await asyncio.sleep(_BACKOFF_S * 2**attempt)

    async def _attempt(self, request: GenerateRequest, attempt: int, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        if attempt > 0:
            request = replace(request, request_id=f"{request.request_id}-{attempt}")
        digest = None if request.adapter is None else request.adapter.digest
        if digest is not None:
            await self._quarantine.enter(request.request_id, digest)
        try:
            listener = await self._listening()
            inbox = listener.open()
            call = Call(self._calls.generate_to.remote(request, fit, listener.address, inbox.stream), listener, inbox)
            with reading(request, call.leave):
                async for delta in inbox:
                    if digest is not None:
                        self._quarantine.answered(digest)
                        digest = None
                    yield delta
        except ReplicaLost as e:
            replica = e.replica or router.replica_of(request.request_id)
            if replica is not None:
                await self._quarantine.died(request.request_id, replica, router.replica_of)
            raise
        finally:
            self._quarantine.leave(request.request_id)
            router.forget(request.request_id)

    async def _listening(self) -> Listener:
        if self._listener is None or (self._listener.done() and self._listener.exception() is not None):
            self._listener = asyncio.create_task(_started(*self._place))
        return await asyncio.shield(self._listener)

    async def close(self) -> None:
        """Ends all streams."""
        if self._listener is not None:
            await (await self._listening()).close()
        await self._quarantine.close()

    async def healthy(self) -> bool:
        return await self._replicas.healthy()

    async def stats(self) -> list[ReplicaStatus]:
        return [a for a in await self._replicas.ask("stats") if isinstance(a, ReplicaStatus)]

    async def metrics(self) -> list[list[Family] | None]:
        return [a if isinstance(a, list) else None for a in await self._replicas.ask("metrics")]

    async def autoscaling(self) -> AutoscalingStatus | None:
        return await self._replicas.autoscaling()

    def routing_decisions(self) -> Mapping[str, int]:
        return router.decisions()


async def _started(node: str, host: str) -> Listener:
    listener = Listener(router.reports)
    await listener.start(node, host)
    return listener
