"""Each error's HTTP status and error object, in OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import uniform
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

from loray.errors import LorayError, Overloaded, RateLimited, RequestError
from loray.schemas.openai import Error, ErrorBody
from loray.telemetry import get_logger
from serve_apps.http import install_error_handlers

_log = get_logger(__name__)

_TYPES = {429: "rate_limit_error"}
ROUTE_CODES = {404: "unknown_url", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}


class Failure(NamedTuple):
    """The response to an error."""

    status: int
    error: Error
    headers: Mapping[str, str] = {}

    @property
    def body(self) -> str:
        return ErrorBody(error=self.error).to_json()


def failure_of(error: Exception, request_id: str | None = None) -> Failure:
    """Make the response to any error. An unexpected one is logged with its traceback, which is not shown."""
    if not isinstance(error, LorayError):
        of_request = f" of request {request_id}" if request_id else ""
        _log.error("unexpected error%s", of_request, exc_info=error)
        return _failure(500, "internal error; the gateway's log has the details", "internal_error")
    headers: dict[str, str] = {}
    if (retry_after_s := error.retry_after_s) is not None:
        if isinstance(error, Overloaded):  # an engine tells all the same time, and they would come back together
            retry_after_s *= uniform(1.0, 1.5)
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))  # HTTP allows whole seconds only
        headers["Retry-After-Ms"] = str(math.ceil(1000 * retry_after_s))  # which OpenAI's clients prefer
    if isinstance(error, RateLimited):
        headers |= error.headers
    return _failure(error.status, str(error), error.code, error.param, headers)


def _failure(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: Mapping[str, str] = {}
) -> Failure:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    challenge = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Failure(status, Error(message=message, type=kind, param=param, code=code), {**challenge, **headers})


def response_of(failure: Failure) -> Response:
    return Response(failure.body, failure.status, dict(failure.headers), media_type="application/json")


def install(app: FastAPI) -> None:
    """Give every error of `app` OpenAI's form."""

    def invalid(error: RequestValidationError) -> RequestError:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return RequestError(f"{param}: {first['msg']}", param)

    def refused(status: int, message: str) -> Response:
        return response_of(_failure(status, message, ROUTE_CODES.get(status)))

    install_error_handlers(app, failed=lambda error: response_of(failure_of(error)), invalid=invalid, refused=refused)
