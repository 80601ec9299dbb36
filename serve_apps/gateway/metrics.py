"""The gateway's metrics: responses by route and status, requests under way, routing decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric as Family
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.policy.canary import Bound
from loray.schemas.openai.fields import OTHER
from loray.telemetry import METRICS
from serve_apps.accounting.usage import UsageStatus
from serve_apps.exposition import Labels, counter, gauge, labelled, merge
from serve_apps.gateway.directory import ModelResolver
from serve_apps.http import CLIENT_LEFT

_MOST_NAMES = 100  # of ignored fields, with series of their own
Answers = Sequence[list[Family] | None]  # of each process that was asked; None: it did not answer in time


class GatewayMetrics:
    """The metrics of one gateway, labelled with its name. Used from one event loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._registry = CollectorRegistry()
        names = ("http_requests", "requests", "canary_requests", "canary_rollbacks", "ignored_fields")
        self._answered, self._ended, self._canary_requests, self._canary_rollbacks, self._ignored = (
            Counter(m.name, m.help, m.labels, registry=self._registry)
            for m in (METRICS[f"{what}_total"] for what in names)
        )
        for bound in get_args(Bound):  # from 0 on: a series that begins with 1 has no increase for the alert
            self._canary_rollbacks.labels(bound)
        self._ignored_names: set[str] = set()
        self.num_in_flight = 0
        self.keys_age_s: Callable[[], float] | None = None  # of the keys that the gateway knows

    def answered(self, route: str, code: int, *, is_broken: bool = False) -> None:
        """Count a request that has ended. `is_broken`: its answer had begun with this status, and failed."""
        self._answered.labels(route, str(code)).inc()
        self._ended.labels(route, "broken" if is_broken else _outcome(code)).inc()

    def ignored(self, names: Iterable[str]) -> None:
        """Count unknown fields of a body. The first _MOST_NAMES are told apart."""
        for name in names:
            if len(self._ignored_names) < _MOST_NAMES:
                self._ignored_names.add(name)
            self._ignored.labels(name if name in self._ignored_names else OTHER).inc()

    def canary_request(self, version: str, outcome: str) -> None:
        self._canary_requests.labels(version, outcome).inc()

    def canary_rolled_back(self, bound: str) -> None:
        self._canary_rollbacks.labels(bound).inc()

    def families(
        self,
        directory: ModelResolver,
        decisions: Mapping[str, Mapping[str, int]],
        resumes: Mapping[str, Mapping[str, int]],
        num_waiting: int,
        usage: UsageStatus | None = None,
    ) -> list[Family]:
        """Collect the families, which can be pickled. `decisions` and `resumes`: by base, and by reason; `num_waiting`:
        requests that wait for their turn; `usage` None: it is not recorded.
        """
        families = [
            *self._registry.collect(),
            gauge("http_requests_in_flight", {(): self.num_in_flight}),
            gauge("http_requests_waiting", {(): num_waiting}),
            counter("routing_decisions_total", _by_base(decisions)),
            counter("resumes_total", _by_base(resumes)),
            gauge("catalog_adapters", {(b.name,): directory.num_adapters_of(b) for b in directory.bases.values()}),
            gauge("catalog_age_seconds", {(): directory.age_s}),
        ]
        if self.keys_age_s is not None:
            families.append(gauge("keys_age_seconds", {(): self.keys_age_s()}))
        if usage is not None:
            families += [
                gauge("usage_writer_alive", {(): usage.is_alive}),
                gauge("usage_journal_bytes", {(): usage.num_bytes}),
                gauge("usage_oldest_unsent_seconds", {(): usage.oldest_s}),
                counter("usage_events_lost_total", {(): usage.num_lost}),
            ]
        return labelled(families, gateway=self._name)


def _by_base(counts: Mapping[str, Mapping[str, int]]) -> dict[Labels, float]:
    return {(base, reason): n for base, of_base in counts.items() for reason, n in of_base.items()}


def _outcome(code: int) -> str:
    """Name the outcome of a request whose answer, if it has one, is whole."""
    if code == CLIENT_LEFT:
        return "left"
    if code >= 500:
        return "failed"
    return "ok" if code < 400 else "refused" if code in (401, 403, 429) else "client_error"


class BaseMetrics(NamedTuple):
    """The answers of a base's replicas, and how many replicas are wanted."""

    num_wanted: int
    replicas: Answers


def together(gateways: Answers, bases: Mapping[str, BaseMetrics]) -> list[Family]:
    """Join the families of a deployment, and count the processes that they are from."""
    silent: dict[Labels, float] = {(name,): sum(f is None for f in base.replicas) for name, base in bases.items()}
    reporting: dict[Labels, float] = {(name,): len(base.replicas) - silent[name,] for name, base in bases.items()}
    num_gateways = sum(families is not None for families in gateways)
    counts = [
        gauge("gateways_reporting", {(): num_gateways}),
        gauge("gateways_silent", {(): len(gateways) - num_gateways}),
        gauge("replicas_reporting", reporting),
        gauge("replicas_silent", silent),
        gauge("replicas_wanted", {(name,): base.num_wanted for name, base in bases.items()}),
    ]
    of_replicas = [
        labelled(families, base=name)
        for name, base in bases.items()
        for families in base.replicas
        if families is not None
    ]
    return merge([counts, *(families for families in gateways if families is not None), *of_replicas])


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
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.answered(route, code, is_broken=scope.get("state", {}).get("is_broken", False))
