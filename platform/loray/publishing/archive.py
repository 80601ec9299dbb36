"""Folders as tar archives, which are written while they are read. `loray.files` unpacks them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from loray.store import AdapterStore

_CHUNK_BYTES = 1 << 20


class Archive(NamedTuple):
    """Bytes that are read from a folder of this machine while they are taken."""

    num_bytes: int
    chunks: Iterator[bytes]


def folder_as_tar(store: AdapterStore, digest: str, name: str, scratch: Path) -> Archive:
    """The adapter's files and manifest below the folder `name`, fetched into the new folder `scratch`. Raises as
    `AdapterStore.fetch`, before any byte.
    """
    store.fetch(digest, scratch)
    return as_tar(scratch, name)


def as_tar(folder: Path, name: str) -> Archive:
    """The files of `folder` as an archive, below the folder `name`."""
    paths = sorted(folder.iterdir())
    headers = [_header(f"{name}/{path.name}", path.stat().st_size) for path in paths]
    num_bytes = sum(len(h) + _padded(p.stat().st_size) for h, p in zip(headers, paths, strict=True))

    def chunks() -> Iterator[bytes]:
        for header, path in zip(headers, paths, strict=True):
            yield header
            yield from as_it_is(path).chunks
            yield bytes(_padded(path.stat().st_size) - path.stat().st_size)
        yield bytes(2 * tarfile.BLOCKSIZE)

    return Archive(num_bytes + 2 * tarfile.BLOCKSIZE, chunks())


def as_it_is(path: Path) -> Archive:
    """One file."""

    def chunks() -> Iterator[bytes]:
        with path.open("rb") as f:
            while chunk := f.read(_CHUNK_BYTES):
                yield chunk

    return Archive(path.stat().st_size, chunks())


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
