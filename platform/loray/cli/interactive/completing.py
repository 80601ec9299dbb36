"""Names of adapters for a shell's completion. What takes long, or fails, completes nothing."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import click

from loray.errors import LorayError
from loray.settings import Settings

_TIMEOUT_S = 1.0
_MOST = 200


def complete_models(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Adapters and bases whose names begin like this, and aliases after `@`: of LORAY_URL, else of this machine."""
    try:
        return [name for name in _names(Settings.from_env(), incomplete) if name.startswith(incomplete)][:_MOST]
    except (LorayError, OSError):
        return []


def _names(settings: Settings, incomplete: str) -> list[str]:
    if settings.url is not None:
        from loray.client import LorayClient

        with LorayClient(settings.url, timeout=_TIMEOUT_S) as client:
            models = client.models()
        return [f"{m.id}{at}" for m in models for at in ("", *(f"@{alias}" for alias in m.aliases or ()))]
    bases = sorted(folder.name for folder in (settings.home / "bases").glob("[!.]*"))
    file = settings.catalog.removeprefix("sqlite:///")
    if file != settings.catalog and not Path(file).exists():
        return bases
    from loray.catalog import Catalog

    catalog = Catalog(settings.catalog)
    try:
        name, at, _ = incomplete.partition("@")
        if at:
            return [f"{name}@{alias}" for alias, _ in catalog.adapter(name).entry.pointers]
        return bases + [entry.name for entry in islice(catalog.names(limit=_MOST, search=name or None), _MOST)]
    finally:
        catalog.close()
