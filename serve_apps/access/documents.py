"""What an application's OpenAPI document says of keys."""

from __future__ import annotations

from typing import Any

from serve_apps.access.permission import Permissions

_SCHEME = "key"
_DESCRIPTION = "An API key, `sk-lr-…`. A server on loopback that was started without a key takes requests without one."


def describe_keys(document: dict[str, Any], permissions: Permissions) -> None:
    """Adds how a key is sent, and to each operation that needs one, that it does."""
    scheme = {"type": "http", "scheme": "bearer", "description": _DESCRIPTION}
    document["components"]["securitySchemes"] = {_SCHEME: scheme}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if permissions.named(method.upper(), path) != "open":
                operation["security"] = [{_SCHEME: []}]
