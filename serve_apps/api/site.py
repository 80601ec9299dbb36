"""The ASGI application of the catalog's REST API and of the console. It does not import Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from loray import __version__
from loray.errors import LorayError
from loray.schemas.resources import DownloadResource, Problem
from loray.spec import TrainSpec
from loray.telemetry import get_logger
from serve_apps import auth
from serve_apps.api import problems
from serve_apps.api.routes import access as access_routes
from serve_apps.api.routes import adapters, aliases, jobs, uploads
from serve_apps.api.services import Services
from serve_apps.auth import Authenticator, Permissions, describe_keys
from serve_apps.batches import BatchRunner, GatewayLines
from serve_apps.console import ROUTES as CONSOLE_ROUTES
from serve_apps.console import CheckConsole, Console, Histories, Renderer, Sessions
from serve_apps.http import EchoRequestId, extend_openapi, new_request_id

_log = get_logger(__name__)

WATCH_S = 30.0  # between two comparisons of the jobs with Ray's

# Given as they are: FastAPI makes the routes of a router that is included anew for each application.
_ROUTES = [
    route
    for router in (
        access_routes.router,
        adapters.router,
        aliases.router,
        adapters.downloads_router,
        jobs.router,
        jobs.methods_router,
        access_routes.usage_router,
        adapters.tags_router,
        uploads.router,
    )
    for route in router.routes
]


async def _watch_jobs(services: Services) -> None:
    while True:
        await asyncio.sleep(WATCH_S)
        try:
            await asyncio.to_thread(services.watch_jobs)
        except LorayError as e:
            _log.warning("jobs are not compared with Ray's: %s", e)
        except Exception:  # noqa: BLE001 - the next comparison may succeed
            _log.exception("jobs are not compared with Ray's")


def create_app(services: Services, access: Authenticator, lines: GatewayLines | None = None) -> FastAPI:
    """Create the ASGI application. Its paths are relative to the route prefix /api/v1. `lines`: the gateway that
    answers batches; None: nobody works on them here.

    The routes are those of the process; what they use is in `app.state.services` and `app.state.console`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await access.start()
        tasks = [asyncio.create_task(_watch_jobs(services))]
        if lines is not None and services.settings.files:
            runner = BatchRunner(lambda: services.catalog, lambda: services.store.objects, lines)
            tasks.append(asyncio.create_task(runner.run()))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await access.stop()
        await services.gateway.close()
        services.close()

    app = FastAPI(
        title="loray catalog",
        version=__version__,
        description="Adapters, versions, aliases and training jobs. Errors are application/problem+json (RFC 9457).",
        lifespan=lifespan,
        routes=[*_ROUTES, *CONSOLE_ROUTES, *auth.router.routes],
        docs_url=None,
        redoc_url=None,
    )
    permissions = Permissions(app.routes)
    sessions, renderer = Sessions(services.catalog_of), Renderer(problems.failed)
    app.state.services = services
    app.state.console = Console(services, access, sessions, renderer, Histories())
    problems.install(app)
    app.add_middleware(
        CheckConsole,
        access=access,
        permissions=permissions,
        refused=problems.failed,
        rates=services.rates,
        sessions=sessions,
        renderer=renderer,
    )
    app.add_middleware(EchoRequestId, make=new_request_id)
    # Routes read and write these themselves, so FastAPI does not know their schemas.
    extend_openapi(
        app,
        [(TrainSpec, "validation"), (Problem, "serialization"), (DownloadResource, "serialization")],
        lambda document: describe_keys(document, permissions),
    )
    return app
