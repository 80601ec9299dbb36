"""The operations of the API on catalog and store, with the API's resources as results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, Unpack

from loray.bases.registry import base_with
from loray.catalog import AdapterEntry, AdapterVersion, AliasMove, Catalog
from loray.catalog.adapters import canonical_digests
from loray.errors import KeyNotFound, RequestError, SpecError
from loray.files import appearing
from loray.publishing import Destination, register_stored, restore
from loray.publishing.convert import merge_into_base, save_as_gguf
from loray.publishing.uploads import Uploads
from loray.schemas.access import (
    AuditFilter,
    AuditResource,
    KeyChange,
    KeyCreation,
    KeyResource,
    NewKeyResource,
    Rotation,
    TenantChange,
    TenantResource,
)
from loray.schemas.resources import (
    AdapterFilter,
    AdapterResource,
    AliasResource,
    BaseResource,
    CanaryResource,
    DownloadForm,
    FileResource,
    Page,
    ProjectionResource,
    TagResource,
    UploadResource,
    UsageFilter,
    UsageResource,
    VersionDetail,
    VersionResource,
)
from loray.scratch import Scratch
from loray.settings import Settings
from loray.spec import (
    DEFAULT_ALIAS,
    AdapterManifest,
    CanaryBounds,
    Duration,
    Evaluation,
    Limits,
    ToolParserName,
    UsageGroup,
    Visibility,
)
from loray.store import AdapterStore
from loray.text.templates import ChatTemplate

T = TypeVar("T")

_PAGE = 1000
_MOST_SUMS = 100_000  # of usage, without a server


class CatalogService:
    """Does what the catalog's caller may ask for: with adapters, keys, tenants, usage and uploads. `CatalogClient` has
    the methods of the same names over HTTP, so that a command takes either; those that make one page are the API's
    alone.

    Raises what catalog, store and publishing raise. An `etag` is that of an alias, `"0"` where it must not be set.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Callable[[], Catalog],
        store: Callable[[], AdapterStore],
        scratch: Scratch | None = None,
    ) -> None:
        """`catalog` and `store` are asked for at each use, and may raise: a server starts without them.

        scratch  the bytes that uploads may take of this machine's disk; None: a share of what is free
        """
        self.settings = settings
        self._catalog, self._store, self._scratch = catalog, store, scratch or Scratch()

    @property
    def catalog(self) -> Catalog:
        return self._catalog()

    @property
    def store(self) -> AdapterStore:
        return self._store()

    # -- adapters -----------------------------------------------------------------------------------------------------

    def bases(self) -> tuple[BaseResource, ...]:
        catalog = self.catalog
        found, forms = [], catalog.bases.forms()
        for name, fingerprint in catalog.bases.fingerprints().items():
            projections = catalog.bases.projections(fingerprint)
            first = canonical_digests(projections)
            shown = (ProjectionResource(**p.model_dump(), canonical=p.sha256 in first) for p in projections)
            of, pairs = forms.get(fingerprint), tuple(shown)
            found.append(BaseResource(name=name, fingerprint=fingerprint, of=of, projections=pairs))
        return tuple(found)

    def adapters(self, **wanted: Unpack[AdapterFilter]) -> Iterator[AdapterResource]:
        """All adapters that exist for the caller and are like this, in the order of their names."""
        return _all(lambda cursor: self.adapter_page(_PAGE, cursor, **wanted))

    def adapter_page(
        self, limit: int, cursor: str | None = None, **wanted: Unpack[AdapterFilter]
    ) -> Page[AdapterResource]:
        found = self.catalog.adapters.page(limit=limit + 1, after=cursor or "", **wanted)
        names = self._base_names()
        items = tuple(_adapter(entry, names) for entry in found[:limit])
        return Page[AdapterResource](items=items, next=items[-1].name if len(found) > limit else None)

    def adapter(self, name: str) -> AdapterResource:
        return _adapter(self.catalog.adapters.get(name), self._base_names())

    def share(self, name: str, visibility: Visibility, shared_with: Sequence[str] = ()) -> AdapterResource:
        """Sets who sees the adapter beside its tenant: nobody, the tenants of `shared_with`, or everybody."""
        return _adapter(self.catalog.adapters.share(name, visibility, shared_with), self._base_names())

    def transfer(self, name: str, tenant: str, new_name: str | None = None) -> AdapterResource:
        """Hands the adapter to another tenant; for administrators."""
        return _adapter(self.catalog.adapters.transfer(name, tenant, new_name), self._base_names())

    def tags(self, name: str) -> dict[str, str]:
        return dict(self.catalog.tags.of(name))

    def set_tag(self, name: str, key: str, value: str = "") -> TagResource:
        self.catalog.tags.set(name, key, value)
        return TagResource(key=key, value=value)

    def delete_tag(self, name: str, key: str) -> None:
        self.catalog.tags.delete(name, key)

    def version_page(self, name: str, limit: int, cursor: int | None = None) -> Page[VersionResource]:
        """Versions, newest first."""
        found = self.catalog.adapters.versions(name, limit=limit, before=cursor)
        return Page[VersionResource](items=found.items, next=found.next)

    def version(self, name: str, version: int) -> VersionDetail:
        return self.catalog.adapters.version(name, version)

    def register(
        self,
        name: str,
        digest: str | None = None,
        *,
        upload: str | None = None,
        aliases: Sequence[str] = (),
        version: int | None = None,
        no_gate: str | None = None,
        base: str | None = None,
        licence: str | None = None,
        description: str = "",
        tool_parser: ToolParserName | None = None,
    ) -> VersionDetail:
        """Registers an adapter that the store has already, or publishes an upload, as a version. What is behind
        `no_gate` describes an upload; `base` is one of this machine.
        """
        to = Destination(name, self.store, self.catalog, aliases, version, no_gate)
        if digest is not None:
            return register_stored(digest, to)
        if upload is None:
            raise SpecError("give either digest or upload")
        uploads = self._uploads()
        num_bytes = 2 * sum(file.num_bytes for file in uploads.files(upload))  # as it came, and with its manifest
        with self._scratch.reserve(num_bytes):
            return uploads.publish(
                upload,
                to,
                home=self.settings.home,
                check=_check_template,
                base=base,
                licence=licence,
                description=description,
                tool_parser=tool_parser,
            )

    def report_evaluations(self, name: str, version: int, measured: Sequence[Evaluation]) -> VersionDetail:
        """Keeps with a version what was measured of it elsewhere; the gate may not believe it."""
        return self.catalog.evaluations.report(name, version, measured)

    def delete(self, name: str, version: int | None = None) -> None:
        """Deletes a name, or one version of it; it can be restored."""
        if version is None:
            self.catalog.removal.delete_adapter(name)
        else:
            self.catalog.removal.delete_version(name, version)

    def restore(self, name: str, version: int | None = None) -> None:
        restore(name, version, self.store, self.catalog)

    def release(self, name: str, version: int) -> None:
        """Lifts the quarantine of a version on which replicas have died."""
        self.catalog.quarantine.release(name, version)

    def fetch(self, name: str, version: int, path: Path, form: DownloadForm = "peft") -> None:
        """Writes a version to the new folder `path`; as GGUF, to the new file `path`."""
        ref = self.catalog.adapters.version(name, version).ref
        if form == "peft":
            with appearing(path) as made:
                self.store.fetch(ref.digest, made)
            return
        convert = merge_into_base if form == "merged" else save_as_gguf
        convert(ref, path, base=base_with(self.settings.home, ref.base_fingerprint, "its base"), store=self.store)

    def record_download(self, name: str, version: int, form: DownloadForm = "peft") -> AdapterVersion:
        """Finds the version that the caller downloads now, of which the audit log has an entry then."""
        catalog = self.catalog
        found = catalog.adapters.version(name, version)
        catalog.audit.record("download", found.label, tenant=found.tenant, form=form)
        return found

    # -- aliases ------------------------------------------------------------------------------------------------------

    def aliases(self, name: str) -> tuple[AliasResource, ...]:
        return self.catalog.aliases.of(name)

    def alias(self, name: str, alias: str) -> AliasResource:
        return self.catalog.aliases.get(name, alias)

    def promote(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        etag: str | None = None,
        create: bool = False,
        no_gate: str | None = None,
    ) -> AliasResource:
        """Points `alias` at `version`: with `etag`, only if it has that ETag; with `create`, only if it is not set.

        `no_gate`: the reason for moving it although LongLoRA's gate refuses.
        """
        expected = 0 if create else _revision(etag)
        return self.catalog.aliases.move(name, alias, version, expected_revision=expected, no_gate=no_gate)

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS, *, etag: str | None = None) -> AliasResource:
        return self.catalog.aliases.rollback(name, alias, expected_revision=_revision(etag))

    def canary(self, name: str, alias: str = DEFAULT_ALIAS) -> CanaryResource:
        """The canary of an alias that runs, else the last one."""
        return CanaryResource.of(self.catalog.canaries.get(name, alias))

    def set_canary(
        self,
        name: str,
        alias: str,
        version: int,
        percent: int,
        *,
        bounds: CanaryBounds | None = None,
        no_gate: str | None = None,
        etag: str | None = None,
    ) -> CanaryResource:
        """Gives a version a share of the alias's requests. `bounds` None: those that its canary has, else defaults."""
        expected = _revision(etag)
        state = self.catalog.canaries.set(
            name, alias, version, percent, bounds=bounds, expected_revision=expected, no_gate=no_gate
        )
        return CanaryResource.of(state)

    def end_canary(self, name: str, alias: str = DEFAULT_ALIAS, *, etag: str | None = None) -> CanaryResource:
        return CanaryResource.of(self.catalog.canaries.end(name, alias, expected_revision=_revision(etag)))

    def delete_alias(self, name: str, alias: str, *, etag: str | None = None) -> None:
        self.catalog.aliases.delete(name, alias, expected_revision=_revision(etag))

    # -- what a server does not tell ----------------------------------------------------------------------------------

    def moves(self, name: str) -> tuple[AliasMove, ...]:
        """How the adapter's aliases moved, in the order of time."""
        return self.catalog.aliases.moves(name)

    def canaries(self, name: str) -> tuple[CanaryResource, ...]:
        """All canaries of the adapter, those that have ended too; the newest first."""
        return tuple(CanaryResource.of(state) for state in self.catalog.canaries.of(name))

    # -- uploads ------------------------------------------------------------------------------------------------------

    def begin_upload(self, idempotency_key: str | None = None) -> UploadResource:
        """Begins an upload, or continues that of this key."""
        return self.upload(self._uploads().begin(idempotency_key))

    def upload(self, id: str) -> UploadResource:
        uploads = self._uploads()
        files = tuple(FileResource(name=f.name, sha256=f.sha256, nbytes=f.num_bytes) for f in uploads.files(id))
        return UploadResource(id=id, files=files, published=uploads.is_published(id))

    def check_file(self, id: str, name: str, held: Callable[[], int]) -> None:
        """Raises, before the file `name` is received, what `put_file` would, and LimitExceeded where the tenant would
        store too much with the bytes `held` of its other files that are coming.
        """
        uploads = self._uploads()
        uploads.check_open(id)
        self.catalog.adapters.check_stored_bytes(lambda: uploads.num_bytes(beside=(id, name)) + held())

    def put_file(self, id: str, path: Path) -> FileResource:
        """Keeps one file, instead of one of that name that has come before."""
        put = self._uploads().put(id, path.name, path)
        return FileResource(name=put.name, sha256=put.sha256, nbytes=put.num_bytes)

    def delete_upload(self, id: str) -> None:
        self._uploads().delete(id)

    # -- keys and tenants ---------------------------------------------------------------------------------------------

    def create_key(self, wanted: KeyCreation) -> NewKeyResource:
        """The key itself is in the answer, and nowhere else."""
        made = self.catalog.keys.create(
            wanted.key_alias,
            tenant=wanted.tenant,
            scopes=wanted.scopes,
            models=wanted.models,
            limits=wanted.limits,
            metadata=wanted.metadata,
            expires_at=wanted.expires_at,
        )
        return NewKeyResource.of(made.key, key=made.secret)

    def keys(self, *, tenant: str | None = None, key_alias: str | None = None) -> Iterator[KeyResource]:
        """All keys, newest first."""
        return _all(lambda cursor: self.key_page(_PAGE, cursor, tenant=tenant, key_alias=key_alias))

    def key_page(
        self, limit: int, cursor: str | None = None, *, tenant: str | None = None, key_alias: str | None = None
    ) -> Page[KeyResource]:
        """Keys, newest first."""
        found = self.catalog.keys.page(limit=limit, cursor=cursor, tenant=tenant, alias=key_alias)
        return Page[KeyResource](items=tuple(KeyResource.of(key) for key in found.items), next=found.next)

    def key(self, key_id: str = "self") -> KeyResource:
        """One key; the caller's own by default."""
        own = self.catalog.principal.key_id
        if key_id == "self" and own is None:
            raise KeyNotFound("this request has no key, and needs none")
        return KeyResource.of(self.catalog.keys.get(own if key_id == "self" and own else key_id))

    def change_key(self, key_id: str, change: KeyChange) -> KeyResource:
        return KeyResource.of(self.catalog.keys.update(key_id, change))

    def revoke_key(self, key_id: str, *, only_this: bool = False) -> KeyResource:
        """With those that it was rotated from and into, or `only_this`."""
        return KeyResource.of(self.catalog.keys.revoke(key_id, only_this=only_this))

    def rotate_key(self, key_id: str, *, grace_period: Duration | None = None) -> NewKeyResource:
        """A new key instead of this one, which goes on for `grace_period`."""
        made = self.catalog.keys.rotate(key_id, grace=Rotation(grace_period=grace_period).grace)
        return NewKeyResource.of(made.key, key=made.secret)

    def create_tenant(self, name: str, limits: Limits | None = None) -> TenantResource:
        return TenantResource.of(self.catalog.tenants.create(name, limits))

    def tenants(self, *, limit: int | None = None) -> tuple[TenantResource, ...]:
        """All tenants by name, or the first `limit`."""
        return tuple(TenantResource.of(tenant) for tenant in self.catalog.tenants.all(limit=limit))

    def tenant(self, name: str) -> TenantResource:
        return TenantResource.of(self.catalog.tenants.get(name))

    def change_tenant(self, name: str, change: TenantChange) -> TenantResource:
        changed = self.catalog.tenants.update(name, limits=change.limits, blocked=change.blocked)
        return TenantResource.of(changed)

    def audit_page(self, limit: int, cursor: int | None = None, **wanted: Unpack[AuditFilter]) -> Page[AuditResource]:
        """Entries of the audit log, newest first: the own tenant's; for administrators all, or those of `tenant`."""
        wanted["tenant"] = self._seen(wanted.get("tenant"))
        return self.catalog.audit.page(limit=limit, cursor=cursor, **wanted)

    # -- usage --------------------------------------------------------------------------------------------------------

    def usage(self, group_by: Sequence[UsageGroup] = (), **wanted: Unpack[UsageFilter]) -> Iterator[UsageResource]:
        """Sums over the requests of the own tenant, as of one moment; for administrators of all, or of `tenant`."""
        wanted["tenant"] = self._seen(wanted.get("tenant"))
        return iter(self.catalog.usage.sums(group_by, limit=_MOST_SUMS, **wanted))

    def usage_page(
        self, group_by: Sequence[UsageGroup], limit: int, cursor: int = 0, **wanted: Unpack[UsageFilter]
    ) -> Page[UsageResource]:
        wanted["tenant"] = self._seen(wanted.get("tenant"))
        found = self.catalog.usage.sums(group_by, limit=limit + 1, offset=cursor, **wanted)
        return Page[UsageResource](items=found[:limit], next=str(cursor + limit) if len(found) > limit else None)

    def _base_names(self) -> dict[str, str]:
        """Fingerprint → name."""
        return {fingerprint: name for name, fingerprint in self.catalog.bases.fingerprints().items()}

    def _uploads(self) -> Uploads:
        return Uploads(self.store, self.catalog.own_tenant)

    def _seen(self, tenant: str | None) -> str | None:
        """The tenant whose records the caller is told; None: all."""
        principal = self.catalog.principal
        return tenant if principal.is_admin else principal.tenant


def _adapter(entry: AdapterEntry, bases: Mapping[str, str]) -> AdapterResource:
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


def _revision(etag: str | None) -> int | None:
    return None if etag is None else int(etag.strip('"'))


def _check_template(folder: Path) -> None:
    template = folder / AdapterManifest.TEMPLATE_FILE
    if template.is_file():
        try:
            ChatTemplate(template.read_text(encoding="utf-8", errors="replace"))
        except RequestError as e:
            raise SpecError(str(e)) from e


def _all(page_at: Callable[[str | None], Page[T]]) -> Iterator[T]:
    """The items of all pages, each of which is asked for with the cursor of the one before."""
    cursor: str | None = None
    while True:
        page = page_at(cursor)
        yield from page.items
        if (cursor := page.next) is None:
            return
