"""The Serve application `catalog`: `serve_apps.api.app:build`. It has a process of its own, apart from the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from ray import serve
from ray.serve import Application

from loray import __version__
from loray.api.resources import Problem
from loray.errors import SpecError
from loray.settings import Settings
from loray.spec import TrainSpec
from serve_apps.api import problems
from serve_apps.api.routes import adapters as adapter_routes
from serve_apps.api.routes import aliases as alias_routes
from serve_apps.api.routes import jobs as job_routes
from serve_apps.api.routes import recommend as recommend_routes
from serve_apps.api.services import Services
from serve_apps.deployment import APPLICATION, ENGINE
from serve_apps.http import extend_openapi

API = "api"
_MAX_ONGOING = 256  # including clients that follow a job's log


def build(args: dict[str, Any]) -> Application:
    """Builds the application. `args` must be empty, else SpecError: the environment (LORAY_*) configures it."""
    if args:
        raise SpecError(f"serve_apps.api.app:build takes no args, but got {', '.join(args)}")
    environment = {"env_vars": Settings.from_env().to_env(secrets=False)}
    api = serve.deployment(
        serve.ingress(_app)(),
        name=API,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
        health_check_period_s=5.0,
    )
    return api.bind()


def _app() -> FastAPI:
    from jobs.submission.server import RayJobServer
    from loray.telemetry import configure_logging
    from serve_apps.api.placement import ServePlacements

    settings = Settings.from_env()
    configure_logging(settings.log_level)
    return create_app(Services(settings, RayJobServer(), ServePlacements(ENGINE, APPLICATION)))


def create_app(services: Services) -> FastAPI:
    """Creates the ASGI application. Its paths are relative to the route prefix /api/v1."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        services.close()

    app = FastAPI(
        title="loray catalog",
        version=__version__,
        description="Adapters, versions, aliases and training jobs. Errors are application/problem+json (RFC 9457).",
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
    )
    problems.install(app)
    for routes in (adapter_routes, alias_routes, job_routes, recommend_routes):
        app.include_router(routes.create_router(services))
    # Routes read recipes and write problems themselves, so FastAPI does not know their schemas.
    extend_openapi(app, [(TrainSpec, "validation"), (Problem, "serialization")])
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name
