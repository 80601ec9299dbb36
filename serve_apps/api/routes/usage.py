"""Route of usage: what the requests of a tenant used."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Query, Request, Response

from loray.api.resources import WRITTEN_OUT, Page
from loray.api.usage import UsageResource
from loray.spec import QualifiedName, TenantName, UsageGroup
from serve_apps.access import may
from serve_apps.api import examples, views
from serve_apps.api.problems import responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import Asking, Limit, ServicesDep

router = router_of("usage")

_Groups = Annotated[
    list[UsageGroup], Query(description="`tenant`, `key`, `model` (an adapter or a base), `day` in UTC; none: one sum")
]
_MOST = 10**9
_Time = Annotated[datetime, WRITTEN_OUT]
_KEY_ID = r"^[A-Za-z0-9_-]{1,32}$"


@router.get("/usage", responses=responses() | examples.page(examples.USAGE, "100"))
@may("identify")
def get_usage(
    services: ServicesDep,
    request: Request,
    response: Response,
    asking: Asking,
    limit: Limit = 100,
    cursor: Annotated[int, Query(ge=0, le=_MOST, description="`next` of the page before")] = 0,
    group_by: _Groups = [],  # noqa: B006 - FastAPI copies it
    tenant: Annotated[TenantName | None, Query(description="for administrators; others have their own")] = None,
    key_id: Annotated[str | None, Query(pattern=_KEY_ID, description="only this key's requests")] = None,
    model: Annotated[QualifiedName | None, Query(description="only requests to this model")] = None,
    since: Annotated[_Time | None, Query(description="requests that ended then or later")] = None,
    until: Annotated[_Time | None, Query(description="requests that ended before")] = None,
) -> Page[UsageResource]:
    """Requests and their tokens, summed up: of the own tenant, and for administrators of all."""
    found = services.catalog.usage(
        group_by,
        tenant=tenant if asking.is_admin else asking.tenant,
        key_id=key_id,
        model=model,
        since=since,
        until=until,
        limit=limit + 1,
        offset=cursor,
    )
    rows = tuple(UsageResource(**row._asdict()) for row in found[:limit])
    return views.page(rows, str(cursor + limit) if len(found) > limit else None, request, response)
