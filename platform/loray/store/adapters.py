"""Adapters in an object store: files as blobs by their SHA-256, manifests by their digest.

    blobs/ab/abcd…         the bytes of one file
    manifests/ab/abcd….json  canonical JSON, written after all its blobs
    uploads/TENANT/ID/…      files that come over HTTP, until they are published

So a reader that finds a manifest also finds its blobs. Equal files of different adapters are stored once.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from loray.adapters.manifest import parse_manifest, read_canonical, verify_folder, write_manifest
from loray.errors import ConflictError, IntegrityError, NotFoundError
from loray.files import file_sha256, scratch_folder
from loray.spec import AdapterManifest
from loray.store.objects import ObjectStore
from loray.telemetry import get_logger

log = get_logger(__name__)

BLOBS, MANIFESTS, UPLOADS = "blobs", "manifests", "uploads"
_MAX_MANIFEST_BYTES = 16 << 20
_PIECE_BYTES = 4 << 20  # one request to S3 for each, and so much memory for each reader


class PresignedFile(NamedTuple):
    name: str
    sha256: str
    num_bytes: int
    url: str


class AdapterStore:
    """Immutable adapters by digest. Safe from several threads and processes."""

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects

    def put(self, folder: Path) -> str:
        """Store the adapter in `folder`, which has a manifest, and return its digest. Storing it again changes nothing.

        Raises IntegrityError where a file differs from the manifest; then nothing is stored.
        """
        manifest = verify_folder(folder)
        canonical = read_canonical(folder)
        for name, sha256 in sorted(manifest.files.items()):
            self._put(_blob_key(sha256), sha256, folder / name)
        digest = hashlib.sha256(canonical).hexdigest()
        self._put(_manifest_key(digest), digest, canonical)
        return digest

    def canonical(self, digest: str) -> bytes:
        """The manifest as canonical JSON, whose SHA-256 is the digest. Raises as `manifest`."""
        # One request to S3, where `get` makes two.
        data = self.objects.get_range(_manifest_key(check_digest(digest)), 0, _MAX_MANIFEST_BYTES)
        if hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(f"the stored manifest of adapter {digest[:12]} is damaged; publish the adapter again")
        return data

    def manifest(self, digest: str) -> AdapterManifest:
        """The adapter's manifest. Raises NotFoundError where the store has no such adapter, IntegrityError where the
        manifest is damaged.
        """
        return parse_manifest(self.canonical(digest), source=f"the manifest of adapter {digest[:12]}")

    def fetch(
        self, digest: str, folder: Path, *, have: Mapping[str, bytes | memoryview] = MappingProxyType({})
    ) -> AdapterManifest:
        """Write the adapter to `folder`, which must be new or empty, and appears when it is complete.

        Raises IntegrityError, which names the file, where one is missing or has another SHA-256. `have` are files that
        the caller has read with `read_range` and verified.
        """
        canonical = self.canonical(digest)
        manifest = parse_manifest(canonical, source=f"the manifest of adapter {digest[:12]}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder.parent))
        try:
            for name, sha256 in sorted(manifest.files.items()):
                if name in have:
                    (temporary / name).write_bytes(have[name])
                else:
                    self._get_blob(digest, name, sha256, temporary / name)
            write_manifest(temporary, canonical)
            temporary.chmod(0o755)
            try:
                temporary.rename(folder)
            except OSError as e:
                raise ConflictError(f"{folder} exists already; fetch the adapter into a new folder") from e
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return manifest

    def read(self, digest: str, name: str, sha256: str) -> bytes:
        """The adapter's file `name`, whose SHA-256 the caller checks. IntegrityError where the file is missing."""
        with _named(digest, name):
            return self.objects.get(_blob_key(sha256))

    def read_range(self, digest: str, name: str, sha256: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the adapter's file `name`. The caller checks the SHA-256 once it has the whole file.

        Raises IntegrityError where the file is missing.
        """
        with _named(digest, name):
            return self.objects.get_range(_blob_key(sha256), start, stop)

    def file_size(self, digest: str, name: str, sha256: str) -> int:
        """Bytes of the adapter's file `name`. IntegrityError where the file is missing."""
        with _named(digest, name):
            return self.objects.size(_blob_key(sha256))

    def pieces(self, digest: str, name: str, sha256: str, num_bytes: int) -> Iterator[bytes]:
        """The adapter's file `name`, of `num_bytes`, in pieces that are read one by one.

        Raises IntegrityError where the file is missing, and before the last piece where it has another SHA-256.
        """
        hashed, piece = hashlib.sha256(), b""
        for start in range(0, num_bytes, _PIECE_BYTES):
            if piece:
                yield piece
            piece = self.read_range(digest, name, sha256, start, min(start + _PIECE_BYTES, num_bytes))
            hashed.update(piece)
        if hashed.hexdigest() != sha256:
            raise _differs(digest, name)
        yield piece

    def read_into(self, digest: str, name: str, sha256: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on, as `read_range` reads them. Raises IntegrityError also
        where the file is too short.
        """
        with _named(digest, name):
            num_read = self.objects.read_into(_blob_key(sha256), start, buffer)
        if num_read != len(buffer):
            raise IntegrityError(f"adapter {digest[:12]} is damaged: {name} in the store is cut off; publish it again")

    def check_files(self, digest: str, manifest: AdapterManifest) -> None:
        """Raise IntegrityError, which names the file, where one of the adapter's is missing. Reads no bytes."""
        for name, sha256 in sorted(manifest.files.items()):
            if not self.objects.exists(_blob_key(sha256)):
                raise IntegrityError(f"adapter {digest[:12]} is incomplete: {name} is missing from the store")

    def verify(self, digest: str) -> AdapterManifest:
        """Read and hash every stored byte of the adapter. Raises IntegrityError, which names the file that differs."""
        manifest = self.manifest(digest)
        with scratch_folder() as scratch:
            for name, sha256 in sorted(manifest.files.items()):
                self._get_blob(digest, name, sha256, scratch / name)
        return manifest

    def presigned(self, digest: str, expires_s: int) -> tuple[PresignedFile, ...] | None:
        """URLs of the adapter's files and its manifest, the smallest first; None where the store has no such URLs.

        Raises NotFoundError, and IntegrityError where a file is missing. The reader checks the bytes by their SHA-256.
        """
        key = _manifest_key(check_digest(digest))
        url = self.objects.presigned(key, expires_s)
        if url is None:
            return None
        found = [PresignedFile(AdapterManifest.FILE, digest, self.objects.size(key), url)]
        for name, sha256 in self.manifest(digest).files.items():
            url = self.objects.presigned(_blob_key(sha256), expires_s)
            assert url is not None
            found.append(PresignedFile(name, sha256, self.file_size(digest, name, sha256), url))
        return tuple(sorted(found, key=lambda file: file.num_bytes))

    def keys_of(self, sha256: str) -> tuple[str, str]:
        """The keys that a blob and a manifest of this SHA-256 have."""
        return _blob_key(sha256), _manifest_key(sha256)

    def object_sha256(self, key: str) -> str | None:
        """Read and hash one object. None where it is gone."""
        with scratch_folder() as scratch:
            path = scratch / "object"
            try:
                self.objects.get_to(key, path)
            except NotFoundError:
                return None
            return file_sha256(path)

    def _put(self, key: str, sha256: str, data: bytes | Path) -> None:
        """Store what has this SHA-256, also in the place of a damaged object."""
        if self.objects.put_if_absent(key, data):
            return
        stored = self.object_sha256(key)
        if stored == sha256:
            return
        if stored is not None:  # otherwise it was garbage, and has just been collected
            log.warning("%s in the store was damaged, and is replaced", key)
            self.objects.delete(key)
        self.objects.put_if_absent(key, data)

    def _get_blob(self, digest: str, name: str, sha256: str, path: Path) -> None:
        with _named(digest, name):
            self.objects.get_to(_blob_key(sha256), path)
        if file_sha256(path) != sha256:
            raise _differs(digest, name)


def object_name(key: str) -> str:
    """The SHA-256 that is the name of a blob or a manifest."""
    return key.rpartition("/")[2].removesuffix(".json")


def _differs(digest: str, name: str) -> IntegrityError:
    return IntegrityError(
        f"adapter {digest[:12]} is damaged: {name} in the store differs from its SHA-256; publish it again"
    )


@contextmanager
def _named(digest: str, name: str) -> Iterator[None]:
    """Missing objects become an IntegrityError that names adapter and file."""
    try:
        yield
    except NotFoundError as e:
        raise IntegrityError(f"adapter {digest[:12]} is incomplete: {name} is missing from the store") from e


def check_digest(digest: str) -> str:
    """`digest` itself. Raises NotFoundError where it is not 64 hex digits, since it becomes part of a path."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise NotFoundError(f"{digest!r} is not an adapter digest (64 hex digits)")
    return digest


def _blob_key(sha256: str) -> str:
    return f"{BLOBS}/{sha256[:2]}/{sha256}"


def _manifest_key(digest: str) -> str:
    return f"{MANIFESTS}/{digest[:2]}/{digest}.json"
