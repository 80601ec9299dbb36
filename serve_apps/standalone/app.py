"""The ASGI application of `loray serve`: the gateway, and the catalog's API below /api/v1, as Ray Serve has them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from loray.local.serving import Address
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from serve_apps.access import open_access
from serve_apps.accounting.access_log import log_access
from serve_apps.api.services import Services
from serve_apps.api.site import create_app as create_api
from serve_apps.console import Gateway
from serve_apps.deployment import CATALOG_PREFIX
from serve_apps.gateway.app import open_gateway
from serve_apps.standalone.jobs import LocalJobServer

if TYPE_CHECKING:
    from serve_apps.standalone.engines import LocalEngines
    from serve_apps.tracing import Tracing


class Site:
    """Two applications by path. They start and end together."""

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
        else:
            await self._gateway(scope, receive, send)


def create_site(spec: ServeSpec, settings: Settings, engines: LocalEngines, tracing: Tracing | None = None) -> Site:
    """The application of this home's catalog and store."""
    access = open_access(settings, spec.host)
    services = Services(settings, LocalJobServer(settings), engines, Gateway(Address(spec.host, spec.port).url))
    api = log_access(create_api(services, access), settings.access_log)
    gateway = open_gateway(FleetSpec.of(spec), settings, lambda _: engines, access=access, tracing=tracing)
    return Site(gateway, api, services.streams.end)
