"""The engine's replicas as the gateway sees them: streams of deltas, sent again while nothing has come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

from prometheus_client.core import Metric as Family
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from loray.api.status import AutoscalingStatus, ReplicaStatus
from loray.errors import EngineError, LorayError, Overloaded, ReplicaUnavailable
from loray.spec import Delta, GenerateRequest
from loray.telemetry import get_logger
from serve_apps.gateway.router import suspect
from serve_apps.scaling.log import ScalingLog

_log = get_logger(__name__)

ATTEMPTS = 3
_BACKOFF_S = 0.2
_STATS_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 1.0  # as long as Kubernetes' probes wait
_NO_REPLICA_S = 30.0  # longer than a replica needs to be replaced, as a rule
_REPLICA_LOST = (RayActorError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError)


class Engines(Protocol):
    def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[Delta, None]:
        """Deltas as they come. Closing it cancels the request. Raises LorayError.

        `fit`: max_tokens is an upper bound, lowered to what there is room for.
        """

    async def healthy(self) -> bool:
        """Whether a replica answers, and its engine runs."""

    async def stats(self) -> list[ReplicaStatus]:
        """Of the replicas that answer."""

    async def autoscaling(self) -> AutoscalingStatus | None:
        """None where nothing has been decided yet."""

    async def metrics(self) -> list[list[Family] | None]:
        """Of each replica, its Prometheus families; None for one that does not answer in time."""


class ServeEngines:
    """Engines behind a Ray Serve handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="broadcast")

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[Delta, None]:
        """A request is sent again only where a replica was lost or had stopped: what an engine says holds for all."""
        for attempt in range(ATTEMPTS):
            async with aclosing(self._attempt(request, attempt, fit)) as deltas:
                started = False
                try:
                    async for delta in deltas:
                        started = True
                        yield delta
                except ReplicaUnavailable as e:
                    if e.replica is not None:
                        suspect(e.replica)
                    if started or attempt == ATTEMPTS - 1:
                        raise
                    _log.warning("request %s is sent again: %s", request.request_id, e)
                else:
                    return
            await asyncio.sleep(_BACKOFF_S * 2**attempt)

    async def _attempt(self, request: GenerateRequest, attempt: int, fit: bool) -> AsyncGenerator[Delta, None]:
        if attempt > 0:
            request = replace(request, request_id=f"{request.request_id}-{attempt}")
        response = self._stream.generate.remote(request, fit)
        finished = False
        try:
            await _accepted(response)
            async for delta in response:
                yield delta
            finished = True
        except RayTaskError as e:
            finished = True
            raise _cause(e) from e
        except _REPLICA_LOST as e:
            finished = True
            raise ReplicaUnavailable("the replica that served this request was lost; send it again") from e
        except DeploymentUnavailableError as e:
            finished = True
            raise ReplicaUnavailable("no replica is running; `loray status` says why") from e
        except BackPressureError as e:
            finished = True
            raise Overloaded("too many requests wait for a replica; try again later", retry_after_s=1.0) from e
        finally:
            if not finished:
                response.cancel()

    async def autoscaling(self) -> AutoscalingStatus | None:
        log = ScalingLog(self._handle.deployment_id.app_name, self._handle.deployment_id.name)
        return await asyncio.get_running_loop().run_in_executor(self._threads, log.read)

    async def healthy(self) -> bool:
        """At the first good answer; Serve's `results` wait for everybody's."""
        asked: list[asyncio.Future[Any]] = []
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                answers = await self._handle.broadcast("check_health")._fetch_replica_results_async()
                asked = [asyncio.ensure_future(answer.get_async()) for answer in answers]
                for answered in asyncio.as_completed(asked):
                    with suppress(Exception):
                        await answered
                        return True
        except (TimeoutError, DeploymentUnavailableError):
            pass
        finally:
            for future in asked:
                future.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return False

    async def stats(self) -> list[ReplicaStatus]:
        return [a for a in await self._ask_all("stats") if isinstance(a, ReplicaStatus)]

    async def metrics(self) -> list[list[Family] | None]:
        return [a if isinstance(a, list) else None for a in await self._ask_all("metrics")]

    async def _ask_all(self, method: str) -> list[Any]:
        """Each replica's answer, or the exception that stands for it; none where there are no replicas.

        In a thread, as only Serve's blocking call gives the others' answers when one replica is silent.
        """
        ask = partial(self._handle.broadcast(method).results, timeout_s=_STATS_TIMEOUT_S, return_exceptions=True)
        try:
            return list(await asyncio.get_running_loop().run_in_executor(self._threads, ask))
        except (TimeoutError, DeploymentUnavailableError):
            return []


async def _accepted(response: DeploymentResponseGenerator[Any]) -> None:
    """EngineError where no replica takes the request. Serve would wait however long, as its replicas may come back."""
    try:
        async with asyncio.timeout(_NO_REPLICA_S):
            await response._fetch_future_result_async()
    except TimeoutError as e:
        raise EngineError("no replica takes requests; `loray status` says why") from e


class ChoiceDelta(NamedTuple):
    choice: int
    delta: Delta


async def merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[ChoiceDelta, None]:
    """All streams' deltas as they come. The first failure is raised; it, and closing, close every stream."""
    queue: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue()

    async def pump(choice: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    queue.put_nowait(ChoiceDelta(choice, delta))
        except Exception as e:  # noqa: BLE001 - raised again by the reader
            queue.put_nowait(e)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(i, s)) for i, s in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            match await queue.get():
                case None:
                    num_open -= 1
                case ChoiceDelta() as delta:
                    yield delta
                case error:
                    raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _cause(error: RayTaskError) -> Exception:
    """What was raised in the replica. Ray wraps it into a class of its own that is an instance of both."""
    cause = error.cause
    if isinstance(cause, LorayError):
        return cause
    return cause if isinstance(cause, Exception) else error
