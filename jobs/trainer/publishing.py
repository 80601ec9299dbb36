"""Ephemeral adapters of a trainer's models: their files, for engines of this node and of others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime

from loray.adapters.manifest import read_manifest
from loray.bases.registry import BaseModel
from loray.errors import AdapterGone
from loray.publishing.ephemeral import ephemeral
from loray.spec import AdapterManifest, AdapterRef
from loray.store import AdapterCache

_IN_MEMORY = 4  # of a model


class Versions:
    """Owns the files of the last versions of each model, beside those in the node's cache."""

    def __init__(self, base: BaseModel, cache: AdapterCache, holder: str) -> None:
        """`holder`: name of the actor that gives them."""
        self._base, self._cache, self._holder = base, cache, holder
        self._files: dict[str, Mapping[str, bytes]] = {}
        self._of: dict[str, list[str]] = {}  # digests of each model, the oldest first

    def publish(
        self,
        model: str,
        files: Mapping[str, bytes],
        *,
        step: int,
        created_at: datetime,
        parent: str | None,
        keep: int | None,
    ) -> AdapterRef:
        """Make an ephemeral adapter, which engines of this node find in its cache. Of this model the last `keep`
        versions stay; None: all, the older ones in the node's cache alone, which has limits. Raises as `ephemeral`.
        """
        own = self._of.setdefault(model, [])
        ref, whole = ephemeral(
            files,
            self._base,
            run=model,
            step=step,
            created_at=created_at,
            parent=parent,
            earlier=self._files.get(own[-1]) if own else None,
        )
        self._cache.put(ref.digest, whole)
        self._files[ref.digest] = whole
        if ref.digest in own:
            own.remove(ref.digest)
        own.append(ref.digest)
        if keep is not None:
            self.retire(own[:-keep])
        for older in own[: -max(keep or 0, _IN_MEMORY)]:
            self._files.pop(older, None)
        return replace(ref, holders=(self._holder,))

    def give(self, digest: str) -> Mapping[str, bytes]:
        """Return the files of a version by name. Raises AdapterGone."""
        if (files := self._files.get(digest)) is not None:
            return files
        with self._cache.entry(digest) as entry:
            if entry.present:
                names = (*read_manifest(entry.folder).files, AdapterManifest.FILE)
                return {name: (entry.folder / name).read_bytes() for name in names}
        raise AdapterGone(f"the trainer does not have version {digest[:12]} any more; publish the model again")

    def retire(self, digests: Collection[str]) -> None:
        """Drop versions that nobody samples any more, here and from the node's cache."""
        for digest in list(digests):
            self._files.pop(digest, None)
            self._cache.remove(digest)
            for own in self._of.values():
                if digest in own:
                    own.remove(digest)

    def forget(self, model: str) -> None:
        """Drop all versions of a model."""
        self.retire(self._of.get(model, ()))
        self._of.pop(model, None)
