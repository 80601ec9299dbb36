"""The routes of the catalog's API. They are made once a process; an application's services are in its state."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.routing import APIRoute


def router_of(tag: str) -> APIRouter:
    """A new router, whose operations are named as their functions."""
    return APIRouter(tags=[tag], generate_unique_id_function=_operation_id)


def _operation_id(route: APIRoute) -> str:
    return route.name
