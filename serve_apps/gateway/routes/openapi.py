"""Describes bodies and answers in the OpenAPI document. The gateway reads and writes them itself, so FastAPI does not
know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode

from loray.api.openai import ChatCompletion, Completion, ErrorBody, Model, ModelList
from loray.api.openai.vllm.tokens import DetokenizeResponse, TokenizeResponse
from loray.api.status import Status
from serve_apps.access import Permissions
from serve_apps.access.documents import describe_keys
from serve_apps.http import extend_openapi, schema_reference

_JSON, _TEXT, _EVENTS = "application/json", "text/plain", "text/event-stream"


class _Answers(NamedTuple):
    """content  media type → its model; None: text, or an object without a model of ours
    errors   the statuses of refusals and failures
    limited  whether limits of keys apply, which headers tell
    """

    content: Mapping[str, type[BaseModel] | None]
    errors: tuple[int, ...]
    limited: bool = False


_WITH_KEY = (401, 403, 500, 503)
_ABOUT_MODEL = (400, 404, *_WITH_KEY)
_WITH_BODY = (408, 413, *_ABOUT_MODEL)
_GENERATES = (429, 501, 504, *_WITH_BODY)
_HEALTH = _Answers({_JSON: None}, (500, 503))
_ANSWERS: Mapping[str, _Answers] = {
    "/v1/completions": _Answers({_JSON: Completion, _EVENTS: None}, _GENERATES, limited=True),
    "/v1/chat/completions": _Answers({_JSON: ChatCompletion, _EVENTS: None}, _GENERATES, limited=True),
    "/v1/responses": _Answers({_JSON: None, _EVENTS: None}, _GENERATES, limited=True),
    "/v1/models": _Answers({_JSON: ModelList}, (400, 429, *_WITH_KEY)),
    "/v1/models/{model}": _Answers({_JSON: Model}, _ABOUT_MODEL),
    "/v1/load_lora_adapter": _Answers({_TEXT: None}, _WITH_BODY),
    "/v1/unload_lora_adapter": _Answers({_TEXT: None}, _WITH_BODY),
    "/tokenize": _Answers({_JSON: TokenizeResponse}, (*_WITH_BODY, 429)),
    "/detokenize": _Answers({_JSON: DetokenizeResponse}, (*_WITH_BODY, 429)),
    "/health": _HEALTH,
    "/ping": _HEALTH,
    "/version": _Answers({_JSON: None}, (500,)),
    "/status": _Answers({_JSON: Status}, (400, *_WITH_KEY)),
    "/metrics": _Answers({_TEXT: None, "application/openmetrics-text": None}, _WITH_KEY),
}
_EVENT = {  # of a stream of server-sent events
    "type": "object",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}
_RETRY = {
    "Retry-After": "seconds until it is worth while to ask again",
    "Retry-After-Ms": "the same in milliseconds",
}
_HEADERS = {401: {"WWW-Authenticate": "`Bearer`"}, 429: _RETRY, 503: _RETRY}
_OF_LIMITS = {
    f"x-ratelimit-{what}-{kind}": f"{meaning} of {kind}, where the key or its tenant has one"
    for kind in ("requests", "tokens")
    for what, meaning in (("limit", "the limit"), ("remaining", "what is left"), ("reset", "time to the full limit"))
}


def describe(app: FastAPI, permissions: Permissions, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Gives each operation its answers, says whether it needs a key, and gives the POST operation at each path of
    `bodies` its body's schema.
    """

    def edit(document: dict[str, Any]) -> None:
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"] = _responses(_ANSWERS[path])
        for path, body in bodies.items():
            document["paths"][path]["post"]["requestBody"] = {
                "required": True,
                "content": {_JSON: {"schema": schema_reference(body.__name__)}},
            }
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's form of errors
            document["components"]["schemas"].pop(unused, None)
        describe_keys(document, permissions)

    extend_openapi(app, [*((body, "validation") for body in bodies.values()), *_written()], edit)


def _written() -> list[tuple[type[BaseModel], JsonSchemaMode]]:
    """The models of answers."""
    models: set[type[BaseModel]] = {ErrorBody}
    for answers in _ANSWERS.values():
        models.update(model for model in answers.content.values() if model is not None)
    return [(model, "serialization") for model in sorted(models, key=lambda model: model.__name__)]


def _responses(answers: _Answers) -> dict[str, Any]:
    """Of one operation, by status."""
    content = {kind: _media_type(kind, model) for kind, model in answers.content.items()}
    described = {"200": _response(HTTPStatus.OK, content, _OF_LIMITS if answers.limited else {})}
    error = {_JSON: {"schema": schema_reference(ErrorBody.__name__)}}
    for status in sorted(answers.errors):
        headers = _HEADERS.get(status, {}) | (_OF_LIMITS if answers.limited and status == 429 else {})
        described[str(status)] = _response(HTTPStatus(status), error, headers)
    return described


def _media_type(kind: str, model: type[BaseModel] | None) -> dict[str, Any]:
    if model is not None:
        return {"schema": schema_reference(model.__name__)}
    if kind == _EVENTS:
        return {"itemSchema": _EVENT}  # of OpenAPI 3.2, in documents of 3.1 as FastAPI has it
    return {"schema": {"type": "object" if kind == _JSON else "string"}}


def _response(status: HTTPStatus, content: dict[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    described: dict[str, Any] = {"description": status.phrase, "content": content}
    if headers:
        described["headers"] = {
            name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in headers.items()
        }
    return described
