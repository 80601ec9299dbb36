"""`CatalogService`: the API's operations on catalog and store, with resources as results."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from loray.catalog import AdapterEntry, Catalog
from loray.catalog.adapters import canonical_digests
from loray.catalog.identity import UNCHANGED, NewKey
from loray.schemas.access import (
    KeyChange,
    KeyCreation,
    KeyResource,
    NewKeyResource,
    Rotation,
    TenantChange,
    TenantResource,
)
from loray.schemas.resources import (
    AdapterResource,
    BaseResource,
    CanaryResource,
    ProjectionResource,
    ReplicaAdapter,
)
from loray.schemas.status import AdapterPlacement
from loray.spec import DEFAULT_ALIAS, CanaryBounds, Duration, Limits, Projection, Visibility

_PAGE = 1000


class DirectCatalog:
    """Has the methods of `CatalogClient` of the same names. Raises what the catalog raises."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def create_key(self, wanted: KeyCreation) -> NewKeyResource:
        """The key itself is in the answer, and nowhere else."""
        made = self._catalog.keys.create(
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
            page = self._catalog.keys.page(limit=_PAGE, cursor=cursor, tenant=tenant, alias=key_alias)
            yield from (KeyResource.of(key) for key in page.items)
            if (cursor := page.next) is None:
                return

    def key(self, key_id: str) -> KeyResource:
        return KeyResource.of(self._catalog.keys.get(key_id))

    def change_key(self, key_id: str, change: KeyChange) -> KeyResource:
        given = change.model_fields_set
        changed = self._catalog.keys.update(
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
        return KeyResource.of(self._catalog.keys.revoke(key_id, only_this=only_this))

    def rotate_key(self, key_id: str, *, grace_period: Duration | None = None) -> NewKeyResource:
        """A new key instead of this one, which goes on for `grace_period`."""
        return _new(self._catalog.keys.rotate(key_id, grace=Rotation(grace_period=grace_period).grace))

    def create_tenant(self, name: str, limits: Limits | None = None) -> TenantResource:
        return TenantResource.of(self._catalog.tenants.create(name, limits))

    def tenants(self) -> tuple[TenantResource, ...]:
        return tuple(TenantResource.of(tenant) for tenant in self._catalog.tenants.all())

    def tenant(self, name: str) -> TenantResource:
        return TenantResource.of(self._catalog.tenants.get(name))

    def change_tenant(self, name: str, change: TenantChange) -> TenantResource:
        changed = self._catalog.tenants.update(name, limits=change.limits, blocked=change.blocked)
        return TenantResource.of(changed)

    def share(self, name: str, visibility: Visibility, shared_with: Collection[str] = ()) -> AdapterResource:
        return self._resource(self._catalog.adapters.share(name, visibility, shared_with))

    def transfer(self, name: str, tenant: str, new_name: str | None = None) -> AdapterResource:
        return self._resource(self._catalog.adapters.transfer(name, tenant, new_name))

    def _resource(self, entry: AdapterEntry) -> AdapterResource:
        return adapter(entry, {fingerprint: name for name, fingerprint in self._catalog.bases.fingerprints().items()})

    def canary(self, name: str, alias: str = DEFAULT_ALIAS) -> CanaryResource:
        return CanaryResource.of(self._catalog.canaries.get(name, alias))

    def set_canary(
        self,
        name: str,
        alias: str,
        version: int,
        percent: int,
        *,
        bounds: CanaryBounds | None = None,
        no_gate: str | None = None,
    ) -> CanaryResource:
        state = self._catalog.canaries.set(name, alias, version, percent, bounds=bounds, no_gate=no_gate)
        return CanaryResource.of(state)

    def end_canary(self, name: str, alias: str = DEFAULT_ALIAS) -> CanaryResource:
        return CanaryResource.of(self._catalog.canaries.end(name, alias))

    def tags(self, name: str) -> Mapping[str, str]:
        return self._catalog.tags.of(name)

    def set_tag(self, name: str, key: str, value: str) -> None:
        self._catalog.tags.set(name, key, value)

    def delete_tag(self, name: str, key: str) -> None:
        self._catalog.tags.delete(name, key)


def _new(made: NewKey) -> NewKeyResource:
    return NewKeyResource.model_validate(KeyResource.of(made.key).model_dump() | {"key": made.secret})


T = TypeVar("T")


def adapter(entry: AdapterEntry, bases: Mapping[str, str]) -> AdapterResource:
    """An adapter. `bases`: fingerprint → name."""
    ref = entry.default
    return AdapterResource(
        name=entry.name,
        created_at=entry.created_at,
        version=ref.version,
        digest=ref.digest,
        method=ref.method,
        base=bases.get(ref.base_fingerprint),
        base_fingerprint=ref.base_fingerprint,
        context_length=ref.context_length,
        nbytes=ref.nbytes,
        versions=tuple(sorted(entry.versions, reverse=True)),
        aliases=dict(entry.aliases),
        weights=entry.weights,
        tenant=entry.tenant,
        visibility=entry.visibility,
        shared_with=tuple(sorted(entry.shared_with)),
    )


def base(name: str, fingerprint: str, projections: tuple[Projection, ...]) -> BaseResource:
    """A base. `projections`: all its VeRA pairs, in the catalog's order."""
    first = canonical_digests(projections)
    shown = (ProjectionResource(**p.model_dump(), canonical=p.sha256 in first) for p in projections)
    return BaseResource(name=name, fingerprint=fingerprint, projections=tuple(shown))


def placement(found: AdapterPlacement, version: int, *, with_use: bool) -> ReplicaAdapter:
    """An adapter in a replica. `version`: that of the requested name; the same bytes may have other names."""
    last_used_at = datetime.fromtimestamp(found.last_used_at, UTC) if with_use and found.last_used_at else None
    shown = found.model_dump(include={"replica", "node", "digest", "nbytes", "tier"})
    uses = found.uses if with_use else None
    return ReplicaAdapter(version=version, uses=uses, last_used_at=last_used_at, **shown)
