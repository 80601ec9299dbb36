"""What the catalog's API promises, as a few Python objects: the right answer to each request of a key.

Each operation returns what the API should show, or raises Refused with the status. It changes nothing then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

DEFAULT = "default"
BASE = "smollm2"


class Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class Caller:
    """A key. `scopes` with `admin` may do everything."""

    secret: str
    tenant: str
    scopes: frozenset[str]
    id: str = ""
    is_blocked: bool = False
    is_revoked: bool = False

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes


@dataclass
class Bytes:
    """What the store has under a digest. `is_gated`: an alias needs a reason."""

    method: str = "lora"
    is_gated: bool = False


@dataclass
class Adapter:
    """`name`: the full one. `targets`: alias → where it has pointed, the last one now."""

    name: str
    tenant: str
    visibility: str = "private"
    shared_with: frozenset[str] = frozenset()
    digests: dict[int, str] = field(default_factory=dict)
    deleted: set[int] = field(default_factory=set)
    targets: dict[str, list[int]] = field(default_factory=dict)
    revisions: dict[str, int] = field(default_factory=dict)
    is_deleted: bool = False

    @property
    def versions(self) -> list[int]:
        """Newest first."""
        return sorted(self.digests.keys() - self.deleted, reverse=True)

    @property
    def aliases(self) -> dict[str, int]:
        return {alias: targets[-1] for alias, targets in self.targets.items()}

    @property
    def default(self) -> int:
        return self.aliases.get("prod", self.versions[0])

    def move(self, alias: str, version: int) -> bool:
        if self.aliases.get(alias) == version:
            return False
        self.targets.setdefault(alias, []).append(version)
        return True


def full_name(tenant: str, name: str) -> str:
    return name if tenant == DEFAULT else f"{tenant}/{name}"


class Model:
    """The catalog. `stored`: the adapters of the store, by digest."""

    def __init__(self, stored: dict[str, Bytes]) -> None:
        self.stored = stored
        self.blocked = {DEFAULT: False}  # tenant → whether it is
        self.adapters: dict[str, Adapter] = {}
        self.uploads: set[tuple[str, str]] = set()  # (tenant, digest)
        self.last_revision = 0

    # -- who sees what ------------------------------------------------------------------------------------------------

    def enter(self, who: Caller, scope: str | None) -> None:
        """`scope` None: any key may."""
        if who.is_revoked:
            raise Refused(401)
        if who.is_blocked or (who.id and self.blocked[who.tenant]):
            raise Refused(403)
        if not who.is_admin and scope is not None and scope not in who.scopes:
            raise Refused(403)

    def sees(self, who: Caller, adapter: Adapter) -> bool:
        shared = adapter.visibility == "shared" and who.tenant in adapter.shared_with
        return not adapter.is_deleted and (self.owns(who, adapter) or adapter.visibility == "public" or shared)

    def owns(self, who: Caller, adapter: Adapter) -> bool:
        return who.is_admin or adapter.tenant == who.tenant

    def find(self, who: Caller, tenant: str | None, name: str, *, to_change: bool = False) -> Adapter:
        """A bare name is the own tenant's, then the default tenant's."""
        for owner in [who.tenant, DEFAULT] if tenant is None else [tenant]:
            found = self.adapters.get(full_name(owner, name))
            if found is not None and self.sees(who, found):
                if to_change and not self.owns(who, found):
                    raise Refused(403)
                return found
        raise Refused(404)

    def visible(
        self, who: Caller, *, tenant: str | None = None, method: str | None = None, search: str | None = None
    ) -> Iterator[Adapter]:
        """By name."""
        for name in sorted(self.adapters):
            adapter = self.adapters[name]
            is_wanted = (
                tenant in (None, adapter.tenant)
                and method in (None, self.stored[adapter.digests[adapter.default]].method)
                and (search or "").lower() in name.lower()
            )
            if is_wanted and self.sees(who, adapter):
                yield adapter

    # -- versions -----------------------------------------------------------------------------------------------------

    def register(
        self, who: Caller, tenant: str | None, name: str, digest: str, *, version: int | None, aliases: Sequence[str]
    ) -> tuple[Adapter, int]:
        if aliases and not (who.is_admin or "promote" in who.scopes):
            raise Refused(403)
        owner = tenant or who.tenant
        if name == BASE:
            raise Refused(409)
        if owner != who.tenant and not who.is_admin:
            self.find(who, owner, name, to_change=True)
        if owner not in self.blocked:
            raise Refused(422)
        adapter = self.adapters.get(full_name(owner, name), Adapter(full_name(owner, name), owner))
        if adapter.is_deleted:
            raise Refused(409)
        if digest not in self.stored or not self._may_name(who, digest):
            raise Refused(404)
        known = next((number for number, found in adapter.digests.items() if found == digest), None)
        if version is not None and (known or version) != version:
            raise Refused(409)
        if known is None and version in adapter.digests:
            raise Refused(409)
        number = known or version or max(adapter.digests, default=0) + 1
        if self.stored[digest].is_gated and any(adapter.aliases.get(alias) != number for alias in aliases):
            raise Refused(409)
        self.adapters[adapter.name] = adapter
        adapter.digests[number] = digest
        adapter.deleted.discard(number)
        for alias in aliases:
            adapter.move(alias, number)
        return adapter, number

    def _may_name(self, who: Caller, digest: str) -> bool:
        """Whether the tenant has brought these bytes, or sees them under some name."""
        return (
            who.is_admin
            or (who.tenant, digest) in self.uploads
            or any(
                self.sees(who, adapter)
                and found == digest
                and (number not in adapter.deleted or self.owns(who, adapter))
                for adapter in self.adapters.values()
                for number, found in adapter.digests.items()
            )
        )

    def delete_version(self, who: Caller, tenant: str | None, name: str, version: int) -> None:
        adapter = self.find(who, tenant, name, to_change=True)
        if version not in adapter.versions:
            raise Refused(404)
        if version in adapter.aliases.values() or len(adapter.versions) == 1:
            raise Refused(409)
        adapter.deleted.add(version)
        for alias, targets in adapter.targets.items():  # nothing rolls back to it
            adapter.targets[alias] = [target for target in targets if target != version]

    def delete(self, who: Caller, tenant: str | None, name: str) -> None:
        self.find(who, tenant, name, to_change=True).is_deleted = True

    def restore(self, who: Caller, tenant: str | None, name: str, version: int | None) -> Adapter:
        for owner in [who.tenant, DEFAULT] if tenant is None else [tenant]:
            adapter = self.adapters.get(full_name(owner, name))
            if adapter is None or not self.owns(who, adapter):
                continue
            if version is None and adapter.is_deleted:
                adapter.is_deleted = False
                return adapter
            if version in adapter.deleted and not adapter.is_deleted:
                adapter.deleted.discard(version)
                return adapter
        raise Refused(404)

    def share(
        self, who: Caller, tenant: str | None, name: str, visibility: str, shared_with: Collection[str]
    ) -> Adapter:
        if (visibility == "shared") != bool(shared_with):
            raise Refused(422)
        adapter = self.find(who, tenant, name, to_change=True)
        adapter.visibility, adapter.shared_with = visibility, frozenset(shared_with) - {adapter.tenant}
        return adapter

    # -- aliases ------------------------------------------------------------------------------------------------------

    def alias(self, who: Caller, tenant: str | None, name: str, alias: str, if_match: int | None) -> Adapter:
        """The adapter that has this alias, with this revision."""
        adapter = self.find(who, tenant, name)
        if alias not in adapter.targets:
            raise Refused(404)
        if if_match is not None and if_match != adapter.revisions[alias]:
            raise Refused(412)
        return adapter

    def put_alias(
        self, who: Caller, tenant: str | None, name: str, alias: str, version: int, if_match: int | None, reason: bool
    ) -> tuple[Adapter, bool, bool]:
        """(the adapter, whether the alias is new, whether it moved)"""
        adapter = self.find(who, tenant, name)
        if if_match is not None and if_match != adapter.revisions.get(alias, -1):
            raise Refused(412)
        if not self.owns(who, adapter):
            raise Refused(403)
        if version not in adapter.versions:
            raise Refused(404)
        is_new = alias not in adapter.targets
        if adapter.aliases.get(alias) != version and self.stored[adapter.digests[version]].is_gated and not reason:
            raise Refused(409)
        return adapter, is_new, adapter.move(alias, version)

    def delete_alias(self, who: Caller, tenant: str | None, name: str, alias: str, if_match: int | None) -> None:
        adapter = self.alias(who, tenant, name, alias, if_match)
        if not self.owns(who, adapter):
            raise Refused(403)
        del adapter.targets[alias], adapter.revisions[alias]

    def roll_back(self, who: Caller, tenant: str | None, name: str, alias: str, if_match: int | None) -> Adapter:
        adapter = self.alias(who, tenant, name, alias, if_match)
        if not self.owns(who, adapter):
            raise Refused(403)
        if len(adapter.targets[alias]) < 2:
            raise Refused(409)
        adapter.targets[alias].pop()
        return adapter

    def note_revision(self, adapter: Adapter, alias: str, revision: int, *, moved: bool) -> None:
        """Raises AssertionError unless a move has a revision that was never there, and nothing else has."""
        if moved:
            assert revision > self.last_revision
            self.last_revision = revision
        else:
            assert revision == adapter.revisions[alias]
        adapter.revisions[alias] = revision
