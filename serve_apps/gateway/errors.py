"""Each error's HTTP status and error object, in OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import uniform
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

from loray.errors import (
    AdapterQuarantined,
    BaseMismatch,
    BaseStarting,
    CatalogError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineError,
    GrammarTooExpensive,
    IntegrityError,
    KeyRevoked,
    LorayError,
    NotFoundError,
    Overloaded,
    PermissionDenied,
    RateLimited,
    RequestError,
    StoreError,
    Unauthenticated,
    UnsupportedError,
)
from loray.schemas.openai import Error, ErrorBody
from loray.telemetry import get_logger
from serve_apps.http import install_error_handlers

_log = get_logger(__name__)

_INVALID = "invalid_request_error"
_SERVER = "server_error"
ROUTE_CODES = {404: "unknown_url", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}


class Failure(NamedTuple):
    """The response to an error."""

    status: int
    error: Error
    headers: Mapping[str, str] = {}

    @property
    def body(self) -> str:
        return ErrorBody(error=self.error).to_json()


class _Kind(NamedTuple):
    status: int
    type: str
    code: str | None
    param: str | None = None
    retry_after_s: float | None = None


_KINDS: tuple[tuple[type[Exception], _Kind], ...] = (
    (KeyRevoked, _Kind(401, _INVALID, "key_revoked")),
    (Unauthenticated, _Kind(401, _INVALID, "invalid_api_key")),
    (PermissionDenied, _Kind(403, _INVALID, "permission_denied")),
    (ContextLengthExceeded, _Kind(400, _INVALID, "context_length_exceeded")),
    (GrammarTooExpensive, _Kind(400, _INVALID, "grammar_too_expensive")),
    (RequestError, _Kind(400, _INVALID, None)),
    (BaseMismatch, _Kind(404, _INVALID, "base_mismatch", param="model")),
    (NotFoundError, _Kind(404, _INVALID, "model_not_found", param="model")),
    (RateLimited, _Kind(429, "rate_limit_error", "rate_limit_exceeded")),
    (Overloaded, _Kind(429, "rate_limit_error", "overloaded")),
    (DeadlineExceeded, _Kind(504, _SERVER, "deadline_exceeded")),
    (IntegrityError, _Kind(500, _SERVER, "adapter_damaged", param="model")),
    (UnsupportedError, _Kind(501, _SERVER, "adapter_unsupported", param="model")),
    (CatalogError, _Kind(503, _SERVER, "catalog_unavailable", retry_after_s=1.0)),
    (AdapterQuarantined, _Kind(503, _SERVER, "adapter_quarantined", param="model")),
    (StoreError, _Kind(503, _SERVER, "store_unavailable", retry_after_s=5.0)),
    (BaseStarting, _Kind(503, _SERVER, "base_starting", param="model")),
    (EngineError, _Kind(503, _SERVER, "engine_unavailable", retry_after_s=1.0)),
    (LorayError, _Kind(500, _SERVER, None)),
)
_INTERNAL = _Kind(500, _SERVER, "internal_error")


def failure_of(error: Exception, request_id: str | None = None) -> Failure:
    """Make the response to any error. An unexpected one is logged with its traceback, which is not shown."""
    kind = next((kind for cls, kind in _KINDS if isinstance(error, cls)), None)
    if kind is None:
        of_request = f" of request {request_id}" if request_id else ""
        _log.error("unexpected error%s", of_request, exc_info=error)
        return _failure(_INTERNAL, "internal error; the gateway's log has the details")
    retry_after = kind.retry_after_s
    if (
        isinstance(error, Overloaded | RateLimited | StoreError | AdapterQuarantined | BaseStarting)
        and error.retry_after_s is not None
    ):
        retry_after = error.retry_after_s
        if isinstance(error, Overloaded):  # an engine tells all the same time, and they would come back together
            retry_after *= uniform(1.0, 1.5)
    param = error.param if isinstance(error, RequestError) else kind.param
    failure = _failure(kind._replace(param=param, retry_after_s=retry_after), str(error))
    return failure._replace(headers={**failure.headers, **error.headers}) if isinstance(error, RateLimited) else failure


def _failure(kind: _Kind, message: str) -> Failure:
    headers = {"WWW-Authenticate": "Bearer"} if kind.status == 401 else {}
    if kind.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(kind.retry_after_s)))  # HTTP allows whole seconds only
        headers["Retry-After-Ms"] = str(math.ceil(1000 * kind.retry_after_s))  # which OpenAI's clients prefer
    return Failure(kind.status, Error(message=message, type=kind.type, param=kind.param, code=kind.code), headers)


def response_of(failure: Failure) -> Response:
    return Response(failure.body, failure.status, dict(failure.headers), media_type="application/json")


def install(app: FastAPI) -> None:
    """Give every error of `app` OpenAI's form."""

    def invalid(error: RequestValidationError) -> RequestError:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return RequestError(f"{param}: {first['msg']}", param)

    def refused(status: int, message: str) -> Response:
        return response_of(_failure(_Kind(status, _INVALID, ROUTE_CODES.get(status)), message))

    install_error_handlers(app, failed=lambda error: response_of(failure_of(error)), invalid=invalid, refused=refused)
