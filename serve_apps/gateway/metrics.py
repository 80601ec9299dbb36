"""The gateway's metrics: responses by route and status, requests under way, routing decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric as Family
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.telemetry import METRICS
from serve_apps.exposition import counter, gauge, merge
from serve_apps.gateway.directory import ModelDirectory
from serve_apps.http import CLIENT_LEFT


class GatewayMetrics:
    """The metrics of one gateway. Used from one event loop."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        m = METRICS["http_requests_total"]
        self._answered = Counter(m.name, m.help, m.labels, registry=self._registry)
        self.num_in_flight = 0

    def answered(self, route: str, code: int) -> None:
        self._answered.labels(route, str(code)).inc()

    def families(
        self, directory: ModelDirectory, decisions: Mapping[str, int], replicas: Sequence[list[Family] | None]
    ) -> list[Family]:
        """All families of gateway and replicas. `replicas`: None for one that did not answer."""
        reporting = [families for families in replicas if families is not None]
        own = [
            *self._registry.collect(),
            gauge("http_requests_in_flight", {(): self.num_in_flight}),
            counter("routing_decisions_total", {(reason,): n for reason, n in decisions.items()}),
            gauge("replicas_reporting", {(): len(reporting)}),
            gauge("replicas_silent", {(): len(replicas) - len(reporting)}),
            gauge("catalog_adapters", {(): directory.num_adapters}),
            gauge("catalog_age_seconds", {(): directory.age_s}),
        ]
        return merge([own, *reporting])


class CountRequests:
    """ASGI middleware that counts responses by route and status code, and requests under way."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code = CLIENT_LEFT  # unless a response is sent

        async def counting_send(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        self._metrics.num_in_flight += 1
        try:
            await self._app(scope, receive, counting_send)
        except Exception:
            if code == CLIENT_LEFT:
                code = 500  # an outer middleware turns an unexpected error into this response
            raise
        finally:
            self._metrics.num_in_flight -= 1
            # The route's pattern, not the path, which would be an unbounded label.
            self._metrics.answered(getattr(scope.get("route"), "path", "unknown"), code)
