"""The gateways of a deployment behind a Ray Serve handle."""

from __future__ import annotations

from typing import Any

from prometheus_client.core import Metric as Family
from ray.serve.handle import DeploymentHandle

from serve_apps.gateway.replicas.broadcast import Broadcast


class ServeGateways:
    """Implements `serve_apps.gateway.engines.Gateways`. `handle` is that of the gateways' own deployment."""

    def __init__(self, handle: DeploymentHandle[Any], name: str) -> None:
        self.name = name
        self._replicas = Broadcast(handle)

    async def metrics(self) -> list[list[Family] | None]:
        return [a if isinstance(a, list) else None for a in await self._replicas.ask("metrics")]
