"""Which exporter the standard variables mean, and that spans reach a collector."""

from __future__ import annotations

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from loray.errors import SettingsError
from loray.spec import GenerateRequest, SamplingParams
from serve_apps.tracing import open_tracing

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


def test_without_an_exporter_the_sdk_is_not_imported() -> None:
    """FastAPI imports OpenTelemetry's API, where that is installed."""
    code = (
        "import sys, serve_apps.gateway.app, serve_apps.replica.requests\n"
        "from serve_apps.tracing import open_tracing\n"
        "assert open_tracing('gateway', 'g') is None\n"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


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
