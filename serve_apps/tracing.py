"""Traces of requests with OpenTelemetry: the spans, the exporter that the environment names, and the middleware.

    chat MODEL, text_completion MODEL     the gateway's, of one HTTP request; its parent is the client's `traceparent`
        generate                          a replica's, of one choice
            queue, prefill, decode        its engine's phases

OTEL_TRACES_EXPORTER                `otlp`, `console`, `none`, or another one that is installed
OTEL_EXPORTER_OTLP_ENDPOINT         with it `otlp` is the default; so with OTEL_EXPORTER_OTLP_TRACES_ENDPOINT
OTEL_EXPORTER_OTLP_PROTOCOL         `http/protobuf` (default) or `grpc`
OTEL_SDK_DISABLED                   `true`: nothing is traced

The SDK itself reads the others: samplers, headers, batches, limits, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loray import __version__
from loray.errors import LorayError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer
    from starlette.types import Message

    from loray.spec import GenerateRequest, UsageEvent


REQUEST_ID = "loray.request_id"
_X_REQUEST_ID = b"x-request-id"
_LONGEST_NAME = 256  # characters of a model's name, which a client may have made up
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"} | {
    f"/v1/{name}": "chat" for name in ("chat/completions", "responses", "messages")
}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


class Times(Protocol):
    """The times of a request that a replica notes, in seconds of one clock, and its tokens."""

    num_prompt_tokens: int
    num_output_tokens: int
    arrived: float
    first: float | None
    last: float


class Tracing:
    """Begins the spans of one process. Threads may share it."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer = provider, provider.get_tracer("loray", __version__)
        self._w3c = TraceContextTextMapPropagator()

    def request(self, operation: str, route: str, traceparent: str | None, tracestate: str | None) -> RequestSpan:
        """Begin the span of an HTTP request that has come; a malformed `traceparent` counts as none."""
        from opentelemetry.trace import SpanKind

        given = {"traceparent": traceparent, "tracestate": tracestate}
        context = self._w3c.extract({name: value for name, value in given.items() if value is not None})
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "loray",
            "http.request.method": "POST",
            "http.route": route,
        }
        span = self._tracer.start_span(operation, context, SpanKind.SERVER, attributes)
        return RequestSpan(span, operation, self._carried(span))

    def replica(self, request: GenerateRequest) -> ReplicaTrace | None:
        """A trace of a request that has come to a replica; None where it is not traced."""
        if request.traceparent is None:
            return None
        return ReplicaTrace(self._tracer, self._w3c.extract({"traceparent": request.traceparent}), request)

    def close(self) -> None:
        """Export what is left. Otherwise the process's end does."""
        self._provider.shutdown()

    def _carried(self, span: Span) -> str | None:
        """The `traceparent` for replicas; None for a span that is not sampled."""
        from opentelemetry.trace import set_span_in_context

        if not span.is_recording():
            return None
        carrier: dict[str, str] = {}
        self._w3c.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent")


class RequestSpan:
    """The gateway's span. `traceparent`: what its replicas get."""

    def __init__(self, span: Span, operation: str, traceparent: str | None) -> None:
        self._span, self._operation, self.traceparent = span, operation, traceparent
        self._began = time.monotonic()
        self._status = 0

    def asked(self, model: str, requests: Sequence[GenerateRequest], answer_id: str, *, stream: bool) -> None:
        """Note what the body asks for, once it has been understood."""
        if not self._span.is_recording():
            return
        params, adapter = requests[0].params, requests[0].adapter
        model = model[:_LONGEST_NAME]
        self._span.update_name(f"{self._operation} {model}")
        found: dict[str, Any] = {
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.choice.count": len(requests),
            "gen_ai.request.stream": stream,
            "gen_ai.response.id": answer_id,
        }
        if adapter is not None:
            found |= {"gen_ai.response.model": adapter.label, "loray.adapter.digest": adapter.digest}
        self._span.set_attributes(found)

    def sending(self, send: Send) -> Send:
        """Wrap `send`, of which the status, the request's id and the time of the first part are noted."""
        is_first = True

        async def sent(message: Message) -> None:
            nonlocal is_first
            if message["type"] == "http.response.start":
                self._status = message["status"]
                request_id = dict(message.get("headers", ())).get(_X_REQUEST_ID)
                if request_id is not None:
                    self._span.set_attribute(REQUEST_ID, request_id.decode("latin-1"))
            elif is_first:
                is_first = False
                waited = round(time.monotonic() - self._began, 6)
                self._span.set_attribute("gen_ai.response.time_to_first_chunk", waited)
            await send(message)

        return sent

    def end(self, usage: UsageEvent | None) -> None:
        """End the span. `usage`: what the request used; None: it was refused before."""
        from opentelemetry.trace import Status, StatusCode

        outcome = "ok" if self._status and self._status < 400 else str(self._status or "internal_error")
        if usage is not None:
            outcome = usage.outcome
            self._span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": usage.num_prompt_tokens,
                    "gen_ai.usage.cache_read.input_tokens": usage.num_cached_tokens,
                    "gen_ai.usage.output_tokens": usage.num_output_tokens,
                }
            )
        if self._status:
            self._span.set_attribute("http.response.status_code", self._status)
        if outcome != "ok":
            self._span.set_attribute("error.type", outcome)
        if outcome != "ok" and not 400 <= self._status < 500:  # of a client's mistake the server's span is unset
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class ReplicaTrace:
    """The spans of one choice in a replica, made at its end from the times that the replica and its engine note."""

    def __init__(self, tracer: Tracer, context: Context, request: GenerateRequest) -> None:
        self._tracer, self._context, self._request = tracer, context, request
        self._came_ns, self._came = time.time_ns(), time.monotonic()
        self.scheduled_at: float | None = None  # seconds of `time.monotonic`, written by the engine's thread

    def end(self, times: Times, how: str | Exception) -> None:
        """Make the spans. `how`: as `ReplicaMetrics.ended`."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        ended_ns = self._ns(time.monotonic() - self._came)
        about: dict[str, Any] = {REQUEST_ID: self._request.request_id}
        span = self._tracer.start_span(
            "generate", self._context, SpanKind.SERVER, self._attributes(times) | about, start_time=self._came_ns
        )
        if isinstance(how, Exception):
            is_ours = isinstance(how, LorayError)
            span.set_attribute("error.type", type(how).__name__ if is_ours else "internal")
            span.set_status(Status(StatusCode.ERROR))
        else:
            span.set_attribute("gen_ai.response.finish_reasons", (how,))
        within = set_span_in_context(span)
        for name, start_ns, end_ns in self._phases(times, ended_ns):
            self._tracer.start_span(name, within, attributes=about, start_time=start_ns).end(end_ns)
        span.end(ended_ns)

    def _attributes(self, times: Times) -> dict[str, Any]:
        adapter = self._request.adapter
        used: dict[str, Any] = {
            "gen_ai.usage.input_tokens": times.num_prompt_tokens,
            "gen_ai.usage.output_tokens": times.num_output_tokens,
        }
        if adapter is None:
            return used
        return used | {"gen_ai.request.model": adapter.label, "loray.adapter.digest": adapter.digest}

    def _phases(self, times: Times, ended_ns: int) -> list[tuple[str, int, int]]:
        """Return (name, begin, end) of the phases reached. Metrics and engine may have clocks with different zeros."""
        if self.scheduled_at is None:
            return [("queue", self._came_ns, ended_ns)]
        scheduled_ns = self._ns(self.scheduled_at - self._came)
        phases = [("queue", self._came_ns, scheduled_ns)]
        if times.first is None:
            return [*phases, ("prefill", scheduled_ns, ended_ns)]
        first_ns, last_ns = (self._ns(at - times.arrived) for at in (times.first, times.last))
        return [*phases, ("prefill", scheduled_ns, first_ns), ("decode", first_ns, last_ns)]

    def _ns(self, seconds: float) -> int:
        """Return the time so many seconds after the request came, since 1970."""
        return self._came_ns + max(0, int(seconds * 1e9))


def open_tracing(component: str, instance: str, env: Mapping[str, str] | None = None) -> Tracing | None:
    """Open the traces of this process, which is this part of the deployment by this name. None: no exporter is named.

    Raises SettingsError where the exporter is unknown or not installed.
    """
    name = _exporter(os.environ if env is None else env)
    if name is None:
        return None
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise SettingsError("traces are configured (OTEL_…), and need `pip install 'loray[otel]'`") from e
    exporter = _load(name)()
    provider = TracerProvider(resource=_resource(component, instance))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def _exporter(env: Mapping[str, str]) -> str | None:
    """Name the entry point of the configured exporter."""
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    name = env.get("OTEL_TRACES_EXPORTER") or ("otlp" if any(map(env.get, _ENDPOINTS)) else "none")
    if name == "none":
        return None
    if name != "otlp":
        return name
    protocol = next(filter(None, map(env.get, _PROTOCOLS)), "http/protobuf")
    if protocol not in _OTLP:
        raise SettingsError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r} must be one of {', '.join(_OTLP)}")
    return _OTLP[protocol]


def _load(name: str) -> Callable[[], Any]:
    found = entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        raise SettingsError(
            f"the exporter of traces {name!r} (OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_PROTOCOL) is not installed: "
            "`pip install 'loray[otel]'` brings otlp over http/protobuf, opentelemetry-exporter-otlp that over grpc"
        )
    exporter: Callable[[], Any] = next(iter(found)).load()
    return exporter


def _resource(component: str, instance: str) -> Resource:
    from opentelemetry.sdk.resources import Resource

    ours = {"service.instance.id": instance, "loray.component": component}
    given = Resource.create()
    if str(given.attributes.get("service.name", "")).startswith("unknown_service"):
        ours["service.name"] = "loray"
    return given.merge(Resource(ours))


class TraceRequests:
    """ASGI middleware: the request's span is `scope["state"]["trace"]` until the response has ended."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app, self._tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else None
        if route not in _OPERATIONS:
            await self._app(scope, receive, send)
            return
        headers, state = Headers(scope=scope), scope.setdefault("state", {})
        trace = self._tracing.request(_OPERATIONS[route], route, headers.get("traceparent"), headers.get("tracestate"))
        state["trace"] = trace
        try:
            await self._app(scope, receive, trace.sending(send))
        finally:
            trace.end(state.get("usage"))
