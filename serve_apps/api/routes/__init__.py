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

_of_access = ThreadPoolExecutor(8, thread_name_prefix="access")


class AccessRoute(APIRoute):
    """A route whose function has threads of its own: a key can be revoked while all others are taken."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        @wraps(endpoint)
        async def in_thread(*args: Any, **kwargs: Any) -> Any:
            call = partial(copy_context().run, endpoint, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(_of_access, call)

        super().__init__(path, in_thread, **options)


def router_of(tag: str, route_class: type[APIRoute] = APIRoute) -> APIRouter:
    """A new router, whose operations are named as their functions."""
    return APIRouter(tags=[tag], route_class=route_class, generate_unique_id_function=_operation_id)


def _operation_id(route: APIRoute) -> str:
    return route.name
