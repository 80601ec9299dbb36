"""`loray usage`: what requests used, as the catalog or the server of LORAY_URL says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import cast

import click

from loray.cli.connect import open_catalog
from loray.cli.output import json_option, table, tell
from loray.spec import USAGE_GROUPS, UsageGroup

_MOST = 100_000  # rows
_COUNTS = {
    "requests": "num_requests",
    "prompt": "num_prompt_tokens",
    "cached": "num_cached_tokens",
    "output": "num_output_tokens",
}


@click.command()
@click.option(
    "--by",
    "groups",
    multiple=True,
    type=click.Choice(USAGE_GROUPS),
    default=("tenant", "model"),
    show_default=True,
    help="Sum up by this; may be given several times.",
)
@click.option("--tenant", help="Only this tenant's requests.")
@click.option("--key", "key_id", help="Only requests with the key of this id.")
@click.option("--model", help="Only requests to this adapter or base.")
@click.option("--days", type=click.IntRange(min=1), default=30, show_default=True, help="Of so many days until now.")
@json_option
def usage(
    groups: tuple[str, ...], tenant: str | None, key_id: str | None, model: str | None, days: int, as_json: bool
) -> None:
    """Show what requests used: their tokens, by tenant, key, adapter and day (UTC).

    With LORAY_URL a server is asked, which tells an administrator of all, and others of their own tenant.
    """
    since = datetime.now(UTC) - timedelta(days=days)
    by = cast(tuple[UsageGroup, ...], groups)
    with open_catalog() as catalog:
        found = catalog.usage(by, tenant=tenant, key_id=key_id, model=model, since=since)
        rows = [row for row in islice(found, _MOST) if row.num_requests]
    fields = {"tenant": "tenant", "key": "key_id", "model": "model", "day": "day"}
    shown = [name for name in fields if name in groups]
    lines = [
        [
            *(str(getattr(row, fields[name]) or "–") for name in shown),
            *(
                f"{n:,}"
                for n in (row.num_requests, row.num_prompt_tokens, row.num_cached_tokens, row.num_output_tokens)
            ),
        ]
        for row in rows
    ]
    made = table([*shown, *_COUNTS], lines, right=list(_COUNTS))
    none = f"no requests in the last {days} days"
    tell(made if lines else none, [row.model_dump(mode="json") for row in rows], as_json)
