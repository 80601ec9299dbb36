"""The gateway's access to the engine's replicas: streams of deltas, with retries until the first delta arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from prometheus_client.core import Metric as Family
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from loray.api.status import AutoscalingStatus, ReplicaStatus
from loray.errors import EngineError, LorayError, Overloaded, ReplicaUnavailable
from loray.spec import GenerateRequest, TokenDelta
from loray.telemetry import get_logger
from serve_apps.gateway.replicas import router
from serve_apps.scaling.log import ScalingLog

_log = get_logger(__name__)

ATTEMPTS = 3
_BACKOFF_S = 0.2
_STATS_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 1.0  # the timeout of Kubernetes' probes
_NO_REPLICA_S = 30.0  # usually longer than Serve needs to replace a replica
_REPLICA_LOST = (RayActorError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError)


class ServeEngines:
    """The engines behind a Ray Serve handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="broadcast")

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        """As `Engines.generate`. A request is retried only if its replica was lost or had stopped.

        Any other error would be the same on every replica.
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
        """Returns at the first replica that is healthy."""
        checks: list[asyncio.Future[Any]] = []
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                # Private: Serve's public `results` waits for every replica.
                answers = await self._handle.broadcast("check_health")._fetch_replica_results_async()
                checks = [asyncio.ensure_future(answer.get_async()) for answer in answers]
                for checked in asyncio.as_completed(checks):
                    with suppress(Exception):
                        await checked
                        return True
        except (TimeoutError, DeploymentUnavailableError):
            pass
        finally:
            for future in checks:
                future.cancel()
            await asyncio.gather(*checks, return_exceptions=True)
        return False

    async def stats(self) -> list[ReplicaStatus]:
        return [a for a in await self._broadcast("stats") if isinstance(a, ReplicaStatus)]

    async def metrics(self) -> list[list[Family] | None]:
        return [a if isinstance(a, list) else None for a in await self._broadcast("metrics")]

    def routing_decisions(self) -> Mapping[str, int]:
        return router.decisions()

    async def _broadcast(self, method: str) -> list[Any]:
        """Calls `method` of every replica. Returns each result or exception; nothing if there are no replicas.

        It runs in a thread: if one replica does not answer, only Serve's blocking call returns the others' results.
        """
        call = partial(self._handle.broadcast(method).results, timeout_s=_STATS_TIMEOUT_S, return_exceptions=True)
        try:
            return list(await asyncio.get_running_loop().run_in_executor(self._threads, call))
        except (TimeoutError, DeploymentUnavailableError):
            return []


async def _accepted(response: DeploymentResponseGenerator[Any]) -> None:
    """Waits until a replica accepts the request. EngineError after a time, without which Serve would wait for ever."""
    try:
        async with asyncio.timeout(_NO_REPLICA_S):
            await response._fetch_future_result_async()  # private: no public call returns when a request is accepted
    except TimeoutError as e:
        raise EngineError("no replica takes requests; `loray status` says why") from e


def _cause(error: RayTaskError) -> Exception:
    """The error that the replica raised. Ray wraps it into an exception that is an instance of both classes."""
    cause = error.cause
    if isinstance(cause, LorayError):
        return cause
    return cause if isinstance(cause, Exception) else error
