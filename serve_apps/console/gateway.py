"""A client of the gateway, for pages."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from loray.client.metrics import Metrics
from loray.errors import ClusterError, LorayError, PermissionDenied, Unauthenticated
from loray.schemas.status import Status

_TIMEOUT = httpx.Timeout(5.0)
_STREAM_TIMEOUT = httpx.Timeout(5.0, read=300.0)


class GatewayClient:
    """One connection pool to `url` for all callers; `transport` replaces the network in tests."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
        self._transport = transport
        self._client: httpx.AsyncClient | None = None

    async def status(self, authorization: str | None) -> Status:
        """Ask GET /status. Raises PermissionDenied where the key may not see it, and ClusterError where nothing
        answers.
        """
        response = await self._get("/status", authorization)
        try:  # of many replicas it is long
            return await run_in_threadpool(Status.model_validate_json, response.content)
        except ValidationError as e:
            raise ClusterError("the gateway's status is not one of this version's") from e

    async def metrics(self, authorization: str | None, *names: str) -> Metrics:
        """Ask GET /metrics for these metrics. Raises as `status` does."""
        response = await self._get("/metrics", authorization)
        return await run_in_threadpool(Metrics, response.text, names)

    async def stream(self, path: str, body: bytes, authorization: str | None) -> tuple[int, AsyncIterator[bytes]]:
        """Send a POST, and return the status and the bytes as they come. Raises ClusterError where nothing answers."""
        headers = {"Content-Type": "application/json"} | _authorized(authorization)
        request = self._open().build_request("POST", path, content=body, headers=headers, timeout=_STREAM_TIMEOUT)
        try:
            response = await self._open().send(request, stream=True)
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in response.aiter_raw():
                    yield chunk
            finally:
                await response.aclose()

        return response.status_code, chunks()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _get(self, path: str, authorization: str | None) -> httpx.Response:
        try:
            response = await self._open().get(path, headers=_authorized(authorization))
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        if response.status_code == 401:
            raise Unauthenticated("the gateway does not take this key")
        if response.status_code == 403:
            raise PermissionDenied("the state of the server is shown to administrators")
        if response.status_code != 200:
            raise ClusterError(f"the gateway at {self.url} answers {path} with {response.status_code}")
        return response

    def _unreachable(self, error: Exception) -> LorayError:
        return ClusterError(f"no gateway answers at {self.url} ({type(error).__name__}): is anything served?")

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                base_url=self.url, transport=self._transport, timeout=_TIMEOUT, trust_env=False
            )
        return self._client


def _authorized(authorization: str | None) -> dict[str, str]:
    return {} if authorization is None else {"Authorization": authorization}
