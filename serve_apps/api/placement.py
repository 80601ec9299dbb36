"""Asks every replica of the engine which adapters it holds."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from loray.api.status import AdapterPlacement

_TIMEOUT_S = 5.0


class ServePlacements:
    def __init__(self, deployment: str, application: str) -> None:
        self._names = deployment, application
        self._handle: DeploymentHandle[Any] | None = None

    async def adapters(self, digests: list[str]) -> list[AdapterPlacement]:
        try:
            if self._handle is None:
                self._handle = serve.get_deployment_handle(*self._names)
            answers = await self._handle.broadcast("adapters", digests).results_async(
                timeout_s=_TIMEOUT_S, return_exceptions=True
            )
        except (RayServeException, TimeoutError):  # there is no such deployment, or it is starting
            return []
        return [placement for answer in answers if isinstance(answer, list) for placement in answer]
