"""The process of `loray serve`: an engine, a gateway and the catalog's API behind one uvicorn server, without Ray."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client.core import Metric as Family
from starlette.responses import JSONResponse
from starlette.routing import Router
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jobs.submission.server import HomeJobServer
from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.errors import ClusterError, EngineError
from loray.local.serving import ServingAddress
from loray.schemas.status import AdapterPlacement, AutoscalingStatus, ReplicaStatus
from loray.settings import Settings
from loray.spec import FleetSpec, GenerateRequest, ServeSpec, TokenDelta
from serve_apps.accounting.access_log import log_access
from serve_apps.api.services import Services
from serve_apps.api.site import create_app as create_api
from serve_apps.auth import open_auth
from serve_apps.console import GatewayClient
from serve_apps.deployment import CATALOG_PREFIX, DRAIN_S, TINKER_PREFIX
from serve_apps.gateway.app import open_gateway
from serve_apps.python_gc import collect_when_quiet, freeze_garbage
from serve_apps.replica.metrics import LoadCounts, ReplicaMetrics, placements, replica_status
from serve_apps.replica.requests import LocalStreams, ReplicaRequests
from serve_apps.replica.startup import adapter_loader, set_num_threads, start_engine
from serve_apps.tracing import Tracing

REPLICA = "local"  # the engine's name where replicas have one
HEADERS_S = 10.0  # for a request's headers to come, the first one's from the connection on
SEND_S = 60.0  # in which a client takes a byte of what it is sent
_KEEP_ALIVE_S = 75  # longer than clients and load balancers keep idle connections, so that they close them first
_NO_TINKER = "`loray serve` trains nothing: Tinker's protocol is served by `loray up`"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TICKS_PER_CHECK = 10  # of uvicorn's main loop, ten a second


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with an end to a connection whose headers do not come within HEADERS_S."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._headers_due is None:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADERS_S, self._are_late)

    def _are_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_headers()  # of the next request, which is not its turn yet
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


class LocalEngineClient:
    """Implements `serve_apps.gateway.bases.EngineClient` and `serve_apps.console.Placements` with one engine."""

    def __init__(self, stream: AsyncEngine, tracing: Tracing | None = None, loads: LoadCounts | None = None) -> None:
        self._stream = stream
        self._metrics = ReplicaMetrics(loads=loads)
        self._streams = LocalStreams(ReplicaRequests(stream, self._metrics, tracing=tracing))
        self._started_at = time.time()

    def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        return self._streams.generate(request, fit=fit)

    def running(self, late: Callable[[float], None]) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def check_health(self) -> None:
        """Raise EngineError if the engine has stopped."""
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

    async def stats(self) -> list[ReplicaStatus]:
        if not await self.healthy():
            return []
        return [replica_status(self._stream, REPLICA, self._started_at)]

    async def retire(self, digests: Collection[str]) -> None:
        await self._stream.retire(digests)

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


class LocalJobServer(HomeJobServer):
    """Runs jobs of this home. It sends none to other machines, which have another store and catalog."""

    def _address(self) -> str:
        if self._settings.is_remote:
            raise ClusterError(
                f"`loray serve` sends no jobs to another machine ({self._settings.address}); use `loray train`, or the "
                "API of `loray up`"
            )
        return super()._address()


class Site:
    """Chooses between the gateway and the API by path. They start and end together."""

    def __init__(self, gateway: FastAPI, api: FastAPI, end_streams: Callable[[], None]) -> None:
        """`end_streams`: lets the console's pages go, for which a server that stops need not wait."""
        self._gateway, self._api, self.end_streams = gateway, api, end_streams
        self._prefix = f"{CATALOG_PREFIX}/"

        @asynccontextmanager
        async def lifespan(_: object) -> AsyncIterator[None]:
            async with gateway.router.lifespan_context(gateway), api.router.lifespan_context(api):
                yield

        self._lifespan = Router(lifespan=lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._lifespan(scope, receive, send)
        elif scope["path"].startswith(self._prefix):
            await self._api({**scope, "root_path": CATALOG_PREFIX}, receive, send)
        elif scope["path"].startswith(f"{TINKER_PREFIX}/"):
            await JSONResponse({"detail": _NO_TINKER}, 404)(scope, receive, send)
        else:
            await self._gateway(scope, receive, send)


def create_site(
    spec: ServeSpec, settings: Settings, engines: LocalEngineClient, tracing: Tracing | None = None
) -> Site:
    """Make the application of this home's catalog and store."""
    access = open_auth(settings, spec.host)
    jobs = LocalJobServer(settings)
    services = Services(settings, jobs, engines, GatewayClient(ServingAddress(spec.host, spec.port).url))
    gateway = open_gateway(FleetSpec.of(spec), settings, lambda _: engines, access=access, tracing=tracing, jobs=jobs)
    api = log_access(create_api(services, access, gateway.state.lines), settings.access_log)
    return Site(gateway, api, services.streams.end)


class UvicornServer(uvicorn.Server):
    """Serves until SIGINT or SIGTERM. Then it takes no more requests, and waits up to DRAIN_S for those under way; a
    second signal ends them. It also ends, with `failure`, when the engine has stopped.

    check_health  raises EngineError if the engine has stopped
    started       called once the server answers
    stopping      called with the number of requests under way when the first signal comes
    """

    def __init__(
        self,
        site: Site,
        *,
        check_health: Callable[[], None],
        started: Callable[[], None],
        stopping: Callable[[int], None],
    ) -> None:
        config = uvicorn.Config(
            site,
            loop="uvloop",
            http=BoundedProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(DRAIN_S),
        )
        super().__init__(config)
        self.failure: EngineError | None = None
        self._check_health, self._on_started, self._on_stopping = check_health, started, stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for sock in sockets or ():
            bound_silence(sock)
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()  # which uvicorn leaves out after a second signal

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_PER_CHECK == 0:
            try:
                self._check_health()
            except EngineError as e:
                self.failure = e
                return True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replace uvicorn's handlers, which raise the signals again at the end, and ignore a second SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if not self.should_exit:
            self.should_exit = True
            self._on_stopping(len(self.server_state.tasks))
            return
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # its request is cancelled as if the client had left


def bound_silence(listener: socket.socket) -> None:
    """End the connections of a listener whose clients take nothing for SEND_S. Only Linux' kernel can; elsewhere
    requests end after `request_timeout_s`.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_S))


def run(
    spec: ServeSpec,
    base: BaseModel,
    settings: Settings,
    listener: socket.socket,
    *,
    started: Callable[[], None],
    stopping: Callable[[int], None],
) -> None:
    """Serve at `listener` until a signal ends it. Raises EngineError if the engine stops before.

    started   called once the server answers
    stopping  called with the number of requests under way when the first signal comes
    """
    spec = set_num_threads(spec)
    loader = adapter_loader(base, settings)
    stream = start_engine(spec, base, loader)
    try:
        from serve_apps.tracing import open_tracing

        tracing = open_tracing("server", REPLICA)
        engines = LocalEngineClient(stream, tracing, loader.counts)
        site = create_site(spec, settings, engines, tracing)
        freeze_garbage()
        collect_when_quiet(lambda: stream.stats().is_idle)

        def ending(num_requests: int) -> None:
            site.end_streams()
            stopping(num_requests)

        server = UvicornServer(site, check_health=engines.check_health, started=started, stopping=ending)
        server.run(sockets=[listener])
    finally:
        stream.stop()
    if server.failure is not None:
        raise server.failure
