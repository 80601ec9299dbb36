"""The Serve application `loray`: gateways, and the engines of each base.

Serve gives all deployments of an application one version, a hash of the application's arguments: a change of one base
would replace the replicas of all of them. So the deployments of engines have versions of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import PrivateAttr
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from loray import __version__
from loray.bases.registry import get_bases
from loray.encryption import uses_tls
from loray.settings import Settings
from loray.spec import APPLICATION, GATEWAY, FleetSpec, SampleCall, SampledBase, SampleResult, ServeSpec, engine_of
from serve_apps.deployment import DRAIN_LOOK_S, DRAIN_S, front_nodes
from serve_apps.gateway.replicas.router import ROUTER_CLASS, AdapterRouter
from serve_apps.options import reserve_names
from serve_apps.replica.ranks import bundles
from serve_apps.replica.replica import EngineReplica
from serve_apps.scaling import AdapterDemandPolicy, ScalingLog, autoscaling_config
from serve_apps.serve_internals import DeploymentConfig

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

    from serve_apps.batches import BaseLoad, GatewayLines, LineAnswer
    from serve_apps.gateway.gateway import Gateway
    from serve_apps.gateway.rollouts import Rollouts

_UPDATED_S = 30.0  # three times the age of the autoscaler's last record
_SPARE_SLOTS = 64  # more than the engine admits, so that the engine refuses a request, with a time to retry

__all__ = ["AdapterDemandPolicy", "AdapterRouter", "application", "build"]


class VersionedConfig(DeploymentConfig):  # type: ignore[misc]
    """Tells Serve's controller a version of its own, whatever version Serve sets before."""

    _own: str = PrivateAttr(default="")

    def to_proto(self) -> Any:
        proto = super().to_proto()
        proto.version = self._own
        return proto


def versioned(deployment: Deployment, *arguments: Any) -> Deployment:
    """Give the deployment a version that follows from `arguments`, JSON of what its replicas are given, and from
    loray's version. Serve itself replaces replicas whose actors' options change, such as the environment.
    """
    config = VersionedConfig(**dict(deployment._deployment_config))
    said = json.dumps([__version__, deployment.name, *arguments], sort_keys=True)
    config._own = hashlib.sha256(said.encode()).hexdigest()
    return Deployment(deployment.name, config, deployment._replica_config, version=None, _internal=True)


def build(args: dict[str, Any]) -> Application:
    """Build the application. `args` are FleetSpec's fields; the environment (LORAY_*) names catalog and store.

    Raises SpecError on a wrong field, BaseNotFound if a base is not on this machine.
    """
    fleet = FleetSpec.parse(args, source="args of serve_apps.app:build")
    return application(fleet, RequestRouterConfig(request_router_class=ROUTER_CLASS))


def application(fleet: FleetSpec, routing: RequestRouterConfig) -> Application:
    """Build the application with a given request router."""
    settings = Settings.from_env()
    bases = get_bases(settings.home, fleet.names)
    reserve_names(bases, settings)
    fingerprints = {base.name: base.fingerprint + (base.of or "") for base in bases}
    environment = {"env_vars": settings.to_env(secrets=False) | settings.to_serving_env()}
    where = {"label_selector": nodes} if (nodes := front_nodes(settings)) else {}

    def gateway_app() -> FastAPI:  # called in the gateway's process
        return _gateway(fleet)

    gateway = serve.deployment(
        serve.ingress(gateway_app)(GatewayReplica),
        name=GATEWAY,
        num_replicas=fleet.num_gateways,
        max_ongoing_requests=sum(_slots(spec) * spec.max_replicas for spec in fleet.bases),
        ray_actor_options={"num_cpus": 0, "runtime_env": environment, **where},
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=DRAIN_S,  # a stream needs gateway and engine until it ends
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_S,
    )
    engines = (_engine(spec.for_replicas, fingerprints[spec.base], routing, environment) for spec in fleet.bases)
    return gateway.bind(*engines)


def _engine(
    spec: ServeSpec, fingerprint: str, routing: RequestRouterConfig, environment: dict[str, Any]
) -> Application:
    """Make the replicas of one base. Nothing here depends on another one, whose change leaves these replicas alone.

    `fingerprint`: of the base that its name stands for here, and of the one whose form it is. Replicas of another one
    are replaced.
    """
    has_ranks = spec.tensor_parallel_size > 1
    router = {"request_router_kwargs": {**routing.request_router_kwargs, "block_tokens": spec.block_tokens}}
    scaling = autoscaling_config(spec, runs=_is_scaled(engine_of(spec.base)))
    engine = serve.deployment(
        EngineReplica,
        name=engine_of(spec.base),
        **({"num_replicas": spec.num_replicas} if scaling is None else {"autoscaling_config": scaling}),
        max_ongoing_requests=_slots(spec),
        max_queued_requests=_slots(spec),
        request_router_config=routing.model_copy(update=router),
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": 1 if spec.device.startswith("cuda") else 0,
            "runtime_env": environment,
        },
        placement_group_bundles=bundles(spec) if has_ranks else None,
        # What ranks send has no TLS, neither Gloo's nor NCCL's: where it is wanted, nothing of it leaves a node.
        placement_group_strategy="STRICT_PACK" if has_ranks and uses_tls(os.environ) else None,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_S,
    )
    return versioned(engine, spec.model_dump(mode="json"), fingerprint).bind(spec)


def _slots(spec: ServeSpec) -> int:
    """Return the most requests that a replica is given."""
    return spec.max_num_seqs + spec.max_queued + spec.max_loading + _SPARE_SLOTS


def _host(fleet: FleetSpec) -> str:
    """Find the address at which this gateway takes tokens from other nodes."""
    import ray

    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    if alone and fleet.host in ("127.0.0.1", "localhost", "::1"):
        return "127.0.0.1"
    return str(ray.util.get_node_ip_address())


class GatewayReplica:
    """Answers other gateways, and trainers. Serve adds its HTTP application, as `app`."""

    app: FastAPI

    def __init__(self, *engines: object) -> None:
        """`engines`: makes those deployments a part of the application."""

    def metrics(self) -> list[Family]:
        """Collect the Prometheus families of this gateway."""
        gateway: Gateway = self.app.state.gateway
        return gateway.own_families()

    async def run_line(self, key_id: str | None, tenant: str, endpoint: str, body: bytes) -> LineAnswer:
        """Answer as `GatewayLines` does; so do the two below."""
        return await self._lines.run_line(key_id, tenant, endpoint, body)

    async def bases_of(self, key_id: str | None, tenant: str, models: Collection[str]) -> Mapping[str, str | None]:
        return await self._lines.bases_of(key_id, tenant, models)

    async def loads(self) -> Mapping[str, BaseLoad]:
        return await self._lines.loads()

    async def sample(self, call: SampleCall) -> SampleResult:
        """Answer as `Rollouts` does; so does the one below."""
        rollouts: Rollouts = self.app.state.rollouts
        return await rollouts.sample(call)

    async def retire(self, digests: Collection[str]) -> None:
        rollouts: Rollouts = self.app.state.rollouts
        await rollouts.retire(digests)

    async def bases(self) -> dict[str, SampledBase]:
        """Say of each base what callers of `sample` need to know."""
        gateway: Gateway = self.app.state.gateway
        return {name: SampledBase(base.limit_of(None), base.spec.dtype) for name, base in gateway.bases.items()}

    @property
    def _lines(self) -> GatewayLines:
        lines: GatewayLines = self.app.state.lines
        return lines


def _is_scaled(deployment: str) -> bool:
    """Tell whether the autoscaler has looked at a deployment just now, which therefore is updated. It looks at that of
    the application `loray`, since Serve does not tell this function which one it builds.
    """
    import ray

    last = ScalingLog(APPLICATION, deployment).read() if ray.is_initialized() else None
    return last is not None and time.time() - last.time < _UPDATED_S


def _gateway(fleet: FleetSpec) -> FastAPI:
    import ray

    from jobs.submission.server import RayJobServer
    from loray.catalog import Catalog
    from loray.telemetry import configure_logging
    from serve_apps.accounting.quotas import RayExchange
    from serve_apps.auth import open_auth
    from serve_apps.gateway.app import open_gateway
    from serve_apps.gateway.replicas.engines import DemandReporter, ServeEngineClient, ServeGateways
    from serve_apps.http import WithoutRequestId
    from serve_apps.python_gc import collect_when_quiet, freeze_garbage
    from serve_apps.scaling import DemandRecords
    from serve_apps.serve_internals import reachable_host
    from serve_apps.tracing import open_tracing

    settings = Settings.from_env()
    configure_logging(settings.log_level)
    here = serve.get_replica_context()
    gateways = ServeGateways(serve.get_deployment_handle(GATEWAY, here.app_name), here.replica_id.unique_id)
    node, host = ray.get_runtime_context().get_node_id(), _host(fleet)

    def engines(spec: ServeSpec) -> ServeEngineClient:
        name = engine_of(spec.base)
        return ServeEngineClient(
            serve.get_deployment_handle(name, here.app_name),
            spec,
            node,
            host,
            lambda: Catalog(settings.catalog, actor="gateway"),
            DemandReporter(DemandRecords(here.app_name, name), gateways.name, name),
        )

    exchange = None
    if fleet.num_gateways > 1:
        exchange = RayExchange(here.app_name, gateways.name, fleet.num_gateways, settings)
    tracing = open_tracing("gateway", gateways.name)
    access = open_auth(settings, reachable_host(fleet.host))
    gateway = open_gateway(fleet, settings, engines, gateways, exchange, access, tracing, RayJobServer())
    gateway.add_middleware(WithoutRequestId)
    freeze_garbage()
    counted = gateway.state.gateway.counted
    collect_when_quiet(lambda: counted.num_in_flight == 0)
    return gateway
