"""Spans of requests from the client's trace to the engine's phases, behind both kinds of gateways, and exporters."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.async_engine import AsyncEngine
from loray.engine.build import build_engine
from loray.errors import SettingsError
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import FleetSpec, GenerateRequest, SamplingParams, ServeSpec
from loray.store import AdapterStore, open_store
from serve_apps.gateway.app import open_gateway
from serve_apps.gateway.replicas.engines import ServeEngineClient
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.requests import ReplicaRequests
from serve_apps.replica.startup import adapter_loader
from serve_apps.standalone.server import LocalEngineClient, create_site
from serve_apps.tracing import Tracing, open_tracing
from tests.fixtures.channel import NODE, until
from tests.fixtures.handles import LiveHandle

Place = Callable[["Deployed"], Any]


class Deployed:
    """What both kinds of servers are made of. `spans`: those that have ended, by name."""

    def __init__(self, spec: ServeSpec, settings: Settings, stream: AsyncEngine) -> None:
        self.spec, self.settings, self.stream = spec, settings, stream
        self._exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    @property
    def spans(self) -> dict[str, list[ReadableSpan]]:
        found: dict[str, list[ReadableSpan]] = {}
        for span in self._exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found


@asynccontextmanager
async def serve(deployed: Deployed) -> AsyncIterator[httpx.AsyncClient]:
    """`loray serve`."""
    engines = LocalEngineClient(deployed.stream, deployed.tracing)
    site = create_site(deployed.spec, deployed.settings, engines, deployed.tracing)
    async with AsyncExitStack() as held:
        for app in (site._gateway, site._api):
            await held.enter_async_context(app.router.lifespan_context(app))
        yield await held.enter_async_context(_client(site))


@asynccontextmanager
async def data_plane(deployed: Deployed) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway of `loray up` and one replica."""
    requests = ReplicaRequests(deployed.stream, ReplicaMetrics(), tracing=deployed.tracing)
    handle: Any = LiveHandle(requests)
    engines = ServeEngineClient(handle, deployed.spec, NODE, "127.0.0.1")
    app = open_gateway(FleetSpec.of(deployed.spec), deployed.settings, lambda _: engines, tracing=deployed.tracing)
    async with AsyncExitStack() as held:
        held.push_async_callback(engines.close)
        await held.enter_async_context(app.router.lifespan_context(app))
        yield await held.enter_async_context(_client(app))
        await until(lambda: not requests._traces)


def _client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=60)


TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = (f"00-{TRACE}-{PARENT}-{flags}" for flags in ("01", "00"))
SECRET = "zebra"
PLACES = pytest.mark.parametrize("place", [serve, data_plane])


@pytest.fixture(scope="module")
def made(
    tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServeSpec, Settings, AsyncEngine]]:
    base = tiny_base()
    home = tmp_path_factory.mktemp("home")
    (home / "bases").symlink_to(base.path.parent)
    settings = Settings.from_env({"LORAY_HOME": str(home)})
    store, catalog = AdapterStore(open_store(settings.store)), Catalog(settings.catalog)
    publish(peft_folder(base), base, Destination("tone", store, catalog))
    catalog.close()
    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=4 << 20)
    stream = AsyncEngine(build_engine(spec, base, adapter_loader(base, settings)))
    stream.start()
    yield spec, settings, stream
    stream.stop()


@pytest.fixture
def deployed(made: tuple[ServeSpec, Settings, AsyncEngine]) -> Deployed:
    return Deployed(*made)


async def ask(
    place: Place, deployed: Deployed, path: str, body: dict[str, Any], num_spans: int, **headers: str
) -> httpx.Response:
    """The response, once so many spans have ended."""
    async with place(deployed) as client:
        response: httpx.Response = await client.post(path, json=body, headers=headers)
        await until(lambda: sum(map(len, deployed.spans.values())) >= num_spans)
        return response


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def own(span: ReadableSpan) -> str:
    assert f"{span.context.trace_id:032x}" == TRACE
    return f"{span.context.span_id:016x}"


@PLACES
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_trace_from_the_client_to_the_engine(
    place: Place, stream: bool, deployed: Deployed
) -> None:
    body = {"model": "tone", "prompt": SECRET, "max_tokens": 4, "n": 2, "stop": ["ostrich"], "ignore_eos": True}
    headers = {"traceparent": SAMPLED, "X-Request-Id": "mine"}
    response = await ask(place, deployed, "/v1/completions", body | {"stream": stream}, 9, **headers)
    assert response.status_code == 200, response.text
    spans = deployed.spans
    (gateway,) = spans["text_completion tone"]
    assert parent(gateway) == PARENT
    found = attributes(gateway)
    expected: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tone",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": stream,
        "gen_ai.response.model": "tone@1",
        "gen_ai.usage.output_tokens": 8,
        "http.response.status_code": 200,
        "loray.request_id": "mine",
    }
    assert expected.items() <= found.items()
    if not stream:
        usage = response.json()["usage"]
        assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert found["gen_ai.response.id"] == response.json()["id"]
    assert len(spans["generate"]) == 2
    for choice in spans["generate"]:
        assert parent(choice) == own(gateway)
        within = {name: [s for s in spans[name] if parent(s) == own(choice)] for name in ("queue", "prefill", "decode")}
        (queue,), (prefill,), (decode,) = within.values()
        assert choice.start_time == queue.start_time
        assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
        assert queue.start_time <= prefill.start_time <= decode.start_time <= decode.end_time <= choice.end_time
        about = attributes(choice)
        assert about["gen_ai.usage.output_tokens"] == 4
        assert about["gen_ai.response.finish_reasons"] == ("length",)
        assert about["gen_ai.request.model"] == "tone@1"
        ids = {attributes(span)["loray.request_id"] for span in (choice, queue, prefill, decode)}
        assert len(ids) == 1
        assert ids.pop().startswith(f"mine-{found['gen_ai.response.id']}-")


@PLACES
async def test_no_text_is_in_a_span(place: Place, deployed: Deployed) -> None:
    tool = {"type": "function", "function": {"name": "gazelle", "parameters": {"type": "object"}}}
    body = {
        "model": "tone",
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 24,  # one letter would be somewhere in a span
        "ignore_eos": True,
        "stop": ["ostrich"],
        "user": "giraffe",
        "tools": [tool],
        "tool_choice": "none",
    }
    response = await ask(place, deployed, "/v1/chat/completions", body, 5, traceparent=SAMPLED)
    assert response.status_code == 200, response.text
    text = "".join(str(span.to_json()) for spans in deployed.spans.values() for span in spans)
    answer = json.loads(response.text)["choices"][0]["message"]["content"]
    assert len(answer) > 8
    assert [word for word in (SECRET, "ostrich", "giraffe", "gazelle", answer) if word in text] == []
    assert "chat tone" in deployed.spans


async def test_a_request_that_is_refused_has_the_gateway_s_span_alone(deployed: Deployed) -> None:
    body = {"model": "none-of-this-name", "prompt": "x"}
    assert (await ask(serve, deployed, "/v1/completions", body, 1, traceparent=SAMPLED)).status_code == 404
    ((name, (span,)),) = deployed.spans.items()
    assert (name, span.status.is_unset) == ("text_completion", True)
    assert attributes(span)["error.type"] == "404"
    assert "none-of-this-name" not in str(span.to_json())


@PLACES
async def test_a_trace_that_the_client_does_not_sample_has_no_spans(place: Place, deployed: Deployed) -> None:
    body = {"model": "tone", "prompt": "x", "max_tokens": 1}
    assert (await ask(place, deployed, "/v1/completions", body, 0, traceparent=UNSAMPLED)).status_code == 200
    assert deployed.spans == {}


@pytest.mark.parametrize("headers", [{}, {"traceparent": "00-nonsense"}])
async def test_without_a_client_s_trace_a_new_one_begins(headers: dict[str, str], deployed: Deployed) -> None:
    body = {"model": deployed.spec.base, "prompt": "x", "max_tokens": 1}
    assert (await ask(serve, deployed, "/v1/completions", body, 5, **headers)).status_code == 200
    (gateway,) = deployed.spans[f"text_completion {deployed.spec.base}"]
    assert gateway.parent is None
    assert {span.context.trace_id for spans in deployed.spans.values() for span in spans} == {gateway.context.trace_id}
    assert "gen_ai.response.model" not in attributes(gateway)


async def test_other_routes_have_no_spans(deployed: Deployed) -> None:
    assert (await ask(serve, deployed, "/tokenize", {"model": "tone", "prompt": "x"}, 0)).status_code == 200
    assert deployed.spans == {}


COLLECTOR = "http://127.0.0.1:4318"


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "", "OTEL_SERVICE_NAME": "x"},
    ],
)
def test_without_an_exporter_nothing_is_traced(env: dict[str, str]) -> None:
    assert open_tracing("gateway", "g", env) is None


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin-of-ours"}, "'zipkin-of-ours' .* is not installed: `pip install"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "must be one of"),
    ],
)
def test_an_exporter_that_cannot_be_had_is_an_error(env: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        open_tracing("gateway", "g", env)


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        tracing = open_tracing("gateway", "g1")
        assert tracing is not None
        trace = tracing.request("chat", "/v1/chat/completions", None, None)
        assert trace.traceparent is not None
        assert tracing.replica(GenerateRequest("r", (1,), SamplingParams())) is None
        trace.end(None)
        tracing.close()
        server.shutdown()
        thread.join()
    ((path, body),) = received
    assert path == "/v1/traces"
    for word in (b"service.name", b"loray", b"loray.component", b"gateway", b"g1", b"gen_ai.operation.name"):
        assert word in body
