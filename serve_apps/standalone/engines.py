"""The engine of this process, for the gateway and for the catalog's API."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress

from prometheus_client.core import Metric as Family

from loray.api.status import AdapterPlacement, AutoscalingStatus, ReplicaStatus
from loray.engine.stream import EngineStream
from loray.errors import EngineError
from loray.spec import GenerateRequest, TokenDelta
from serve_apps.replica.local import LocalStreams
from serve_apps.replica.metrics import LoadCounts, ReplicaMetrics
from serve_apps.replica.report import placements, replica_status
from serve_apps.replica.requests import Requests
from serve_apps.tracing import Tracing

REPLICA = "local"  # the engine's name where replicas have one


class LocalEngines:
    """Implements `serve_apps.gateway.engines.Engines` and `serve_apps.api.services.Placements` with one engine."""

    def __init__(self, stream: EngineStream, tracing: Tracing | None = None, loads: LoadCounts | None = None) -> None:
        self._stream = stream
        self._metrics = ReplicaMetrics(loads=loads)
        self._streams = LocalStreams(Requests(stream, self._metrics, tracing=tracing))
        self._started_at = time.time()

    def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        return self._streams.generate(request, fit=fit)

    def running(self, late: Callable[[float], None]) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def check_health(self) -> None:
        """Raises EngineError if the engine has stopped."""
        self._stream.check_health()

    async def healthy(self) -> bool:
        with suppress(EngineError):
            self.check_health()
            return True
        return False

    def is_cold(self) -> bool:
        return False

    def start_failed(self) -> bool:
        return False

    async def stats(self, layout: bool | frozenset[str] = False) -> list[ReplicaStatus]:
        if not await self.healthy():
            return []
        return [await replica_status(self._stream, REPLICA, self._started_at, layout)]

    async def autoscaling(self) -> AutoscalingStatus | None:
        return None

    async def metrics(self) -> list[list[Family] | None]:
        return [self._metrics.families(self._stream.stats(), REPLICA)]

    def routing_decisions(self) -> Mapping[str, int]:
        return {}

    def resumes(self) -> Mapping[str, int]:
        return {}

    async def adapters(self, digests: list[str]) -> list[AdapterPlacement]:
        return await placements(self._stream, REPLICA, digests)
