"""Batches: what a control process does with the requests in a tenant's file, through the gateway."""

from serve_apps.batches.lines import BaseLoad, GatewayLines, LineAnswer
from serve_apps.batches.runner import BatchRunner

__all__ = ["BaseLoad", "BatchRunner", "GatewayLines", "LineAnswer"]
