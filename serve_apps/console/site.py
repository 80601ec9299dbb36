"""The console's routes, which the catalog's application has beside its own."""

from __future__ import annotations

from serve_apps.console import adapters, files, jobs, keys, serving, session, training_sessions

ROUTES = [
    route
    for pages in (serving, adapters, files, jobs, training_sessions, keys, session)
    for route in pages.router.routes
]
