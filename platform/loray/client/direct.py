"""The calls of keys and tenants on a catalog itself, with the resources that the API answers: for its routes, and for
commands without a server.
"""

from __future__ import annotations

from collections.abc import Iterator

from loray.api.access import (
    KeyChange,
    KeyCreation,
    KeyResource,
    NewKeyResource,
    Rotation,
    TenantChange,
    TenantResource,
)
from loray.catalog import Catalog
from loray.catalog.identity import NewKey
from loray.catalog.identity.keys import UNCHANGED
from loray.spec import Duration, Limits

_PAGE = 1000


class DirectAccess:
    """Has the methods of `AccessCalls` of the same names. Raises what the catalog raises."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def create_key(self, wanted: KeyCreation) -> NewKeyResource:
        """The key itself is in the answer, and nowhere else."""
        made = self._catalog.create_key(
            wanted.key_alias,
            tenant=wanted.tenant,
            scopes=wanted.scopes,
            models=wanted.models,
            limits=wanted.limits,
            metadata=wanted.metadata,
            expires_at=wanted.expires_at,
        )
        return _new(made)

    def keys(self, *, tenant: str | None = None, key_alias: str | None = None) -> Iterator[KeyResource]:
        """All keys, newest first."""
        cursor: str | None = None
        while True:
            page = self._catalog.keys(limit=_PAGE, cursor=cursor, tenant=tenant, alias=key_alias)
            yield from (KeyResource.of(key) for key in page.keys)
            if (cursor := page.next) is None:
                return

    def key(self, key_id: str) -> KeyResource:
        return KeyResource.of(self._catalog.key(key_id))

    def change_key(self, key_id: str, change: KeyChange) -> KeyResource:
        given = change.model_fields_set
        changed = self._catalog.update_key(
            key_id,
            alias=change.key_alias,
            blocked=change.blocked,
            limits=change.limits,
            single_limits=change.single_limits,
            metadata=change.metadata,
            models=change.models if "models" in given else UNCHANGED,
            expires_at=change.expires_at if given & {"duration", "expires"} else UNCHANGED,
        )
        return KeyResource.of(changed)

    def revoke_key(self, key_id: str, *, only_this: bool = False) -> KeyResource:
        """With those that it was rotated from and into, or `only_this`."""
        return KeyResource.of(self._catalog.revoke_key(key_id, only_this=only_this))

    def rotate_key(self, key_id: str, *, grace_period: Duration | None = None) -> NewKeyResource:
        """A new key instead of this one, which goes on for `grace_period`."""
        return _new(self._catalog.rotate_key(key_id, grace=Rotation(grace_period=grace_period).grace))

    def create_tenant(self, name: str, limits: Limits | None = None) -> TenantResource:
        return TenantResource.of(self._catalog.create_tenant(name, limits))

    def tenants(self) -> tuple[TenantResource, ...]:
        return tuple(TenantResource.of(tenant) for tenant in self._catalog.tenants())

    def tenant(self, name: str) -> TenantResource:
        return TenantResource.of(self._catalog.tenant(name))

    def change_tenant(self, name: str, change: TenantChange) -> TenantResource:
        changed = self._catalog.update_tenant(name, limits=change.limits, blocked=change.blocked)
        return TenantResource.of(changed)


def _new(made: NewKey) -> NewKeyResource:
    return NewKeyResource.model_validate(KeyResource.of(made.key).model_dump() | {"key": made.secret})
