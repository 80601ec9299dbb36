"""A stored adapter as a tar archive, which is written while it is read; and an archive as a folder."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from loray.errors import ConflictError, IntegrityError
from loray.store import AdapterStore

_CHUNK_BYTES = 1 << 20


class Archive(NamedTuple):
    num_bytes: int
    chunks: Iterator[bytes]


def folder_as_tar(store: AdapterStore, digest: str, name: str) -> Archive:
    """The adapter's files and manifest below the folder `name`. Raises as `AdapterStore.fetch`, before any byte."""
    scratch = tempfile.TemporaryDirectory(prefix="loray-download-")
    try:
        folder = Path(scratch.name) / "adapter"
        store.fetch(digest, folder)
        paths = sorted(folder.iterdir())
        headers = [_header(f"{name}/{path.name}", path.stat().st_size) for path in paths]
        num_bytes = sum(len(h) + _padded(p.stat().st_size) for h, p in zip(headers, paths, strict=True))
    except BaseException:
        scratch.cleanup()
        raise

    def chunks() -> Iterator[bytes]:
        with scratch:
            for header, path in zip(headers, paths, strict=True):
                yield header
                with path.open("rb") as f:
                    while chunk := f.read(_CHUNK_BYTES):
                        yield chunk
                yield bytes(_padded(path.stat().st_size) - path.stat().st_size)
            yield bytes(2 * tarfile.BLOCKSIZE)

    return Archive(num_bytes + 2 * tarfile.BLOCKSIZE, chunks())


def unpack_tar(stream: BinaryIO, folder: Path) -> None:
    """Write the files of an archive to the new `folder`, which appears when it is complete.

    Raises ConflictError where it exists, IntegrityError where the archive is cut off or holds anything but plain files.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        raise ConflictError(f"{folder} exists already; name a new folder")
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as scratch:
        made = Path(scratch) / "adapter"
        made.mkdir()
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = Path(member.name).name
                    source = archive.extractfile(member) if member.isfile() else None
                    if source is None or not name or name.startswith("."):
                        raise IntegrityError(f"the archive holds {member.name!r}, which is not a plain file")
                    with (made / name).open("xb") as f:
                        while chunk := source.read(_CHUNK_BYTES):
                            f.write(chunk)
        except (tarfile.TarError, OSError, EOFError) as e:
            raise IntegrityError(f"the archive cannot be read ({e}); download it again") from e
        made.rename(folder)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
