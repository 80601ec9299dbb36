"""Both APIs, from their OpenAPI documents."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

from fastapi import FastAPI

from docs.site.markdown import table
from docs.site.reference.schemas import default_of, references, sentences, type_of
from loray.policy.auth import SCOPES_OF, Action
from loray.settings import Settings
from serve_apps.api.services import Services
from serve_apps.api.site import create_app as catalog_app
from serve_apps.auth import Permissions
from serve_apps.gateway.app import create_app as openai_app

_ACCESS = "../guide/access.md#who-may-do-what"


def openai_page() -> str:
    """The gateway's routes. Their document is the same whatever is behind them, so nothing is."""
    return _page("The OpenAI-compatible API", openai_app(Mock(), Mock(), files=Mock(), tuning=Mock()), "")


def catalog_page() -> str:
    """The routes of the catalog's REST API."""
    services = Services(Settings.from_env({}), Mock(), Mock())
    return _page("The catalog's API", catalog_app(services, Mock()), "/api/v1")


def _page(title: str, app: FastAPI, prefix: str) -> str:
    document, permissions = app.openapi(), Permissions(app.routes)
    parts = [f"# {title}\n", f"Made from the document that a server has at `{prefix}/openapi.json`.\n"]
    for path, operations in sorted(document["paths"].items()):
        for method, operation in operations.items():
            parts.append(_route(method.upper(), path, prefix, operation, permissions.named(method.upper(), path)))
    schemas: dict[str, Any] = document["components"]["schemas"]
    parts.append("## Schemas\n")
    waiting = list(dict.fromkeys(references(document["paths"])))
    for name in waiting:  # grows meanwhile: schemas refer to others
        parts.append(_schema(name, schemas[name]))
        waiting += [other for other in dict.fromkeys(references(schemas[name])) if other not in waiting]
    return "\n".join(parts)


def _route(method: str, path: str, prefix: str, operation: dict[str, Any], action: Action) -> str:
    parts = [f"## {method} {prefix}{path}\n"]
    if operation.get("description"):
        parts.append(f"{sentences(operation['description'])}\n")
    parts.append(f"{_keys(action)}\n")
    parameters = [
        (f"`{p['name']}`", p["in"], type_of(p["schema"]), default_of(p["schema"]), sentences(p.get("description", "")))
        for p in operation.get("parameters", ())
    ]
    if parameters:
        parts.append(table(("parameter", "in", "type", "default", "meaning"), parameters))
    body = operation.get("requestBody", {}).get("content", {})
    if body:
        parts.append(f"Body: {_content(body)}\n")
    parts.append(_answers(operation["responses"]))
    return "\n".join(parts)


def _answers(responses: dict[str, Any]) -> str:
    """A line for each success, with its form, and one line for all errors, which have one form."""
    lines = [
        f"Answers {status}: {_content(answer.get('content', {})) or 'no body'}\n"
        for status, answer in sorted(responses.items())
        if status < "400"
    ]
    errors = ", ".join(f"{status} {a['description']}" for status, a in sorted(responses.items()) if status >= "400")
    return "\n".join([*lines, f"Errors: {errors}\n"] if errors else lines)


def _keys(action: Action) -> str:
    """Which keys a route needs, on a server with keys."""
    if action == "open":
        return "Needs no key."
    if action == "identify":
        return f"Needs a [key]({_ACCESS}), of any scope."
    scopes = " or ".join(f"`{scope}`" for scope in (*sorted(SCOPES_OF[action]), "admin"))
    return f"Needs a [key]({_ACCESS}) with the scope {scopes}."


def _content(content: dict[str, Any]) -> str:
    return "; ".join(f"`{kind}` {type_of(media.get('schema', {}))}".strip() for kind, media in content.items())


def _schema(name: str, schema: dict[str, Any]) -> str:
    parts = [f"### {name}\n", f"{sentences(schema.get('description', ''))}\n"]
    required = schema.get("required", ())
    rows = [
        (
            f"`{field}`" + " (required)" * (field in required),
            type_of(of),
            default_of(of),
            sentences(of.get("description", "")),
        )
        for field, of in schema.get("properties", {}).items()
    ]
    parts.append(table(("field", "type", "default", "meaning"), rows) if rows else f"{type_of(schema)}\n")
    return "\n".join(parts)
