"""A tiny engine behind both kinds of gateways, in one event loop: that of `loray serve`, and one that reaches its
replica through the data plane. Their spans are kept in memory.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loray.engine.async_engine import AsyncEngine
from loray.settings import Settings
from loray.spec import FleetSpec, GenerateRequest, ServeSpec
from serve_apps.channel.connection import Connections
from serve_apps.channel.frames import ChannelAddress
from serve_apps.gateway.app import open_gateway
from serve_apps.gateway.replicas.engines import ServeEngineClient
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.requests import ReplicaRequests
from serve_apps.standalone.server import LocalEngineClient, create_site
from serve_apps.tracing import Tracing
from tests.fixtures.channel import NODE, until

Place = Callable[["Deployed"], Any]


class Deployed:
    """What both kinds of servers are made of. `spans`: those that have ended, by name."""

    def __init__(self, spec: ServeSpec, settings: Settings, stream: AsyncEngine) -> None:
        self.spec, self.settings, self.stream = spec, settings, stream
        self._exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    @property
    def spans(self) -> dict[str, list[ReadableSpan]]:
        found: dict[str, list[ReadableSpan]] = {}
        for span in self._exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found


class _Replica:
    """Stands in for the Serve handle of one replica, to which requests come as pickles."""

    def __init__(self, requests: ReplicaRequests) -> None:
        self.requests, self.connections = requests, Connections(NODE, "replica")
        self.generate_to = self

    def options(self, **_: Any) -> _Replica:
        return self

    def broadcast(self, method: str, gateway: ChannelAddress) -> _Replica:
        return self

    def results(self, **_: Any) -> list[None]:
        return []

    def remote(self, request: GenerateRequest, fit: bool, gateway: ChannelAddress, stream: int) -> _Call:
        return _Call(self, pickle.loads(pickle.dumps(request)), fit, gateway, stream)


class _Call:
    def __init__(
        self, replica: _Replica, request: GenerateRequest, fit: bool, gateway: ChannelAddress, stream: int
    ) -> None:
        self._replica, self._request, self._fit, self._to = replica, request, fit, (gateway, stream)
        self._replica_result_future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def _fetch_future_result_async(self) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[str]:
        gateway, stream = self._to
        connection = await self._replica.connections.to(gateway)
        await self._replica.requests.run(self._request, self._fit, connection, stream)
        yield connection.name

    def cancel(self) -> None:
        pass


@asynccontextmanager
async def serve(deployed: Deployed) -> AsyncIterator[httpx.AsyncClient]:
    """`loray serve`."""
    engines = LocalEngineClient(deployed.stream, deployed.tracing)
    site = create_site(deployed.spec, deployed.settings, engines, deployed.tracing)
    async with AsyncExitStack() as held:
        for app in (site._gateway, site._api):
            await held.enter_async_context(app.router.lifespan_context(app))
        yield await held.enter_async_context(_client(site))


@asynccontextmanager
async def data_plane(deployed: Deployed) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway of `loray up` and one replica."""
    replica = _Replica(ReplicaRequests(deployed.stream, ReplicaMetrics(), tracing=deployed.tracing))
    engines = ServeEngineClient(replica, "engine-tiny", NODE, "127.0.0.1")  # type: ignore[arg-type]
    app = open_gateway(FleetSpec.of(deployed.spec), deployed.settings, lambda _: engines, tracing=deployed.tracing)
    async with AsyncExitStack() as held:
        held.push_async_callback(engines.close)
        held.callback(replica.connections.close)
        await held.enter_async_context(app.router.lifespan_context(app))
        yield await held.enter_async_context(_client(app))
        await until(lambda: not replica.requests._traces)


def _client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=60)
