"""Keys of a server in this process, which test clients ask by names of their own."""

from __future__ import annotations

from loray.catalog import Catalog
from loray.serving.key_ring import KeyRing
from serve_apps.access import Access


def access_of(catalog_url: str, *, host: str = "127.0.0.1", ring: KeyRing | None = None) -> Access:
    return Access(ring or KeyRing(), lambda: Catalog(catalog_url), host=host, names=frozenset({"test", "testserver"}))
