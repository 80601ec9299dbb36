"""Pages of reference, made from the code: commands, both APIs, recipes, serve spec, metrics, errors, limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from docs.site.reference import commands, http, limits, specs, telemetry

PAGES: Mapping[str, Callable[[], str]] = {
    "cli": commands.page,
    "openai-api": http.openai_page,
    "catalog-api": http.catalog_page,
    "recipes": specs.recipes_page,
    "serve-spec": specs.serve_page,
    "metrics": telemetry.metrics_page,
    "errors": telemetry.errors_page,
    "limits": limits.page,
}


def reference() -> dict[str, str]:
    """Name of a page → its Markdown."""
    return {name: page() for name, page in PAGES.items()}
