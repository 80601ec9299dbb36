"""OpenTelemetry traces of requests: gateway, replica, and the engine's phases. Off unless an exporter is configured."""

from serve_apps.tracing.setup import open_tracing
from serve_apps.tracing.spans import ReplicaTrace, RequestTrace, Tracing

__all__ = ["ReplicaTrace", "RequestTrace", "Tracing", "open_tracing"]
