"""What all request bodies have in common: their strictness, hints that change nothing, and how they are parsed."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loray.api.openai.fields import ShortText, SmallObject
from loray.api.openai.unsupported import without_unsupported
from loray.errors import RequestError, shown

_MAX_MISTAKES = 8  # that one message names
_HINT = "accepted; it changes nothing"


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Hints(Body):
    """Fields that clients send for OpenAI's accounting and for other kinds of models."""

    metadata: SmallObject | None = Field(default=None, description="accepted; nothing is stored")
    store: bool | None = Field(default=None, description="accepted; nothing is stored")
    reasoning_effort: ShortText | None = Field(default=None, description=_HINT)
    include_reasoning: bool | None = Field(default=None, description="accepted; answers have no reasoning of their own")
    verbosity: ShortText | None = Field(default=None, description=_HINT)
    service_tier: ShortText | None = Field(default=None, description=_HINT)
    safety_identifier: ShortText | None = Field(default=None, description="accepted, for the caller's own use")
    prompt_cache_key: ShortText | None = Field(default=None, description="accepted; the prefix cache needs no key")
    prompt_cache_retention: ShortText | None = Field(default=None, description=_HINT)


B = TypeVar("B", bound=Body)


def parse(schema: type[B], body: object) -> B:
    """Checks a decoded JSON body. A null field counts as absent. Raises RequestError that names the field."""
    if not isinstance(body, dict):
        raise RequestError("the request body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    given = without_unsupported(given, schema.model_fields)
    try:
        return schema.model_validate(given)
    except ValidationError as e:
        raise _request_error(e, schema) from e


def _request_error(error: ValidationError, schema: type[BaseModel]) -> RequestError:
    """The mistakes in one message; `param` is the first wrong field."""
    lines, params = [], []
    for detail in error.errors(include_url=False, include_input=False)[:_MAX_MISTAKES]:
        param = ".".join(str(part)[:80] for part in detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if detail["type"] == "extra_forbidden":
            known = f"; known fields: {', '.join(sorted(schema.model_fields))}" if len(detail["loc"]) == 1 else ""
            lines.append(f"unknown field {shown(param)}{known}")
        elif detail["type"] == "missing":
            lines.append(f"{param!r} is required")
        elif isinstance(cause, RequestError):
            lines.append(f"{param}: {cause}" if param else str(cause))
            param = param or cause.param or ""
        else:
            message = detail["msg"]
            lines.append(f"{param}: {message[:1].lower()}{message[1:]}" if param else message)
        params.append(param)
    if error.error_count() > _MAX_MISTAKES:
        lines.append(f"and {error.error_count() - _MAX_MISTAKES:,} more mistakes")
    return RequestError("; ".join(lines), params[0] or None)
