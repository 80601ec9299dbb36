"""The Serve application `catalog`: `serve_apps.api.app:build`. It has a process of its own, apart from the gateway."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from loray.errors import SpecError
from loray.settings import Settings
from serve_apps.api.services import Services
from serve_apps.api.site import create_app
from serve_apps.deployment import APPLICATION, ENGINE

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
