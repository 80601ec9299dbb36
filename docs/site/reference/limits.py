"""Every limit of a server, by subject."""

from __future__ import annotations

from docs.site.markdown import table
from serve_apps.limits import TABLES, Limit

_TITLES = {
    "requests": "Requests to `/v1`",
    "constraints": "Structured output",
    "keys": "Keys and logins",
    "stored": "What a tenant may store",
    "jobs": "Training jobs",
    "catalog-api": "The catalog's API",
}


def page() -> str:
    """All tables of `serve_apps.limits`."""
    parts = [
        "# Limits\n",
        "What each limit is, what sets it and what lies beyond it. Limits that keys and tenants have of their own are "
        "explained in [access](../guide/access.md#limits-of-requests).\n",
    ]
    for name, limits in TABLES.items():
        parts += [f"## {_TITLES[name]}\n", limits_table(limits)]
    return "\n".join(parts)


def limits_table(limits: tuple[Limit, ...]) -> str:
    """The rows as Markdown."""
    rows = [(limit.what, limit.limit, limit.set_by, limit.beyond) for limit in limits]
    return table(("what", "limit", "set by", "beyond it"), rows)
