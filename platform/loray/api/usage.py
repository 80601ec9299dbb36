"""The resource of usage: what requests of a group used."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from pydantic import Field

from loray.api.resources import Resource


class UsageResource(Resource):
    """Sums over one group. What usage is not grouped by is null; so is the key of requests that needed none."""

    tenant: str | None
    key_id: str | None
    model: Annotated[str | None, Field(description="the adapter's qualified name, or the base's")]
    day: Annotated[date | None, Field(description="in UTC")]
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    seconds: float
