"""The console's routes, which the catalog's application has beside its own."""

from __future__ import annotations

from serve_apps.console import adapters, files, jobs, keys, serving, session

ROUTES = [route for pages in (serving, adapters, files, jobs, keys, session) for route in pages.router.routes]
