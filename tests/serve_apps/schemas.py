"""What the answers to generated requests are checked for, on both applications."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks
from starlette.types import ASGIApp, Receive, Scope, Send

from loray.catalog import Catalog
from loray.spec import SCOPES, Limits

CHECKS: Any = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
]
NEGATIVE_CHECKS: Any = [*CHECKS, openapi_checks.negative_data_rejection]
WRONG = "sk-lr-" + "A" * 43
Headers = dict[str, str]


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def without_lifespan(app: ASGIApp) -> ASGIApp:
    """Schemathesis starts and stops an application for each test; what it holds is for all of them."""

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})

    return asked


def document_of(app: ASGIApp, path: str) -> Any:
    """Its operations, for Schemathesis. Keys are the test's alone: none are made up."""
    schema = schemathesis.openapi.from_asgi(path, without_lifespan(app))
    schema.config.generation.update(with_security_parameters=False)
    return schema


def needing_keys(document: Any) -> set[str]:
    """The operations that need a key, which is sent as a bearer token."""
    ((name, scheme),) = document["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    return {
        f"{method.upper()} {path}"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if operation.get("security") == [{name: []}]
    }


def headers_of_each_kind(catalog: Catalog) -> dict[str, Headers]:
    """The headers of requests without a key, and with keys of every kind, which `catalog` has then."""
    catalog.create_tenant("acme")
    limited = Limits(rpm_limit=0, max_jobs=0, max_workers=0)
    ended = datetime.now(UTC) - timedelta(hours=1)
    made: dict[str, Any] = {scope: {"scopes": [scope]} for scope in SCOPES}
    made |= {
        "another tenant's": {"scopes": SCOPES[:4], "tenant": "acme"},
        "for another model": {"scopes": SCOPES[:4], "models": ["other"]},
        "limited": {"scopes": SCOPES[:4], "limits": limited},
        "expired": {"expires_at": ended},
        "blocked": {},
        "revoked": {},
    }
    keys = {name: catalog.create_key(name.replace("'", ""), **fields) for name, fields in made.items()}
    catalog.update_key(keys["blocked"].key.id, blocked=True)
    catalog.revoke_key(keys["revoked"].key.id)
    secrets = {name: key.secret for name, key in keys.items()} | {"wrong": WRONG}
    found = {name: {"Authorization": f"Bearer {secret}"} for name, secret in secrets.items()}
    found["act_for"]["X-Tenant-Id"] = "acme"
    return {"none": {}, "of another kind": {"Authorization": "Basic eDp5"}} | found


def expected(name: str) -> int | None:
    """The status of every answer that needs a key; None: it depends on the route."""
    if name in ("none", "of another kind", "wrong", "expired", "revoked"):
        return 401
    return 403 if name == "blocked" else None
