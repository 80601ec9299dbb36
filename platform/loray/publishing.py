"""From a folder to a name: describe → store → register. What fails on the way leaves no name behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loray.adapters.manifest import describe, parse_manifest, published_files, read_canonical, verify_folder
from loray.bases.registry import BaseModel
from loray.catalog import AdapterVersion, Catalog
from loray.errors import BaseMismatch, DataError
from loray.spec import AdapterManifest
from loray.store import AdapterStore


def publish(
    folder: Path,
    *,
    name: str,
    base: BaseModel,
    store: AdapterStore,
    catalog: Catalog,
    aliases: Sequence[str] = (),
    **manifest_fields: Any,
) -> AdapterVersion:
    """Publish the PEFT adapter in `folder` as the next version of `name`; writes its `loray.json`.

    `manifest_fields` go to `adapters.manifest.describe`. Everything that can be wrong with names or files is
    checked before the first byte is stored; the version appears in one transaction at the end. Repeating a
    publication that was cut off completes it.
    """
    catalog.check_name(name, aliases)
    describe(folder, base=base, **manifest_fields)
    return _register(folder, name, base, store, catalog, aliases)


def import_folder(
    folder: Path,
    *,
    name: str,
    base: BaseModel,
    store: AdapterStore,
    catalog: Catalog,
    aliases: Sequence[str] = (),
    licence: str | None = None,
    description: str = "",
) -> AdapterVersion:
    """Publish any PEFT LoRA or VeRA folder; it is not written to. One with a `loray.json` keeps its identity.

    Raises DataError (no such folder), UnsupportedError (another kind of adapter, pickled weights), BaseMismatch,
    IntegrityError; then neither store nor catalog has changed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    catalog.check_name(name, aliases)
    with tempfile.TemporaryDirectory(prefix="loray-import-") as scratch:
        copy = Path(scratch)
        for path in published_files(folder):
            shutil.copy2(path, copy / path.name)  # with its time, which is the adapter's created_at
        if (folder / AdapterManifest.FILE).is_file():
            shutil.copy2(folder / AdapterManifest.FILE, copy / AdapterManifest.FILE)
            _check_published(copy, base)
        else:
            describe(copy, base=base, licence=licence, description=description)
        return _register(copy, name, base, store, catalog, aliases)


def _check_published(folder: Path, base: BaseModel) -> None:
    from loray.adapters.peft_format import read_adapter

    manifest = verify_folder(folder)
    if manifest.base_fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"the adapter was trained on {manifest.base} ({manifest.base_fingerprint[:12]}), not on {base.name} "
            f"({base.fingerprint[:12]}); add that base model and import it there"
        )
    read_adapter(folder, base.config)


def _register(
    folder: Path, name: str, base: BaseModel, store: AdapterStore, catalog: Catalog, aliases: Sequence[str]
) -> AdapterVersion:
    catalog.add_base(base.name, base.fingerprint)
    digest = store.put(folder)
    manifest = parse_manifest(read_canonical(folder), source=str(folder))
    return catalog.register(name, digest, manifest, aliases)
