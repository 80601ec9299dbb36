"""OpenTelemetry's provider, from its standard variables. Without an exporter nothing of it is imported.

OTEL_TRACES_EXPORTER                `otlp`, `console`, `none`, or another one that is installed
OTEL_EXPORTER_OTLP_ENDPOINT         with it `otlp` is the default; so with OTEL_EXPORTER_OTLP_TRACES_ENDPOINT
OTEL_EXPORTER_OTLP_PROTOCOL         `http/protobuf` (default) or `grpc`
OTEL_SDK_DISABLED                   `true`: nothing is traced

The SDK itself reads the others: samplers, headers, batches, limits, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from loray.errors import SettingsError
from serve_apps.tracing.spans import Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


def open_tracing(component: str, instance: str, env: Mapping[str, str] | None = None) -> Tracing | None:
    """Traces of this process, which has this part and this name in the deployment. None: no exporter is configured.

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
    """The entry point of the configured exporter."""
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
