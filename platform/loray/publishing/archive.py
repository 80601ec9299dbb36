"""Tar archives that are written while they are read: of a folder, and of an adapter in the store. `loray.files` unpacks
them.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from loray.adapters.manifest import manifest_file, manifest_json, parse_manifest
from loray.spec import AdapterManifest
from loray.store import AdapterStore

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
    """One file."""

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
