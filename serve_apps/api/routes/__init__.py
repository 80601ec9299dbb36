"""The routes of the catalog's API. They are made once a process; an application's services are in its state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial, wraps
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel

from loray.schemas.resources import example_of

_of_access = ThreadPoolExecutor(8, thread_name_prefix="access")

Responses = dict[int | str, dict[str, Any]]

CREATED: Responses = {201: {"headers": {"Location": {"description": "its URL", "schema": {"type": "string"}}}}}


class DescribedRoute(APIRoute):
    """A route whose answer has an example in the document, made of those of its model's fields."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        if isinstance(self.response_model, type) and issubclass(self.response_model, BaseModel):
            found = {"application/json": {"example": example_of(self.response_model)}}
            for status in {self.status_code or 200, *(s for s in self.responses if s in (200, 201))}:
                self.responses = {**self.responses, status: {**self.responses.get(status, {}), "content": found}}


class AccessRoute(DescribedRoute):
    """A route whose function has threads of its own: a key can be revoked while all others are taken."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        @wraps(endpoint)
        async def in_thread(*args: Any, **kwargs: Any) -> Any:
            call = partial(copy_context().run, endpoint, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(_of_access, call)

        super().__init__(path, in_thread, **options)


def router_of(tag: str, route_class: type[DescribedRoute] = DescribedRoute) -> APIRouter:
    """A new router, whose operations are named as their functions."""
    return APIRouter(tags=[tag], route_class=route_class, generate_unique_id_function=_operation_id)


def _operation_id(route: APIRoute) -> str:
    return route.name
