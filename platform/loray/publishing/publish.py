"""From a folder to a name: describe → store → register. What fails on the way leaves no name behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loray.adapters.manifest import (
    describe,
    parse_manifest,
    published_files,
    read_canonical,
    read_manifest,
    verify_folder,
)
from loray.bases.registry import BaseModel, base_with, list_bases
from loray.catalog import AdapterVersion, Catalog
from loray.errors import BaseMismatch, BaseNotFound, DataError
from loray.spec import AdapterManifest
from loray.store import AdapterStore


@dataclass(frozen=True, slots=True)
class Destination:
    """Where an adapter is published, and what it is to be called there.

    version  asks for this number instead of the next: ConflictError where another adapter has it
    no_gate  why a LongLoRA adapter gets its `aliases` where its evaluations do not earn them; without it: GateRefused
    """

    name: str
    store: AdapterStore
    catalog: Catalog
    aliases: Sequence[str] = ()
    version: int | None = None
    no_gate: str | None = None


def publish(folder: Path, base: BaseModel, to: Destination, **manifest_fields: Any) -> AdapterVersion:
    """Publish the PEFT adapter in `folder`, trained on `base`; writes its `loray.json`.

    `manifest_fields` go to `adapters.manifest.describe`. Everything that can be wrong with names or files is
    checked before the first byte is stored; the version appears in one transaction at the end. Repeating a
    publication that was cut off completes it.
    """
    to.catalog.check_name(to.name, to.aliases)
    describe(folder, base=base, **manifest_fields)
    return _store(folder, base, to)


def import_folder(
    folder: Path, base: BaseModel, to: Destination, *, licence: str | None = None, description: str = ""
) -> AdapterVersion:
    """Publish any PEFT LoRA or VeRA folder; it is not written to. One with a `loray.json` keeps its identity.

    Raises DataError (no such folder), UnsupportedError (another kind of adapter, pickled weights), BaseMismatch,
    IntegrityError; then neither store nor catalog has changed.
    """
    from loray.adapters.peft_format import read_adapter

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    to.catalog.check_name(to.name, to.aliases)
    is_published = (folder / AdapterManifest.FILE).is_file()
    if is_published:
        _check_published(folder, base)
    read_adapter(folder, base.config)  # here too, so that errors name the user's folder and not the copy
    with tempfile.TemporaryDirectory(prefix="loray-import-") as scratch:
        copy = Path(scratch)
        for path in published_files(folder):
            shutil.copy2(path, copy / path.name)  # with its time, which is the adapter's created_at
        if is_published:
            shutil.copy2(folder / AdapterManifest.FILE, copy / AdapterManifest.FILE)
        else:
            describe(copy, base=base, licence=licence, description=description)
        return _store(copy, base, to)


def register_stored(digest: str, to: Destination) -> AdapterVersion:
    """Give an adapter that the store has already a name and a version. A digest keeps the version it has.

    Raises AdapterNotFound where the store does not have it, ConflictError, GateRefused.
    """
    manifest = to.store.manifest(digest)
    to.catalog.check_name(to.name, to.aliases)
    to.catalog.add_base(manifest.base, manifest.base_fingerprint)
    return _register(digest, manifest, to)


def _check_published(folder: Path, base: BaseModel) -> None:
    manifest = verify_folder(folder)
    if manifest.base_fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"the adapter was trained on {manifest.base} ({manifest.base_fingerprint[:12]}), not on {base.name} "
            f"({base.fingerprint[:12]}); add that base model and import it there"
        )


def _store(folder: Path, base: BaseModel, to: Destination) -> AdapterVersion:
    to.catalog.add_base(base.name, base.fingerprint)  # refuses other weights under a known name
    digest = to.store.put(folder)
    return _register(digest, parse_manifest(read_canonical(folder), source=str(folder)), to)


def _register(digest: str, manifest: AdapterManifest, to: Destination) -> AdapterVersion:
    return to.catalog.register(to.name, digest, manifest, to.aliases, version=to.version, no_gate=to.no_gate)


def base_of(folder: Path, home: Path) -> BaseModel:
    """The base on this machine that the adapter in `folder` was trained on.

    By fingerprint where it has a `loray.json`, else by the name or path that PEFT wrote down; where it wrote none,
    the only base there is. BaseNotFound where none of these tells, BaseMismatch where this machine lacks the base.
    """
    if (folder / AdapterManifest.FILE).is_file():
        manifest = read_manifest(folder)
        return base_with(home, manifest.base_fingerprint, manifest.base)
    from loray.adapters.peft_format import read_config

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    known = list_bases(home)
    trained_on = str(read_config(folder).get("base_model_name_or_path") or "")
    for base in known:
        if trained_on and trained_on in (base.name, str(base.path), base.source, base.source.removeprefix("hf:")):
            return base
    if not trained_on and len(known) == 1:
        return known[0]
    names = ", ".join(base.name for base in known) or "none; add one with `loray base add`"
    raise BaseNotFound(
        f"cannot tell which base model {folder} was trained on ({trained_on!r}); name one with --base: {names}"
    )
