"""Asks every replica of every base which adapters it holds."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from loray.api.status import AdapterPlacement
from loray.spec import is_engine

_TIMEOUT_S = 5.0


class ServePlacements:
    """`application`: the one whose deployments are asked. Which bases it has may change meanwhile."""

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
