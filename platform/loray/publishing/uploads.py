"""Uploads of adapters, which come file by file, and downloads of them, which go as a tar archive."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import secrets
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from loray.adapters.files import MAX_CONFIG_BYTES
from loray.adapters.manifest import (
    PUBLISHED_FILES,
    manifest_file,
    manifest_json,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from loray.bases.registry import get_base
from loray.catalog import AdapterVersion, Catalog
from loray.errors import (
    BaseMismatch,
    BaseNotFound,
    ConflictError,
    DataError,
    IntegrityError,
    NotFoundError,
    SpecError,
    UnsupportedError,
    shown,
)
from loray.files import file_sha256, scratch_folder
from loray.publishing.publish import Destination, base_of, import_folder, register_stored
from loray.spec import MAX_MANIFEST_BYTES, MAX_TEMPLATE_CHARACTERS, AdapterManifest, ToolParserName
from loray.store import AdapterStore
from loray.store.adapters import UPLOADS

MAX_FILE_BYTES = 4 << 30
MAX_OPEN = 32  # of one tenant that are not published

MAX_SMALL_BYTES = 1 << 20
MAX_BYTES = {
    WEIGHTS_FILE: MAX_FILE_BYTES,
    CONFIG_FILE: MAX_CONFIG_BYTES,
    AdapterManifest.FILE: MAX_MANIFEST_BYTES,
    AdapterManifest.TEMPLATE_FILE: 4 * MAX_TEMPLATE_CHARACTERS,
}
MAX_FILES = 8


# -- uploads ----------------------------------------------------------------------------------------------------------


class UploadedFile(NamedTuple):
    name: str
    sha256: str
    num_bytes: int


class Uploads:
    """The uploads of one tenant. Safe from several threads and processes.

        uploads/TENANT/ID/files/NAME/SHA256   one file; a later one of the same name takes its place
        uploads/TENANT/ID/state/…             `begun`, and `published` with the adapter's digest
        uploads/TENANT/open/ID                while it is not published: these are counted, and few

    A file that has come stays when the client or the server dies, so an upload is continued with what is missing. What
    is not published within the grace time of `loray store gc` is garbage.
    """

    def __init__(self, store: AdapterStore, tenant: str) -> None:
        self._store, self._objects = store, store.objects
        self._prefix = f"{UPLOADS}/{tenant}"

    def begin(self, idempotency_key: str | None = None) -> str:
        """A new upload's id. Equal keys give the same upload. Raises ConflictError where too many are not published."""
        upload = secrets.token_hex(16)
        if idempotency_key is not None:
            upload = hashlib.sha256(f"{self._prefix}\0{idempotency_key}".encode()).hexdigest()[:32]
        key = self._state(upload, "begun")
        if not self._objects.exists(key):
            if len(self._others_open(upload)) >= MAX_OPEN:
                raise ConflictError(f"{MAX_OPEN} uploads are not published yet: publish or delete one of them first")
            self._objects.put_if_absent(self._open(upload), b"")
            self._objects.put_if_absent(key, b"")
        return upload

    def put(self, upload: str, name: str, path: Path) -> UploadedFile:
        """Keep the file at `path` as `name`, instead of one of that name that has come before."""
        check_file_name(name)
        self.check_open(upload)
        others = [file for file in self.files(upload) if file.name != name]
        if len(others) >= MAX_FILES:
            raise SpecError(f"an adapter has at most {MAX_FILES} files")
        put = UploadedFile(name, file_sha256(path), path.stat().st_size)
        self._objects.put_if_absent(self._file(upload, put), path)
        for file in self.files(upload):
            if file.name == name and file.sha256 != put.sha256:
                self._objects.delete(self._file(upload, file))
        return put

    def check_open(self, upload: str) -> None:
        """Raise NotFoundError where there is no such upload, ConflictError where it is published already."""
        self._check(upload)
        if self.is_published(upload):
            raise ConflictError(f"upload {upload} is published already; begin another one")

    def num_bytes(self, *, beside: tuple[str, str]) -> int:
        """Bytes of all files that are not published, without one of (upload, name)."""
        other = f"{self._prefix}/{beside[0]}/files/{beside[1]}/"
        entries = self._objects.entries(f"{self._prefix}/")
        return sum(e.num_bytes for e in entries if "/files/" in e.key and not e.key.startswith(other))

    def files(self, upload: str) -> tuple[UploadedFile, ...]:
        """The files that have come, sorted by name. Raises NotFoundError where there is no such upload."""
        self._check(upload)
        found = []
        for entry in self._objects.entries(f"{self._prefix}/{upload}/files/"):
            name, _, sha256 = entry.key.removeprefix(f"{self._prefix}/{upload}/files/").partition("/")
            found.append(UploadedFile(name, sha256, entry.num_bytes))
        return tuple(sorted(found))

    def is_published(self, upload: str) -> bool:
        """A version was made of it."""
        return self._objects.exists(self._state(upload, "published"))

    def delete(self, upload: str) -> None:
        """Delete an upload and its files. Raises NotFoundError where there is no such upload."""
        self._check(upload)
        for entry in list(self._objects.entries(f"{self._prefix}/{upload}/")):
            self._objects.delete(entry.key)
        self._objects.delete(self._open(upload))

    def publish(
        self,
        upload: str,
        to: Destination,
        *,
        home: Path,
        check: Callable[[Path], None] = lambda folder: None,
        base: str | None = None,
        licence: str | None = None,
        description: str = "",
        tool_parser: ToolParserName | None = None,
    ) -> AdapterVersion:
        """Check the uploaded folder as a whole, and publish it; if it is published already, register it as asked.

        `check` is a further check of the folder. What a manifest that came with it claims, and nothing here has seen,
        is left out: measurements, job and sweep, and adapters that it was made from and the sender does not have. Its
        digest is another one then.

        Raises NotFoundError for the upload, DataError where it is damaged, and as `import_folder` does.
        """
        self._check(upload)
        to.catalog.adapters.check_name(to.name, to.aliases)
        files = self.files(upload)  # before the look whether it is published, after which they are removed
        published = self._register_published(upload, to)
        if published is not None:
            return published
        try:
            with self._opened(upload, files) as folder, _about_the_upload(folder):
                check(folder)
                _leave_out_claims(folder, to.catalog)
                model = get_base(home, base) if base else base_of(folder, home)
                version = import_folder(
                    folder, model, to, licence=licence, description=description, tool_parser=tool_parser
                )
        except NotFoundError:  # the same request, sent again, may have published it meanwhile
            published = self._register_published(upload, to)
            if published is None:
                raise
            return published
        self._objects.put_if_absent(self._state(upload, "published"), version.digest.encode())
        for file in self.files(upload):
            self._objects.delete(self._file(upload, file))
        self._objects.delete(self._open(upload))
        return version

    @contextmanager
    def _opened(self, upload: str, files: Sequence[UploadedFile]) -> Iterator[Path]:
        missing = {CONFIG_FILE, WEIGHTS_FILE} - {file.name for file in files}
        if missing:
            raise SpecError(f"the upload lacks {' and '.join(sorted(missing))}; send it, then publish again")
        begun_at = self._begun_at(upload)
        with scratch_folder() as folder:
            for file in files:
                path = folder / file.name
                self._objects.get_to(self._file(upload, file), path)
                os.utime(path, (begun_at, begun_at))  # becomes the adapter's created_at
            yield folder

    def _begun_at(self, upload: str) -> float:
        """The age of what is made of the upload: the same however often that is tried, and so the same digest."""
        for entry in self._objects.entries(self._state(upload, "begun")):
            return entry.written_at
        raise NotFoundError(f"there is no upload {upload}; begin one")

    def _register_published(self, upload: str, to: Destination) -> AdapterVersion | None:
        """Register what was made of the upload; None where nothing was.

        Where store or catalog do not have it any more, because it was collected or the catalog was restored from a
        backup, the upload is open again.
        """
        key = self._state(upload, "published")
        try:
            digest = self._objects.get(key).decode()
        except NotFoundError:
            return None
        try:
            return register_stored(digest, to)
        except (IntegrityError, NotFoundError):
            self._objects.put_if_absent(self._open(upload), b"")
            self._objects.delete(key)
            return None

    def _others_open(self, upload: str) -> list[str]:
        """Uploads other than this one that are not published. Where they are too many, it is seen to that they are."""
        others = [key.rpartition("/")[2] for key in self._objects.list(self._open(""))]
        others = [other for other in others if other != upload]
        if len(others) < MAX_OPEN:
            return others
        for other in others:  # a process may have been killed between two of its steps
            if self.is_published(other) or not self._objects.exists(self._state(other, "begun")):
                self._objects.delete(self._open(other))
        return [other for other in others if self._objects.exists(self._open(other))]

    def _check(self, upload: str) -> None:
        if len(upload) != 32 or not set(upload) <= set("0123456789abcdef"):
            raise NotFoundError(f"{shown(upload)} is not the id of an upload")
        if not self._objects.exists(self._state(upload, "begun")):
            raise NotFoundError(f"there is no upload {upload}; begin one")

    def _state(self, upload: str, state: str) -> str:
        return f"{self._prefix}/{upload}/state/{state}"

    def _open(self, upload: str) -> str:
        return f"{self._prefix}/open/{upload}"

    def _file(self, upload: str, file: UploadedFile) -> str:
        return f"{self._prefix}/{upload}/files/{file.name}/{file.sha256}"


def _leave_out_claims(folder: Path, catalog: Catalog) -> None:
    """Rewrite the folder's `loray.json` without what its sender might have made up: the gate before aliases believes
    measurements, and people believe lineage.
    """
    if not (folder / AdapterManifest.FILE).is_file():
        return
    manifest = read_manifest(folder)
    parents = {name: _known(getattr(manifest, name), catalog) for name in ("parent", "derived_from")}
    believed = manifest.model_copy(update={"evaluations": (), "job_id": None, "sweep": None} | parents)
    if believed != manifest:
        write_manifest(folder, manifest_json(believed))


def _known(digest: str | None, catalog: Catalog) -> str | None:
    if digest is not None:
        try:
            catalog.adapters.check_digest(digest)
        except NotFoundError:
            return None
    return digest


@contextmanager
def _about_the_upload(folder: Path) -> Iterator[None]:
    """Errors name the upload instead of this machine's copy of it; what is wrong with it is the sender's DataError."""
    try:
        yield
    except (BaseMismatch, BaseNotFound, IntegrityError, SpecError, UnsupportedError) as e:
        kind = DataError if isinstance(e, IntegrityError) else type(e)
        raise kind(str(e).replace(str(folder), "the upload")) from e


def check_file_name(name: str) -> int:
    """The greatest size of a file of this name. Raises UnsupportedError for what is no file of an adapter."""
    allowed = (*PUBLISHED_FILES, AdapterManifest.FILE)
    is_plain = len(name) <= 64 and name.isascii() and name.replace(".", "").replace("-", "").replace("_", "").isalnum()
    if not is_plain or not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed):
        hint = "; pickles are never read" if name.endswith((".bin", ".pt", ".pth", ".pkl")) else ""
        raise UnsupportedError(f"{shown(name)} is no file of an adapter, which are {', '.join(allowed)}{hint}")
    return MAX_BYTES.get(name, MAX_SMALL_BYTES)


# -- downloads --------------------------------------------------------------------------------------------------------

_CHUNK_BYTES = 1 << 20


class Archive(NamedTuple):
    """Bytes that are read while they are taken. Where that fails in the middle, fewer than `num_bytes` come, and an
    error.
    """

    num_bytes: int
    chunks: Iterator[bytes]


class _File(NamedTuple):
    name: str
    num_bytes: int
    chunks: Iterator[bytes]


def adapter_as_tar(store: AdapterStore, digest: str, shown: AdapterManifest, name: str) -> Archive:
    """The adapter's files and manifest below the folder `name`, read from the store while they are taken. `shown`: the
    manifest as the reader may see it; if that is not the whole one, its digest is another one.

    Raises NotFoundError, and IntegrityError where the manifest is damaged or a file is missing. What is damaged in a
    file is found when its last bytes are taken, which then do not come.
    """
    canonical = store.canonical(digest)
    stored = parse_manifest(canonical, source=f"the manifest of adapter {digest[:12]}")
    told = manifest_file(canonical if shown == stored else manifest_json(shown))
    sizes = {file: store.file_size(digest, file, sha256) for file, sha256 in stored.files.items()}
    files = [_File(file, size, store.pieces(digest, file, stored.files[file], size)) for file, size in sizes.items()]
    return _as_tar([*files, _File(AdapterManifest.FILE, len(told), iter((told,)))], name)


def as_tar(folder: Path, name: str) -> Archive:
    """The files of `folder` as an archive, below the folder `name`."""
    return _as_tar((_File(path.name, *as_it_is(path)) for path in folder.iterdir()), name)


def as_it_is(path: Path) -> Archive:
    """One file as it is."""

    def chunks() -> Iterator[bytes]:
        with path.open("rb") as f:
            while chunk := f.read(_CHUNK_BYTES):
                yield chunk

    return Archive(path.stat().st_size, chunks())


def _as_tar(files: Iterable[_File], folder: str) -> Archive:
    files = sorted(files, key=lambda file: file.name)
    headers = [_header(f"{folder}/{file.name}", file.num_bytes) for file in files]
    num_bytes = sum(len(header) + _padded(file.num_bytes) for header, file in zip(headers, files, strict=True))

    def chunks() -> Iterator[bytes]:
        for header, file in zip(headers, files, strict=True):
            yield header
            yield from file.chunks
            yield bytes(_padded(file.num_bytes) - file.num_bytes)
        yield bytes(2 * tarfile.BLOCKSIZE)

    return Archive(num_bytes + 2 * tarfile.BLOCKSIZE, chunks())


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
