"""Sampling by the deployment of the same Ray cluster, through any of its gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from loray.errors import LorayError, SpecError
from loray.spec import APPLICATION, GATEWAY, SampleCall, SampledBase, SampleResult


class Sampler:
    """Calls the gateways of `application`. Used from one event loop of a process that is connected to Ray."""

    def __init__(self, application: str = APPLICATION) -> None:
        self._application = application
        self._handle: DeploymentHandle[Any] | None = None

    async def sample(self, call: SampleCall) -> SampleResult:
        """Sample; cancelling it cancels the requests of the call.

        Raises SpecError where nothing is deployed, what the gateway raises (`Rollouts.sample`), and RayError where the
        gateway was lost: then the caller sends the call again, to another one.
        """
        result: SampleResult = await self._ask("sample", call)
        return result

    async def retire(self, digests: Collection[str]) -> None:
        """Have all replicas drop ephemeral adapters that nobody samples any more. Raises as `sample`."""
        await self._ask("retire", tuple(digests))

    async def bases(self) -> Mapping[str, SampledBase]:
        """Return the bases that are served, by name. Raises as `sample`."""
        found: Mapping[str, SampledBase] = await self._ask("bases")
        return found

    async def _ask(self, method: str, *arguments: object) -> Any:
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(serve.get_deployment_handle, GATEWAY, self._application)
            response = getattr(self._handle, method).remote(*arguments)
        except (RayServeException, KeyError) as e:  # KeyError: there is no such application
            raise SpecError(f"nothing is served in this Ray cluster ({e}); `loray up --base BASE` there first") from e
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as e:
            if isinstance(e.cause, LorayError):  # without the traceback of the gateway, which Ray makes a part of it
                raise e.cause from None
            raise
