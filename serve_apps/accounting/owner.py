"""The owner of a deployment's limits as a Ray actor, which the first gateway to need it makes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from loray.catalog import Catalog
from loray.serving.quotas import Reply, Report
from loray.settings import Settings
from serve_apps.accounting.exchange import OwnerAway
from serve_apps.accounting.shared_owner import SharedOwner
from serve_apps.deployment import front_nodes

_NAMESPACE = "serve"


class OwnerActor:
    """It ends with the gateway that made it; the next exchange of another one makes a new one."""

    def __init__(self, application: str, num_gateways: int) -> None:
        settings = Settings.from_env()
        name = f"{ray.get_runtime_context().get_session_name()}/{application}/{num_gateways}"
        self._owner = SharedOwner(name, num_gateways, lambda: Catalog(settings.catalog))

    async def exchange(self, gateway: str, reports: Sequence[Report]) -> Reply:
        return await self._owner.exchange(gateway, reports)


class RayExchange:
    """Implements `serve_apps.accounting.exchange.Exchange` for the gateway `name` of an application."""

    def __init__(self, application: str, name: str, num_gateways: int, settings: Settings) -> None:
        # Gateways with another number of gateways, while an application is replaced, have another owner.
        self._application, self._owner = application, f"loray-quotas-{application}-{num_gateways}"
        self._name, self._num_gateways, self._settings = name, num_gateways, settings
        self._handle: Any = None

    async def __call__(self, reports: Sequence[Report]) -> Reply:
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(self._make)
            reply = await self._handle.exchange.remote(self._name, reports)
        except RayError as e:
            self._handle = None
            raise OwnerAway(f"their owner is lost: {e}") from e
        assert isinstance(reply, Reply)
        return reply

    def _make(self) -> Any:
        return (
            ray.remote(OwnerActor)
            .options(
                name=self._owner,
                namespace=_NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                label_selector=front_nodes(self._settings) or None,
                runtime_env={"env_vars": self._settings.to_env(secrets=False)},
            )
            .remote(self._application, self._num_gateways)
        )
