"""The Serve application `catalog`: the REST API and the console, and how they ask replicas which adapters they have."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from loray.errors import EngineError
from loray.local.serving import ServingAddress
from loray.schemas.status import AdapterPlacement
from loray.settings import Settings
from loray.spec import APPLICATION, GATEWAY, Frozen, is_engine
from serve_apps.accounting.access_log import log_access
from serve_apps.api.services import Services
from serve_apps.api.site import create_app
from serve_apps.auth import open_auth
from serve_apps.batches import BaseLoad, LineAnswer
from serve_apps.console import GatewayClient
from serve_apps.deployment import ON_THE_HEAD
from serve_apps.http import WithoutRequestId

_TIMEOUT_S = 5.0
API = "api"
_MAX_ONGOING = 256  # including clients that follow a job's log


class ServePlacements:
    """Asks the replicas of `application`, whose bases may change meanwhile, for their adapters."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    async def adapters(self, digests: list[str]) -> list[AdapterPlacement]:
        names = await asyncio.to_thread(self._engines)
        self._handles = {name: handle for name, handle in self._handles.items() if name in names}
        answers = await asyncio.gather(*(self._ask(name, digests) for name in names))
        return [placement for answer in answers for placement in answer]

    def _engines(self) -> list[str]:
        try:
            application = serve.status().applications.get(self._application)
        except RayServeException:
            return []
        return [] if application is None else sorted(filter(is_engine, application.deployments))

    async def _ask(self, deployment: str, digests: list[str]) -> list[AdapterPlacement]:
        try:
            if deployment not in self._handles:
                self._handles[deployment] = serve.get_deployment_handle(deployment, self._application)
            answers = (
                await self._handles[deployment]
                .broadcast("adapters", digests)
                .results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
            )
        except (RayServeException, TimeoutError):  # it has just been removed, or it is starting
            return []
        return [placement for answer in answers if isinstance(answer, list) for placement in answer]


class ServeLines:
    """Implements `serve_apps.batches.GatewayLines` with any gateway of `application`."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._handle: DeploymentHandle[Any] | None = None

    async def run_line(self, key_id: str | None, tenant: str, endpoint: str, body: bytes) -> LineAnswer:
        answer: LineAnswer = await self._ask("run_line", key_id, tenant, endpoint, body)
        return answer

    async def bases_of(self, key_id: str | None, tenant: str, models: Collection[str]) -> Mapping[str, str | None]:
        bases: Mapping[str, str | None] = await self._ask("bases_of", key_id, tenant, models)
        return bases

    async def loads(self) -> Mapping[str, BaseLoad]:
        loads: Mapping[str, BaseLoad] = await self._ask("loads")
        return loads

    async def _ask(self, method: str, *arguments: object) -> Any:
        """Raises EngineError where no gateway answers, or the one that was asked has died."""
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(serve.get_deployment_handle, GATEWAY, self._application)
            response = getattr(self._handle, method).remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
        except (RayError, RayServeException) as e:
            raise EngineError(f"no gateway has answered: {e}") from e


class ApiSpec(Frozen):
    """`host`, `port`: where Serve listens. No key is needed until one is made where both this and Serve's own host are
    loopback; elsewhere one always is.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, gt=0, lt=65536)


def build(args: dict[str, Any]) -> Application:
    """Build the application. `args` are ApiSpec's fields; the environment (LORAY_*) configures the rest.

    Raises SpecError on a wrong field.
    """
    spec = ApiSpec.parse(args, source="args of serve_apps.api.app:build")
    settings = Settings.from_env()
    environment = {"env_vars": settings.to_env(secrets=False) | settings.to_serving_env()}

    def app() -> FastAPI:  # called in the API's process
        return _app(spec)

    api = serve.deployment(
        serve.ingress(app)(),
        name=API,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0, "resources": ON_THE_HEAD, "runtime_env": environment},
        health_check_period_s=5.0,
    )
    return api.bind()


def _app(spec: ApiSpec) -> FastAPI:
    from jobs.submission.server import RayJobServer
    from loray.telemetry import configure_logging
    from serve_apps.serve_internals import reachable_host

    settings = Settings.from_env()
    configure_logging(settings.log_level)
    gateway = GatewayClient(ServingAddress(spec.host, spec.port).url)
    services = Services(settings, RayJobServer(), ServePlacements(APPLICATION), gateway)
    access = open_auth(settings, reachable_host(spec.host))
    app = log_access(create_app(services, access, ServeLines(APPLICATION)), settings.access_log)
    app.add_middleware(WithoutRequestId)
    return app
