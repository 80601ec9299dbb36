"""Publishing a folder describes, stores and registers it. Where one step fails, no version is registered."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loray.adapters.manifest import (
    NO_DETAILS,
    ManifestDetails,
    check_size,
    describe,
    parse_manifest,
    published_files,
    read_canonical,
    read_manifest,
    validate_folder,
    verify_folder,
)
from loray.adapters.peft_format import load_config
from loray.bases.config import extended_context
from loray.bases.registry import BaseModel, base_with, list_bases
from loray.catalog import AdapterVersion, Catalog, Registration
from loray.errors import (
    BaseMismatch,
    BaseNotFound,
    ConflictError,
    DataError,
    IntegrityError,
    NotFoundError,
)
from loray.files import scratch_folder
from loray.spec import AdapterManifest, ToolParserName
from loray.store import AdapterStore


@dataclass(frozen=True, slots=True)
class Destination:
    """The store and the catalog in which an adapter is published, and its name, aliases and version.

    version  number of the version instead of the next one; ConflictError where another adapter has it
    no_gate  reason for which a LongLoRA adapter gets its `aliases` although the gate refuses them; GateRefused without
    """

    name: str
    store: AdapterStore
    catalog: Catalog
    aliases: Sequence[str] = ()
    version: int | None = None
    no_gate: str | None = None


def publish(folder: Path, base: BaseModel, to: Destination, details: ManifestDetails = NO_DETAILS) -> AdapterVersion:
    """Publish the PEFT adapter in `folder`, trained on `base`; writes its `loray.json`.

    Names and files are checked before the first byte is stored; the version is registered in one transaction at the
    end. Repeating a publication that was interrupted completes it. Raises as `describe` and `Adapters.register` do.
    """
    to.catalog.adapters.check_name(to.name, to.aliases)
    describe(folder, base, details)
    return _store(folder, base, to)


def store(folder: Path, base: BaseModel, to: Destination, details: ManifestDetails) -> Registration:
    """Do what `publish` does but for the registration, which `Adapters.register_many` does for many at once."""
    to.catalog.adapters.check_name(to.name, to.aliases)
    describe(folder, base, details)
    with _stored_within_claim(folder, base, to) as asked:
        return asked


def import_folder(
    folder: Path,
    base: BaseModel,
    to: Destination,
    *,
    licence: str | None = None,
    description: str = "",
    tool_parser: ToolParserName | None = None,
) -> AdapterVersion:
    """Publish a folder of PEFT, which is not changed. A folder with a `loray.json` keeps its digest.

    A `chat_template.jinja` in it is published too, and serving uses it instead of the base's.

    Raises DataError (no such folder), UnsupportedError (another kind of adapter, pickled weights), BaseMismatch or
    IntegrityError; then neither store nor catalog has changed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the one with the adapter's adapter_config.json")
    to.catalog.adapters.check_name(to.name, to.aliases)
    is_published = (folder / AdapterManifest.FILE).is_file()
    manifest = _check_published(folder, base) if is_published else None
    validate_folder(folder, base.config, manifest)  # so that errors name the user's folder and not the copy
    with scratch_folder() as copy:
        for path in published_files(folder):
            shutil.copy2(path, copy / path.name)  # with its time, which becomes the adapter's created_at
        if is_published:
            shutil.copy2(folder / AdapterManifest.FILE, copy / AdapterManifest.FILE)
        else:
            describe(copy, base, ManifestDetails(licence=licence, description=description, tool_parser=tool_parser))
        return _store(copy, base, to)


def register_stored(digest: str, to: Destination) -> AdapterVersion:
    """Register an adapter that is in the store. A digest that the name has already keeps its version.

    Raises NotFoundError where the store does not have it, or not for the catalog's caller; IntegrityError where a file
    of it is missing; ConflictError, GateRefused.
    """
    to.catalog.adapters.check_name(to.name, to.aliases)
    to.catalog.adapters.check_digest(digest)
    manifest = to.store.manifest(digest)
    to.catalog.bases.add(manifest.base, manifest.base_fingerprint)
    with to.catalog.claims.publishing(_names(digest, manifest)) as claim:
        to.store.check_files(digest, to.store.manifest(digest))
        return _register(digest, manifest, to, claim)


def restore(name: str, version: int | None, store: AdapterStore, catalog: Catalog) -> None:
    """Restore a deleted name or version. Raises AdapterNotFound, or ConflictError where its bytes are gone."""
    digests = catalog.removal.deleted_digests(name, version)
    names = {name for digest in digests for name in _names(digest, _stored(store, digest))}
    with catalog.claims.publishing(names) as claim:
        for digest in digests:
            _stored(store, digest)
        catalog.removal.restore(name, version, claim=claim)


def _stored(store: AdapterStore, digest: str) -> AdapterManifest:
    """The adapter's manifest. Raises ConflictError where its bytes are gone."""
    try:
        manifest = store.manifest(digest)
        store.check_files(digest, manifest)
        return manifest
    except (IntegrityError, NotFoundError) as e:
        raise ConflictError(f"the bytes of adapter {digest[:12]} are gone; publish it again") from e


def _check_published(folder: Path, base: BaseModel) -> AdapterManifest:
    manifest = verify_folder(folder)
    if manifest.base_fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"the adapter was trained on {manifest.base} ({manifest.base_fingerprint[:12]}), not on {base.name} "
            f"({base.fingerprint[:12]}); add that base model and import it there"
        )
    longest = _longest_context(manifest, base)
    if manifest.context_length > longest:
        raise IntegrityError(
            f"the manifest of {folder} says a context of {manifest.context_length:,} tokens; its RoPE on {base.name} "
            f"has at most {longest:,}"
        )
    return manifest


def _longest_context(manifest: AdapterManifest, base: BaseModel) -> int:
    """Tokens that an adapter with this RoPE can have been trained for on `base`."""
    window, rope = base.config.max_position_embeddings, manifest.rope_parameters
    if rope is None:
        return window
    original = min(window, manifest.original_context_length or window)
    return extended_context(rope, base.config.rope, original_context=original, head_dim=base.config.head_dim)


def _store(folder: Path, base: BaseModel, to: Destination) -> AdapterVersion:
    with _stored_within_claim(folder, base, to) as asked:
        return _register(asked.digest, asked.manifest, to, asked.claim)


@contextmanager
def _stored_within_claim(folder: Path, base: BaseModel, to: Destination) -> Iterator[Registration]:
    """Put the folder into the store. The claim outlasts a block that does not raise, and ends with the registration."""
    to.catalog.bases.add(base.name, base.fingerprint, base.of)  # refuses other weights under a known name
    canonical = read_canonical(folder)
    manifest = parse_manifest(canonical, source=str(folder))
    check_size(manifest, canonical)
    digest = hashlib.sha256(canonical).hexdigest()
    with to.catalog.claims.publishing(_names(digest, manifest)) as claim:
        to.catalog.adapters.record_upload(to.store.put(folder))
        yield Registration(to.name, digest, manifest, tuple(to.aliases), to.version, to.no_gate, claim)


def _register(digest: str, manifest: AdapterManifest, to: Destination, claim: str | None) -> AdapterVersion:
    return to.catalog.adapters.register(
        to.name, digest, manifest, to.aliases, version=to.version, no_gate=to.no_gate, claim=claim
    )


def _names(digest: str, manifest: AdapterManifest) -> Set[str]:
    """The names of the adapter's objects in the store."""
    return {digest, *manifest.files.values()}


def base_of(folder: Path, home: Path) -> BaseModel:
    """The base on this machine that the adapter in `folder` was trained on.

    It is found by the fingerprint in `loray.json`; without that file by the name or path that PEFT stores; and where
    PEFT stored none, it is the only base of this machine. Raises BaseNotFound where none of these finds it, and
    BaseMismatch where this machine does not have the base of `loray.json`.
    """
    if (folder / AdapterManifest.FILE).is_file():
        manifest = read_manifest(folder)
        return base_with(home, manifest.base_fingerprint, manifest.base)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the one with the adapter's adapter_config.json")
    known = list_bases(home)
    trained_on = str(load_config(folder).get("base_model_name_or_path") or "")
    for base in known:
        if trained_on and trained_on in (base.name, str(base.path), base.source, base.source.removeprefix("hf:")):
            return base
    if not trained_on and len(known) == 1:
        return known[0]
    names = ", ".join(base.name for base in known) or "none; add one with `loray base add`"
    raise BaseNotFound(
        f"cannot tell which base model {folder} was trained on ({trained_on!r}); name one with --base: {names}"
    )
