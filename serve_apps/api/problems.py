"""Errors of the REST API as application/problem+json (RFC 9457), and preconditions on aliases (RFC 9110)."""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, FastAPI, Header
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic_core import ErrorDetails
from starlette.types import Scope

from loray.errors import BaseMismatch, LorayError, Overloaded, RevisionConflict, SpecError, UnsupportedError
from loray.publishing.uploads import MAX_FILE_BYTES
from loray.schemas.resources import FieldError, Problem, problem_type
from loray.telemetry import get_logger
from serve_apps.http import BodyLimit, install_error_handlers, path_of, schema_reference

_log = get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
MAX_BODY_BYTES = 256 << 10
_ADVICE = "data belongs into files that it names"
_FILE_ROUTES = re.compile(r"(/console)?/uploads/[^/]+/files/[^/]+|/console/files")  # adapters may be called uploads
_ALWAYS = (400, 401, 403, 413, 422, 500, 503)
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "60"}, 503: {"Retry-After": "1"}}
_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_LIST = re.compile(rf"\s*(?:\*|{_TAG}(?:\s*,\s*{_TAG})*)\s*")
_STRONG = re.compile(r'(?<!W/)"(\d{1,18})"')
_WEAK = re.compile(r'"(\d{1,18})"')


class InvalidFields(SpecError):
    """A request's body or parameters are not valid. `errors`: one per wrong field."""

    def __init__(self, message: str, errors: tuple[FieldError, ...]) -> None:
        super().__init__(message, errors)
        self.errors = errors


# Here a model is what is sent, and not what is asked; and who is to come back later has not asked too often.
_STATUSES: dict[type[LorayError], int] = {UnsupportedError: 422, BaseMismatch: 422, Overloaded: 503}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe error responses, for `responses=` of a route. Those of every route are always included."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*statuses, *_ALWAYS}):
        title = HTTPStatus(status).phrase
        example = {"type": "about:blank", "title": title, "status": status, "detail": "what was wrong and what to do"}
        content = {MEDIA_TYPE: {"schema": schema_reference(Problem.__name__), "example": example}}
        described[status] = {"description": title, "content": content}
    return described


def fields_of(errors: list[ErrorDetails] | Any, skip: int = 0) -> tuple[FieldError, ...]:
    """Convert pydantic's errors, one per wrong field. `skip`: how many parts of each location go, such as `body`."""
    return tuple(
        FieldError(field=".".join(str(part) for part in e["loc"][skip:]) or "(body)", message=e["msg"]) for e in errors
    )


def install(app: FastAPI) -> None:
    """Give every error of `app` the form of a problem, and limit the size of request bodies."""
    install_error_handlers(app, failed=failed, invalid=_invalid, refused=_response)
    app.add_middleware(BodyLimit, max_bytes=_max_body_bytes, advice=_ADVICE)


def failed(error: Exception) -> Response:
    """Make the response to any error."""
    if not isinstance(error, LorayError):
        _log.error("unexpected error", exc_info=error)
        return _response(500, "internal error; the log of the API server has the details", problem_type(LorayError))
    status = status_of(type(error))
    if status == 500:
        _log.error("request failed: %s: %s", type(error).__name__, error)
    response = _response(status, str(error), problem_type(type(error)), getattr(error, "errors", None))
    if error.retry_after_s is not None and "retry-after" in response.headers:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return response


def status_of(error: type[LorayError]) -> int:
    """Return the HTTP status of an error of this class."""
    return next((status for cls, status in _STATUSES.items() if issubclass(error, cls)), error.status)


def _max_body_bytes(scope: Scope) -> int:
    """Limit a body. A file's is not held in memory: its route counts it."""
    is_file = scope["method"] == "PUT" and _FILE_ROUTES.fullmatch(path_of(scope)) is not None
    return MAX_FILE_BYTES if is_file else MAX_BODY_BYTES


def _invalid(error: RequestValidationError) -> InvalidFields:
    fields = fields_of(error.errors(), skip=1)
    return InvalidFields("the request is not valid: " + "; ".join(f"{f.field}: {f.message}" for f in fields), fields)


def _response(
    status: int, detail: str, kind: str = "about:blank", errors: tuple[FieldError, ...] | None = None
) -> Response:
    problem = Problem(type=kind, title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors)
    return Response(problem.model_dump_json(exclude_none=True), status, _HEADERS.get(status), media_type=MEDIA_TYPE)


class Preconditions(NamedTuple):
    """The conditional headers of a request."""

    if_match: str | None
    if_none_match: str | None

    def expected(self, current: int, alias: str) -> str | None:
        """Return the ETag that the alias must have when it is written, `"0"` where it must not be set; None without
        preconditions.

        `current`: the revision now, 0 if the alias is not set. Raises RevisionConflict if it does not fit the headers,
        SpecError if a header is malformed.
        """
        self.check_match(current, alias)
        if self.found_unchanged(current):
            raise RevisionConflict(f"alias {alias!r} {_describe(current)}, which If-None-Match rules out")
        return None if self.if_match is None and self.if_none_match is None else f'"{current}"'

    def check_match(self, current: int, alias: str) -> None:
        """Raise RevisionConflict if If-Match does not match the alias's revision."""
        if self.if_match is not None and not _matches(self.if_match, "If-Match", _STRONG, current):
            raise RevisionConflict(f"alias {alias!r} {_describe(current)}, which is not what If-Match asks for")

    def found_unchanged(self, revision: int) -> bool:
        """Tell whether a GET gets the response 304."""
        return self.if_none_match is not None and _matches(self.if_none_match, "If-None-Match", _WEAK, revision)


def _describe(revision: int) -> str:
    return f"has revision {revision}" if revision else "is not set"


def _matches(header: str, name: str, tag: re.Pattern[str], revision: int) -> bool:
    """Tell whether a tag of the header matches `revision`, 0 for an alias that is not set. Raises SpecError."""
    if not _LIST.fullmatch(header):
        raise SpecError(f'{name} is neither * nor a list of ETags in quotes, as in {name}: "17"')
    return revision > 0 and (header.strip() == "*" or revision in map(int, tag.findall(header)))


def _preconditions(
    if_match: Annotated[str | None, Header(description='Only if it has this ETag now, as in `"17"`')] = None,
    if_none_match: Annotated[
        str | None, Header(description="`*`: only if it is not set; for GET, an ETag that the client has")
    ] = None,
) -> Preconditions:
    return Preconditions(if_match, if_none_match)


Conditional = Annotated[Preconditions, Depends(_preconditions)]
