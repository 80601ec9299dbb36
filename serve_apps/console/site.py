"""The console's routes, which the catalog's application includes."""

from __future__ import annotations

from fastapi import APIRouter

from serve_apps.access import Access
from serve_apps.console.backend import Backend
from serve_apps.console.pages import adapters, jobs, keys, overview, playground, serving, session, usage
from serve_apps.console.rendering import Renderer
from serve_apps.console.sessions import Sessions


def create_router(backend: Backend, access: Access, sessions: Sessions, renderer: Renderer) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for module in (overview, adapters, playground, jobs, serving, keys, usage):
        router.include_router(module.create_router(backend, renderer))
    router.include_router(session.create_router(access, sessions, renderer))
    return router
