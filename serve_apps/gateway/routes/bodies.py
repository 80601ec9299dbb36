"""Request bodies of the gateway's routes: checked by a schema, which the OpenAPI document shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from fastapi import Request

from loray.api.openai import parse
from loray.api.openai.body import Body
from loray.errors import RequestError
from serve_apps.bodies import parse_json, read

B = TypeVar("B", bound=Body)
T = TypeVar("T")


async def body_of(request: Request, schema: type[B]) -> B:
    """The body of a request. Raises RequestError."""
    return await converted_body(request, partial(parse, schema))


async def converted_body(request: Request, convert: Callable[[object], T]) -> T:
    """What `convert` makes of the decoded JSON, in a thread if the body is long."""
    return await read(request, partial(_converted, convert))


def _converted(convert: Callable[[object], T], raw: bytes) -> T:
    try:
        body = parse_json(raw)
    except ValueError as e:
        raise RequestError(f"the request body is not valid JSON: {e}") from e
    return convert(body)
