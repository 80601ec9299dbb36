"""Questions to all replicas of the engine."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from loray.api.status import AutoscalingStatus
from serve_apps.scaling.log import ScalingLog

_STATS_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 1.0  # the timeout of Kubernetes' probes


class Broadcast:
    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="broadcast")

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """Calls `method` of every replica. Returns each result or exception; nothing if there are no replicas.

        It runs in a thread: if one replica does not answer, only Serve's blocking call returns the others' results.
        """
        call = partial(
            self._handle.broadcast(method, *args).results, timeout_s=_STATS_TIMEOUT_S, return_exceptions=True
        )
        try:
            return list(await asyncio.get_running_loop().run_in_executor(self._threads, call))
        except (TimeoutError, DeploymentUnavailableError):
            return []

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

    async def autoscaling(self) -> AutoscalingStatus | None:
        log = ScalingLog(self._handle.deployment_id.app_name, self._handle.deployment_id.name)
        return await asyncio.get_running_loop().run_in_executor(self._threads, log.read)
