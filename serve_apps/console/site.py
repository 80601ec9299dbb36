"""The console's routes, which the catalog's application has beside its own."""

from __future__ import annotations

from serve_apps.console.adapters import router as adapters_router
from serve_apps.console.adapters import uploads_router
from serve_apps.console.jobs import router as jobs_router
from serve_apps.console.keys import router as keys_router
from serve_apps.console.keys import usage_router
from serve_apps.console.pages.advice import router as advice_router
from serve_apps.console.serving import playground_router, replicas_router, serving_router
from serve_apps.console.serving import router as overview_router
from serve_apps.console.session import router as session_router

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
