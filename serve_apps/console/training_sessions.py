"""The pages of training sessions, which clients of Tinker's protocol begin: the list, and one with its models."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request
from fastapi.responses import Response

from serve_apps.auth import may
from serve_apps.console.backend import ConsoleDep, Service
from serve_apps.console.rendering import led_to, page_router

_PAGE = 50
SessionPath = Annotated[str, Path(max_length=128)]

router = page_router()


@router.get("/sessions")
@may("follow")
def list_sessions(
    console: ConsoleDep, service: Service, request: Request, offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0
) -> Response:
    """Show sessions newest first: the own tenant's, and to administrators all."""
    found = service.catalog.tinker.followed(limit=_PAGE + 1, offset=offset)
    more = offset + _PAGE if len(found) > _PAGE else None
    return console.renderer.page(request, "training_sessions.html", sessions=found[:_PAGE], more=more)


@router.get("/sessions/{id}/live")
@router.get("/sessions/{id}")
@may("follow")
def show_session(console: ConsoleDep, service: Service, request: Request, id: SessionPath) -> Response:
    return console.renderer.followed(request, "training_session.html", it=service.catalog.tinker.follow(id))


@router.post("/sessions/{id}/stop")
@may("train")
def stop_session(service: Service, request: Request, id: SessionPath) -> Response:
    """Stop a session: within half a minute its models are saved, and give their places back."""
    service.catalog.tinker.stop_session(id)
    return led_to(request, f"/sessions/{id}")
