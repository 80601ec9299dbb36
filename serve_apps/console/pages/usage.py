"""Usage by tenant, key, model and day: a picture of the days, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, NamedTuple

from fastapi import Query, Request
from fastapi.responses import Response

from loray.catalog.identity.usage import UsageRow
from loray.spec import UsageGroup
from serve_apps.access import Asking, may
from serve_apps.console.backend import ConsoleDep
from serve_apps.console.routing import router_of

_ROWS = 200
_BAR, _HEIGHT = 16, 120  # units of the picture


class Bar(NamedTuple):
    """Output tokens of a day."""

    x: int
    height: float
    day: date
    num_tokens: int


router = router_of("")


@router.get("/usage")
@may("identify")
def show_usage(
    console: ConsoleDep,
    request: Request,
    asking: Asking,
    by: UsageGroup = "model",
    days: Annotated[int, Query(ge=1, le=90)] = 30,
) -> Response:
    """Of the own tenant, and for administrators of all."""
    catalog, tenant = console.backend.catalog_of(asking), None if asking.is_admin else asking.tenant
    today = datetime.now(UTC).date()
    first = today - timedelta(days=days - 1)
    since = datetime(first.year, first.month, first.day, tzinfo=UTC)
    rows = catalog.usage([by], tenant=tenant, since=since, limit=_ROWS + 1)
    daily = catalog.usage(["day"], tenant=tenant, since=since, limit=days + 1)
    return console.renderer.page(
        request,
        "usage.html",
        by=by,
        days=days,
        rows=rows[:_ROWS],
        is_cut=len(rows) > _ROWS,
        bars=bars_of(daily, first, days),
        bar=_BAR,
        height=_HEIGHT,
    )


def bars_of(rows: Sequence[UsageRow], first: date, days: int) -> list[Bar]:
    """A bar for each day from `first` on, the highest of the picture's height."""
    tokens = {row.day: row.num_output_tokens for row in rows}
    most = max(tokens.values(), default=0) or 1
    shown = [(number, first + timedelta(days=number)) for number in range(days)]
    return [Bar(n * _BAR, _HEIGHT * tokens.get(d, 0) / most, d, tokens.get(d, 0)) for n, d in shown]
