"""Keys of a server in this process, which test clients ask by names of their own."""

from __future__ import annotations

from collections.abc import Mapping

from loray.catalog import Catalog
from loray.policy.auth import Action, KeyRing
from loray.spec import Principal
from serve_apps.auth import Authenticator
from serve_apps.catalog_watch import CatalogWatcher


def following(catalog_url: str) -> CatalogWatcher:
    return CatalogWatcher(lambda: Catalog(catalog_url))


def access_of(catalog_url: str, *, host: str = "127.0.0.1", ring: KeyRing | None = None) -> Authenticator:
    return Authenticator(ring or KeyRing(), following(catalog_url), host=host, names=frozenset({"test", "testserver"}))


class Given(Authenticator):
    """Whoever asks is this principal."""

    def __init__(self, principal: Principal) -> None:
        self._principal = principal
        self._asking = {}

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def admit(self, method: str, action: Action, headers: Mapping[str, str]) -> Principal:
        return self._principal
