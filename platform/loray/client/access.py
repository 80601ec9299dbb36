"""The calls of keys, tenants and the audit log."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from loray.api.access import (
    AuditResource,
    KeyChange,
    KeyCreation,
    KeyResource,
    NewKeyResource,
    TenantChange,
    TenantCreation,
    TenantResource,
)
from loray.api.resources import Page
from loray.client.http import PagedClient, given
from loray.spec import Duration, Limits


class AccessCalls(PagedClient):
    """A part of CatalogClient. What is not about the own key is for administrators, keys also for those of a tenant."""

    def create_key(self, wanted: KeyCreation) -> NewKeyResource:
        """The key itself is in the answer, and nowhere else."""
        body = wanted.model_dump(mode="json", exclude_unset=True)
        return self._ask(NewKeyResource, "POST", "/keys", json=body)

    def keys(self, *, tenant: str | None = None, key_alias: str | None = None) -> Iterator[KeyResource]:
        """All keys, newest first, fetched page by page."""
        return self._pages("/keys", Page[KeyResource], {"tenant": tenant, "key_alias": key_alias})

    def key(self, key_id: str = "self") -> KeyResource:
        """One key; this client's own by default."""
        return self._ask(KeyResource, "GET", f"/keys/{key_id}")

    def change_key(self, key_id: str, change: KeyChange) -> KeyResource:
        body = change.model_dump(mode="json", exclude_unset=True)
        return self._ask(KeyResource, "PATCH", f"/keys/{key_id}", json=body)

    def revoke_key(self, key_id: str, *, only_this: bool = False) -> KeyResource:
        """With those that it was rotated from and into, or `only_this`."""
        return self._ask(KeyResource, "DELETE", f"/keys/{key_id}", params={"only_this": True} if only_this else {})

    def rotate_key(self, key_id: str, *, grace_period: Duration | None = None) -> NewKeyResource:
        """A new key instead of this one, which goes on for `grace_period`. A key may replace itself."""
        body = given({"grace_period": grace_period})
        return self._ask(NewKeyResource, "POST", f"/keys/{key_id}/rotate", json=body)

    def create_tenant(self, name: str, limits: Limits | None = None) -> TenantResource:
        fields = {} if limits is None else limits.model_dump(exclude_unset=True)
        body = TenantCreation(name=name, **fields).model_dump(mode="json", exclude_unset=True)
        return self._ask(TenantResource, "POST", "/tenants", json=body)

    def tenants(self) -> tuple[TenantResource, ...]:
        return self._ask(Page[TenantResource], "GET", "/tenants").items

    def tenant(self, name: str) -> TenantResource:
        return self._ask(TenantResource, "GET", f"/tenants/{name}")

    def change_tenant(self, name: str, change: TenantChange) -> TenantResource:
        body = change.model_dump(mode="json", exclude_unset=True)
        return self._ask(TenantResource, "PATCH", f"/tenants/{name}", json=body)

    def audit(
        self,
        *,
        tenant: str | None = None,
        actor: str | None = None,
        action: str | None = None,
        subject: str | None = None,
        since: datetime | None = None,
    ) -> Iterator[AuditResource]:
        """What was written, newest first, fetched page by page: of the own tenant; for administrators of all."""
        wanted = {"tenant": tenant, "actor": actor, "action": action, "subject": subject}
        wanted |= {"since": None if since is None else since.isoformat()}
        return self._pages("/audit", Page[AuditResource], dict(wanted))
