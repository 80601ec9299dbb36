"""The console's routes, which the catalog's application has beside its own."""

from __future__ import annotations

from serve_apps.console.pages.adapters import router as adapters_router
from serve_apps.console.pages.advice import router as advice_router
from serve_apps.console.pages.jobs import router as jobs_router
from serve_apps.console.pages.keys import router as keys_router
from serve_apps.console.pages.overview import router as overview_router
from serve_apps.console.pages.playground import router as playground_router
from serve_apps.console.pages.replicas import router as replicas_router
from serve_apps.console.pages.serving import router as serving_router
from serve_apps.console.pages.session import router as session_router
from serve_apps.console.pages.uploads import router as uploads_router
from serve_apps.console.pages.usage import router as usage_router

ROUTES = [
    route
    for router in (
        overview_router,
        adapters_router,
        uploads_router,
        playground_router,
        jobs_router,
        serving_router,
        replicas_router,
        advice_router,
        keys_router,
        usage_router,
        session_router,
    )
    for route in router.routes
]
