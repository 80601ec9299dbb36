"""The engines behind a Ray Serve handle: routing, retries and errors through a call, tokens through the channel."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from ssl import SSLContext
from typing import Any

from prometheus_client.core import Metric as Family
from ray.serve.handle import DeploymentHandle

from loray.api.status import AutoscalingStatus, ReplicaStatus
from loray.encryption import server_context
from loray.errors import BaseStarting, EngineStopped, ReplicaLeaving, ReplicaLost, ReplicaUnavailable
from loray.spec import GenerateRequest, TokenDelta
from loray.telemetry import get_logger
from serve_apps.channel.inbox import Inbox, reading
from serve_apps.channel.lateness import RecentLeast
from serve_apps.channel.listener import Listener
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.broadcast import Broadcast
from serve_apps.gateway.replicas.call import Call
from serve_apps.gateway.replicas.demand_notes import DemandNotes
from serve_apps.gateway.replicas.departures import Departures
from serve_apps.gateway.replicas.progress import Progress
from serve_apps.gateway.replicas.quarantine import Records, SharedQuarantine

_log = get_logger(__name__)

_BACKOFF_S = 0.2
_ASK_S = 1.0  # between looks for replicas that do not report yet
_LOOK_S = 0.5  # between looks for replicas that are leaving


class ServeEngines:
    """The replicas of one base. Used from one event loop.

    handle          of the deployment called `deployment`
    node, host      Ray's id and the address of this process' node
    open_records    see `SharedQuarantine`
    notes           are told of each request for an adapter
    max_resumes, drain_grace_s, max_token_lateness  see ServeSpec
    cold_start_timeout_s        the same; None: there is always a replica, or Serve is about to start one
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        deployment: str,
        node: str,
        host: str,
        open_records: Callable[[], Records] | None = None,
        *,
        notes: DemandNotes | None = None,
        max_resumes: int = 1,
        drain_grace_s: float = 10.0,
        max_token_lateness: float = 0.07,
        cold_start_timeout_s: float | None = None,
    ) -> None:
        self._calls = handle.options(stream=True)
        self._replicas = Broadcast(handle)
        self._deployment, self._place = deployment, (node, host)
        self._tls = server_context(os.environ)  # here, so that a wrong setting fails the gateway and no request
        self._listener: asyncio.Task[Listener] | None = None
        self._tell_late: Callable[[float], None] = lambda _: None
        self._shortest = RecentLeast()  # time to a first token
        self._max_lateness = max_token_lateness  # by that
        self._quarantine = SharedQuarantine(open_records)
        self._max_resumes, self._cold_start_timeout_s = max_resumes, cold_start_timeout_s
        self._departures = Departures(drain_grace_s)
        self._notes = notes
        self._reading: dict[str, Inbox] = {}  # by request
        self._cold: set[str] = set()  # requests that wait, and no replica runs
        self._start_failed = False  # and no replica has run since
        self._resumes = {"lost": 0, "moved": 0}

    @asynccontextmanager
    async def running(self, late: Callable[[float], None]) -> AsyncIterator[None]:
        """Meanwhile the replicas report to this gateway which adapters they hold, also those that it sends nothing, and
        the requests of replicas that are leaving go elsewhere.
        """
        self._tell_late = late
        works = [self._ask_for_reports(), self._look_for_departures()]
        if self._notes is not None:
            works.append(self._notes.run())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_for_reports(self) -> None:
        is_first = True
        while True:
            try:
                listener = await self._listening()
                if is_first or router.replicas(self._deployment) - listener.replicas():
                    is_first = False
                    await self._replicas.ask("report_to", listener.address)
            except Exception as e:  # noqa: BLE001 - without reports requests are routed by hash
                _log.warning("the replicas could not be asked to report: %s", e)
            await asyncio.sleep(_ASK_S)

    def _late(self, seconds: float) -> None:
        if self._shortest.value < math.inf:
            self._tell_late(seconds / (self._max_lateness * self._shortest.value))

    async def _look_for_departures(self) -> None:
        while True:
            self._move_streams(time.monotonic())
            self._start_failed = self.start_failed()
            await asyncio.sleep(_LOOK_S)

    def _move_streams(self, now: float) -> None:
        """Ends the streams of replicas that are leaving; `generate` goes on elsewhere."""
        places = {name: router.replica_of(name) for name in self._reading}
        due = self._departures.due(places.values(), router.replicas(self._deployment), now)
        for name, replica in places.items():
            if replica in due:
                self._reading[name].fail(ReplicaLeaving("the replica is leaving; send the request again", replica))

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        """As `Engines.generate`. If its replica is lost or is leaving, another one goes on after the tokens that have
        come, see `Progress`.

        Any other error would be the same on every replica. Raises AdapterQuarantined where the adapter seems to kill
        replicas.
        """
        if self._notes is not None and request.adapter is not None:
            self._notes.came(request.adapter)
        progress = Progress(request, self._max_resumes)
        while True:
            attempt = progress.attempt()
            try:
                async with aclosing(self._attempt(attempt, fit)) as deltas:
                    async for delta in deltas:
                        yield progress.took(delta)
                return
            except ReplicaUnavailable as e:
                self._failed(progress, attempt, e)
                if not isinstance(e, ReplicaLeaving):
                    await asyncio.sleep(_BACKOFF_S * 2 ** max(0, progress.num_failed - 1))

    def _failed(self, progress: Progress, attempt: GenerateRequest, error: ReplicaUnavailable) -> None:
        """Raises `error` unless another attempt follows."""
        if error.replica is not None:
            router.suspect(error.replica)
        progress.failed(error, error.replica)
        if progress.num_tokens > len(attempt.output_ids):
            self._resumes["moved" if isinstance(error, ReplicaLeaving) else "lost"] += 1
        request_id, so_far = attempt.request_id, progress.num_tokens
        _log.warning("request %s goes on elsewhere after %d tokens: %s", request_id, so_far, error)

    async def _attempt(self, request: GenerateRequest, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        digest, has_begun = None if request.adapter is None else request.adapter.digest, False
        began_at = time.monotonic()
        if digest is not None:
            await self._quarantine.enter(request.request_id, digest)
            if holders := router.holders(self._deployment, digest):
                request = replace(request, holders=holders)
        try:
            listener = await self._listening()
            inbox = self._reading[request.request_id] = listener.open()
            cold_start_s = partial(self._cold_start_s, request.request_id)
            response = self._calls.generate_to.remote(request, fit, listener.address, inbox.stream)
            call = Call(response, listener, inbox, cold_start_s)
            with reading(request, call.leave):
                async for delta in inbox:
                    if not has_begun:
                        has_begun, now = True, time.monotonic()
                        self._shortest.add(now - began_at, now)
                        router.answered(request.request_id)
                    if digest is not None:
                        self._quarantine.answered(digest)
                        digest = None
                    yield delta
        except BaseStarting:
            self._start_failed = True
            raise
        except ReplicaLost as e:
            e.replica = e.replica or router.replica_of(request.request_id)
            await self._died(request.request_id, e.replica)
            raise
        except EngineStopped as e:  # another replica's might stop of this request as well
            await self._died(request.request_id, router.replica_of(request.request_id), e.adapters)
            raise
        finally:
            self._reading.pop(request.request_id, None)
            self._cold.discard(request.request_id)
            self._quarantine.leave(request.request_id)
            router.forget(request.request_id)

    async def _died(self, request_id: str, replica: str | None, among: Collection[str] | None = None) -> None:
        if replica is not None:
            is_held = partial(router.is_held, self._deployment, replica)
            await self._quarantine.died(request_id, replica, router.replica_of, is_held, among)

    def _cold_start_s(self, request_id: str) -> float | None:
        """For which this request, which waits now, waits for a replica to be started; None: one runs."""
        if not self.is_cold():
            return None
        self._cold.add(request_id)
        return self._cold_start_timeout_s

    async def _listening(self) -> Listener:
        if self._listener is None or (self._listener.done() and self._listener.exception() is not None):
            self._listener = asyncio.create_task(_started(*self._place, self._tls, self._late))
        return await asyncio.shield(self._listener)

    async def close(self) -> None:
        """Ends all streams."""
        if self._listener is not None:
            await (await self._listening()).close()
        await self._quarantine.close()

    async def healthy(self) -> bool:
        return await self._replicas.healthy()

    def is_cold(self) -> bool:
        return self._cold_start_timeout_s is not None and not router.replicas(self._deployment)

    def start_failed(self) -> bool:
        return self._start_failed and self.is_cold()

    async def stats(self, layout: bool | frozenset[str] = False) -> list[ReplicaStatus]:
        return [a for a in await self._replicas.ask("stats", layout) if isinstance(a, ReplicaStatus)]

    async def metrics(self) -> list[list[Family] | None]:
        return [a if isinstance(a, list) else None for a in await self._replicas.ask("metrics")]

    async def autoscaling(self) -> AutoscalingStatus | None:
        found = await self._replicas.autoscaling()
        if found is None or found.target or not (self._cold and self.is_cold()):
            return found
        # Serve starts a replica by itself, and asks its policy again when it runs.
        return found.model_copy(update={"target": 1, "reason": "a request waits and a replica starts"})

    def routing_decisions(self) -> Mapping[str, int]:
        return router.decisions(self._deployment)

    def resumes(self) -> Mapping[str, int]:
        return self._resumes


async def _started(node: str, host: str, tls: SSLContext | None, late: Callable[[float], None]) -> Listener:
    listener = Listener(router.reports, late)
    await listener.start(node, host, tls)
    return listener
