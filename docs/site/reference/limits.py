"""Every limit of a server, by subject."""

from __future__ import annotations

from docs.site.limits import limits_table
from serve_apps.limits import TABLES

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
