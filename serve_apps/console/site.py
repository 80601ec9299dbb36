"""The console's routes, which the catalog's application has beside its own."""

from __future__ import annotations

from serve_apps.console.pages import (
    adapters,
    advice,
    jobs,
    keys,
    overview,
    playground,
    replicas,
    serving,
    session,
    uploads,
    usage,
)

ROUTES = [
    route
    for module in (overview, adapters, uploads, playground, jobs, serving, replicas, advice, keys, usage, session)
    for route in module.router.routes
]
