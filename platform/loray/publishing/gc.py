"""Garbage collection and verification of the store.

Needed are the adapters of all versions, of deleted ones for a time, and all objects that are younger than the grace
time, which covers uploads that are not named yet. Manifests go before their blobs, so that a manifest that is found has
its blobs. `catalog.removal` says why no version can lose its bytes to a publication at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from loray.catalog import Catalog
from loray.catalog.removal import References
from loray.errors import IntegrityError, NotFoundError
from loray.spec import DEFAULT_KEEP_DELETED_S
from loray.store import AdapterStore
from loray.store.adapters import BLOBS, MANIFESTS, UPLOADS, object_name
from loray.store.objects import ObjectEntry
from loray.telemetry import Progress

DEFAULT_GRACE_S = 24 * 3600.0
_BATCH = 100  # objects whose deletions are claimed together


@dataclass(frozen=True, slots=True)
class Garbage:
    """Objects that nothing needs. `references` are the needs that they were compared with."""

    manifests: tuple[ObjectEntry, ...]
    blobs: tuple[ObjectEntry, ...]
    uploads: tuple[ObjectEntry, ...]
    references: References

    @property
    def objects(self) -> tuple[ObjectEntry, ...]:
        return self.manifests + self.blobs + self.uploads

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.objects)


class Damage(NamedTuple):
    """An object that is missing or differs from its name; `needed_by` are digests of adapters, maybe none."""

    key: str
    problem: str
    needed_by: tuple[str, ...]


def find_garbage(
    store: AdapterStore,
    catalog: Catalog,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    keep_deleted_s: float = DEFAULT_KEEP_DELETED_S,
) -> Garbage:
    """The objects that `collect` would delete now. Changes nothing."""
    oldest = time.time() - grace_s
    manifests = list(store.objects.entries(f"{MANIFESTS}/"))
    blobs = list(store.objects.entries(f"{BLOBS}/"))
    uploads = list(store.objects.entries(f"{UPLOADS}/"))
    # After the listing: what is newer is not in it.
    references = catalog.removal.references(keep_deleted_s=keep_deleted_s)
    garbage = [m for m in manifests if m.written_at <= oldest and object_name(m.key) not in references.files]
    gone = {m.key for m in garbage}
    needed = set().union(*references.files.values())
    for manifest in manifests:
        digest = object_name(manifest.key)
        if manifest.key not in gone and digest not in references.files:
            needed |= _files_of(store, digest)
    return Garbage(
        manifests=tuple(garbage),
        blobs=tuple(b for b in blobs if b.written_at <= oldest and object_name(b.key) not in needed),
        uploads=tuple(u for u in uploads if u.written_at <= oldest),
        references=references,
    )


def collect(
    store: AdapterStore,
    catalog: Catalog,
    garbage: Garbage,
    *,
    keep_deleted_s: float = DEFAULT_KEEP_DELETED_S,
    progress: Progress | None = None,
) -> Sequence[ObjectEntry]:
    """Delete what `find_garbage` found and nothing needs by now. Returns what was deleted.

    It may be killed at any moment, and run beside publishers and other collections. The catalog is not locked while
    objects are deleted.
    """
    deleted: list[ObjectEntry] = []
    kept: set[str] = set()  # files of manifests that stay

    def delete(entry: ObjectEntry) -> None:
        store.objects.delete(entry.key)
        deleted.append(entry)
        if progress is not None:
            progress("deleting", len(deleted) / len(garbage.objects))

    for entries in (garbage.manifests, garbage.blobs):
        waiting = [entry for entry in entries if object_name(entry.key) not in kept]
        while waiting:
            batch, waiting = waiting[:_BATCH], waiting[_BATCH:]
            names = {object_name(entry.key) for entry in batch}
            with catalog.claims.deleting(names, garbage.references, keep_deleted_s=keep_deleted_s) as allowed:
                for i, entry in enumerate(batch):
                    if time.monotonic() >= allowed.until:
                        waiting = batch[i:] + waiting
                        break
                    if object_name(entry.key) in allowed.names:
                        delete(entry)
            if entries is garbage.manifests:
                kept = kept.union(*(_files_of(store, name) for name in names - allowed.names))
    for entry in garbage.uploads:
        delete(entry)
    return deleted


def verify_store(store: AdapterStore, catalog: Catalog, *, progress: Progress | None = None) -> Sequence[Damage]:
    """Read and hash every object once, and look for what versions need and the store lacks."""
    files = catalog.removal.references(keep_deleted_s=0).files
    needed_by: dict[str, list[str]] = {}
    for digest, blobs in files.items():
        for name in (digest, *blobs):
            needed_by.setdefault(name, []).append(digest)
    found: list[Damage] = []
    seen: set[str] = set()
    keys = [*store.objects.list(f"{MANIFESTS}/"), *store.objects.list(f"{BLOBS}/")]
    for i, key in enumerate(keys):
        name = object_name(key)
        seen.add(name)
        if store.object_sha256(key) not in (name, None):
            found.append(Damage(key, "differs from its SHA-256", tuple(needed_by.get(name, ()))))
        if progress is not None:
            progress("verifying", (i + 1) / len(keys))
    missing: Set[str] = needed_by.keys() - seen
    for name in sorted(missing):
        if not any(store.objects.exists(key) for key in store.keys_of(name)):  # not written after the listing either
            found.append(Damage(name, "is missing", tuple(needed_by[name])))
    return found


def _files_of(store: AdapterStore, digest: str) -> Set[str]:
    """Files of a manifest that no version refers to yet. A damaged one, or one that has just gone, needs none."""
    try:
        return frozenset(store.manifest(digest).files.values())
    except (IntegrityError, NotFoundError):
        return frozenset()
