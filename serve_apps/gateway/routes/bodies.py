"""Request bodies of the gateway's routes: checked by a schema, which the OpenAPI document shows."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from fastapi import Request

from loray.api.openai import parse
from loray.api.openai.body import Body
from loray.errors import RequestError
from serve_apps.bodies import parse_json, read

B = TypeVar("B", bound=Body)


async def body_of(request: Request, schema: type[B]) -> B:
    """The body of a request. Raises RequestError."""
    return await read(request, partial(_parsed, schema))


def _parsed(schema: type[B], raw: bytes) -> B:
    try:
        body = parse_json(raw)
    except ValueError as e:
        raise RequestError(f"the request body is not valid JSON: {e}") from e
    return parse(schema, body)
