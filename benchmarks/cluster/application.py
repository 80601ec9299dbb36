"""The product's Serve application with another router, `benchmarks.cluster.application:build`."""

from __future__ import annotations

from typing import Any

from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from benchmarks.cluster.routers import Default, Loray, Random, RoundRobin
from loray.spec import FleetSpec
from serve_apps.app import application

__all__ = ["Default", "Loray", "Random", "RoundRobin", "build"]

# Named here, where they are imported: Serve pickles a class by value if the module that it names defines it.
_CLASSES = {"loray": "Loray", "ray": "Default", "random": "Random", "round-robin": "RoundRobin"}


def build(args: dict[str, Any]) -> Application:
    """`args`: `fleet`, the product's own; `router`, a name; `record`, the file for what it decides."""
    fleet = FleetSpec.parse(args["fleet"], source="args of benchmarks.cluster.application:build")
    routing = RequestRouterConfig(
        request_router_class=f"{__name__}.{_CLASSES[args['router']]}", request_router_kwargs={"record": args["record"]}
    )
    return application(fleet, routing)
