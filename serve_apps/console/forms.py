"""The fields of a form that a page sends."""

from __future__ import annotations

import json
from typing import Any, TypeVar
from urllib.parse import parse_qs

from fastapi import Request
from pydantic import BaseModel, ValidationError

from loray.errors import SpecError

MOST_SUGGESTED = 200  # bases beside a field, which takes the names of others too
_MOST_FIELDS = 200
T = TypeVar("T", bound=BaseModel)


class Form:
    def __init__(self, fields: dict[str, list[str]]) -> None:
        self._fields = fields

    def get(self, name: str) -> str:
        """The field's text without spaces around it; empty where it is not there."""
        return self._fields.get(name, [""])[-1].strip()

    def all(self, name: str) -> tuple[str, ...]:
        return tuple(value.strip() for value in self._fields.get(name, []) if value.strip())


async def read_form(request: Request) -> Form:
    """Raises SpecError for what is neither a form nor an object of JSON."""
    body = await request.body()
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            given = json.loads(body or b"{}")
            if not isinstance(given, dict):
                raise SpecError("the body is no object")
            return Form({k: [str(x) for x in v] if isinstance(v, list) else [str(v)] for k, v in given.items()})
        return Form(parse_qs(body.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS))
    except ValueError as e:
        raise SpecError(f"the form cannot be read: {e}") from e


def checked(model: type[T], given: dict[str, Any]) -> T:
    """Raises SpecError that names each wrong field."""
    try:
        return model.model_validate(given)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors())
        raise SpecError(wrong) from e
