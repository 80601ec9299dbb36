"""The gateway of the same deployment, which the console asks over HTTP with the key of whoever looks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import httpx
from pydantic import ValidationError

from loray.api.status import Status
from loray.client.metrics import ROUTED, TTFT, Metrics, percentile, together
from loray.errors import ClusterError, LorayError, PermissionDenied, Unauthenticated

_TIMEOUT = httpx.Timeout(5.0)
_STREAM_TIMEOUT = httpx.Timeout(5.0, read=300.0)
_WINDOW_S = 60.0


class FirstToken(NamedTuple):
    """Seconds to the first token below which half, and 99 %, of all requests since the start had it; None: no request.
    A bucket of the histogram, interpolated.
    """

    p50: float | None
    p99: float | None


class Gateway:
    """A client of `url`. One connection pool for all callers; `transport` replaces the network in tests."""

    def __init__(
        self,
        url: str,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url
        self._transport, self._clock = transport, clock
        self._client: httpx.AsyncClient | None = None
        self._samples: deque[tuple[float, int]] = deque()

    async def status(self, authorization: str | None) -> Status:
        """GET /status. Raises PermissionDenied where the key may not see it, and ClusterError where nothing answers."""
        response = await self._get("/status", authorization)
        try:
            status = Status.model_validate_json(response.content)
        except ValidationError as e:
            raise ClusterError("the gateway's status is not one of this version's") from e
        self._note(sum(replica.num_output_tokens for replica in status.replicas))
        return status

    async def first_token(self, authorization: str | None) -> FirstToken:
        """From GET /metrics. Raises as `status` does."""
        response = await self._get("/metrics", authorization)
        buckets = together(Metrics(response.text).buckets(TTFT, "replica"))
        return FirstToken(percentile(buckets, 0.5), percentile(buckets, 0.99))

    async def routing(self, authorization: str | None) -> dict[str, int]:
        """Reason → choices of a replica since the start, the most frequent first. Raises as `status` does."""
        response = await self._get("/metrics", authorization)
        counts = Metrics(response.text).sums(ROUTED, "reason")
        return {reason: int(n) for reason, n in sorted(counts.items(), key=lambda item: -item[1])}

    def tokens_per_s(self) -> float | None:
        """Output tokens a second over the last minute in which somebody looked; None before the second look."""
        if len(self._samples) < 2:
            return None
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began)

    async def stream(self, path: str, body: bytes, authorization: str | None) -> tuple[int, AsyncIterator[bytes]]:
        """POST, and the answer's status and bytes as they come. Raises ClusterError where nothing answers."""
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

    def _note(self, num_tokens: int) -> None:
        now = self._clock()
        if self._samples and num_tokens < self._samples[-1][1]:
            self._samples.clear()  # a replica has gone, with what it counted
        if not self._samples or now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, num_tokens))
        while now - self._samples[0][0] > _WINDOW_S and len(self._samples) > 2:
            self._samples.popleft()


def _authorized(authorization: str | None) -> dict[str, str]:
    return {} if authorization is None else {"Authorization": authorization}
