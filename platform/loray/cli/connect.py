"""The server, or the store and catalog, that a command works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loray.client import CatalogClient
from loray.errors import ClusterError, LorayError, SettingsError
from loray.local.serving import serving_urls
from loray.settings import Settings

if TYPE_CHECKING:
    from loray.service import CatalogService


_TRANSFER_RETRY_S = 60.0
_COMPLETION_TIMEOUT_S = 1.0
_MOST_NAMES = 200


@contextmanager
def open_services() -> Iterator[CatalogService]:
    """Opens the catalog itself, and the store when it is first needed."""
    from loray.catalog import Catalog
    from loray.service import CatalogService
    from loray.store import AdapterStore, open_store

    settings = Settings.from_env()
    catalog = Catalog.of(settings)
    try:
        yield CatalogService(settings, lambda: catalog, cache(lambda: AdapterStore(open_store(settings.store))))
    finally:
        catalog.close()


@contextmanager
def open_remote(*, retry_s: float = 0.0) -> Iterator[CatalogClient | None]:
    """Opens a client of the server at LORAY_URL; None where commands work on store and catalog themselves.

    `retry_s`: how long it waits for a server that is away.
    """
    settings = Settings.from_env()
    if settings.url is None:
        yield None
        return
    with CatalogClient(settings.url, retry_s=retry_s) as client:
        yield client


@contextmanager
def open_catalog() -> Iterator[CatalogClient | CatalogService]:
    """Opens a client of the server at LORAY_URL, else catalog and store themselves: for calls that both have."""
    with open_remote() as client:
        if client is not None:
            yield client
        else:
            with open_services() as services:
                yield services


@contextmanager
def needed_remote() -> Iterator[CatalogClient]:
    """Opens a client of LORAY_URL, whose transfers go on when the server comes back. SettingsError without one."""
    with open_remote(retry_s=_TRANSFER_RETRY_S) as client:
        if client is None:
            raise SettingsError("this asks a server: set LORAY_URL to its address, as http://127.0.0.1:8000")
        yield client


def find_version(catalog: CatalogClient | CatalogService, name: str, selector: str | None) -> int:
    """Returns the version that `name`, `name@3` or `name@alias` means. Whether a number exists is not looked up."""
    if selector is None:
        return catalog.adapter(name).version
    return int(selector) if selector.isascii() and selector.isdigit() else catalog.alias(name, selector).version


url_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--url", help="A server's URL (default: LORAY_URL, else what is served from this LORAY_HOME)."
)


def target(url: str | None) -> str:
    """Returns the server's URL without a path. ClusterError where nothing is served."""
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


def complete_models(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Lists models whose names begin like this, and aliases after `@`: of LORAY_URL, else of this machine."""
    try:
        return [name for name in _names(Settings.from_env(), incomplete) if name.startswith(incomplete)][:_MOST_NAMES]
    except (LorayError, OSError):
        return []


def _names(settings: Settings, incomplete: str) -> list[str]:
    if settings.url is not None:
        from loray.client import LorayClient

        with LorayClient(settings.url, timeout=_COMPLETION_TIMEOUT_S) as client:
            models = client.models()
        return [f"{m.id}{at}" for m in models for at in ("", *(f"@{alias}" for alias in m.aliases or ()))]
    bases = sorted(folder.name for folder in (settings.home / "bases").glob("[!.]*"))
    file = settings.catalog.removeprefix("sqlite:///")
    if file != settings.catalog and not Path(file).exists():
        return bases
    name, at, _ = incomplete.partition("@")
    with open_services() as services:
        if at:
            return [f"{name}@{alias}" for alias in services.adapter(name).aliases]
        return bases + [adapter.name for adapter in services.adapter_page(_MOST_NAMES, search=name or None).items]
