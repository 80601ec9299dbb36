"""The server that these commands ask: --url, else LORAY_URL, else what is served from this LORAY_HOME."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from loray.errors import ClusterError
from loray.local.serving import serving_urls
from loray.settings import Settings

url_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--url", help="A server's URL (default: LORAY_URL, else what is served from this LORAY_HOME)."
)


def target(url: str | None) -> str:
    """The URL without a path. ClusterError where nothing is served."""
    settings = Settings.from_env()
    chosen = url or settings.url
    if chosen is not None:
        return chosen.rstrip("/").removesuffix("/v1")
    found = serving_urls(settings)
    if not found:
        raise ClusterError(
            "nothing is being served; start it with `loray serve` or `loray up`, or set LORAY_URL to a server's address"
        )
    return found[0]
