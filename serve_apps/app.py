"""The Serve application `serve_apps.app:build`, for `loray up`, `serve run`, `serve deploy` and RayService."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from loray.bases.registry import get_base
from loray.settings import Settings
from loray.spec import ServeSpec
from serve_apps.deployment import DRAIN_S, ENGINE, GATEWAY
from serve_apps.gateway.replicas.router import ROUTER_CLASS, AdapterRouter
from serve_apps.replica.ranks import bundles
from serve_apps.replica.replica import EngineReplica
from serve_apps.scaling.policy import AdapterDemandPolicy, autoscaling_config

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

    from serve_apps.gateway.gateway import Gateway

__all__ = ["ENGINE", "GATEWAY", "AdapterDemandPolicy", "AdapterRouter", "application", "build"]

_SPARE_SLOTS = 64  # more than the engine admits, so that the engine refuses a request, with a time to retry


def build(args: dict[str, Any]) -> Application:
    """Builds the application. `args` are ServeSpec's fields; the environment (LORAY_*) names catalog and store.

    Raises SpecError on a wrong field, BaseNotFound if the base is not on this machine.
    """
    spec = ServeSpec.parse(args, source="args of serve_apps.app:build")
    return application(spec, RequestRouterConfig(request_router_class=ROUTER_CLASS))


def application(spec: ServeSpec, routing: RequestRouterConfig) -> Application:
    """The application with a given request router."""
    settings = Settings.from_env()
    get_base(settings.home, spec.base)
    environment = {"env_vars": settings.to_env(secrets=False) | settings.to_serving_env()}
    slots = spec.max_num_seqs + spec.max_queued + spec.max_loading + _SPARE_SLOTS
    group = settings.training_group
    where = {} if group is None else {"label_selector": group.others}  # an engine's CPU keeps it from there anyway

    def gateway_app() -> FastAPI:  # called in the gateway's process
        return _gateway(spec)

    engine = serve.deployment(
        EngineReplica,
        name=ENGINE,
        **_replicas(spec),
        max_ongoing_requests=slots,
        max_queued_requests=slots,
        request_router_config=routing,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": 1 if spec.device.startswith("cuda") else 0,
            "runtime_env": environment,
        },
        placement_group_bundles=bundles(spec) if spec.tensor_parallel_size > 1 else None,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    gateway = serve.deployment(
        serve.ingress(gateway_app)(GatewayReplica),
        name=GATEWAY,
        num_replicas=spec.num_gateways,
        max_ongoing_requests=slots * spec.max_replicas,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment, **where},
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=DRAIN_S,  # a stream needs gateway and engine until it ends
    )
    return gateway.bind(engine.bind(spec))


def _host(spec: ServeSpec) -> str:
    """Where this gateway takes tokens from other nodes."""
    import ray

    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    if alone and spec.host in ("127.0.0.1", "localhost", "::1"):
        return "127.0.0.1"
    return str(ray.util.get_node_ip_address())


class GatewayReplica:
    """What a gateway answers other gateways. Serve adds its HTTP application, as `app`."""

    app: FastAPI

    def __init__(self, engine: object) -> None:
        """`engine`: makes that deployment a part of the application."""

    def metrics(self) -> list[Family]:
        """Prometheus families of this gateway."""
        gateway: Gateway = self.app.state.gateway
        return gateway.own_families()


def _replicas(spec: ServeSpec) -> dict[str, Any]:
    scaling = autoscaling_config(spec)
    return {"num_replicas": spec.num_replicas} if scaling is None else {"autoscaling_config": scaling}


def _gateway(spec: ServeSpec) -> FastAPI:
    import ray

    from loray.catalog import Catalog
    from loray.telemetry import configure_logging
    from serve_apps.accounting.owner import RayExchange
    from serve_apps.garbage import freeze_garbage
    from serve_apps.gateway.answers.headers import WithoutRequestId
    from serve_apps.gateway.app import open_gateway
    from serve_apps.gateway.replicas.engines import ServeEngines
    from serve_apps.gateway.replicas.gateways import ServeGateways
    from serve_apps.tracing import open_tracing

    settings = Settings.from_env()
    configure_logging(settings.log_level)
    here = serve.get_replica_context()
    handle = serve.get_deployment_handle(ENGINE, here.app_name)
    node = ray.get_runtime_context().get_node_id()
    engines = ServeEngines(
        handle,
        node,
        _host(spec),
        lambda: Catalog(settings.catalog, actor="gateway"),
        max_resumes=spec.max_resumes,
        drain_grace_s=spec.drain_grace_s,
    )
    gateways = ServeGateways(serve.get_deployment_handle(GATEWAY, here.app_name), here.replica_id.unique_id)
    exchange = None
    if spec.num_gateways > 1:
        exchange = RayExchange(here.app_name, gateways.name, spec.num_gateways, settings)
    tracing = open_tracing("gateway", gateways.name)
    gateway = open_gateway(spec, settings, engines, gateways, exchange, tracing=tracing)
    gateway.add_middleware(WithoutRequestId)
    freeze_garbage()
    return gateway
