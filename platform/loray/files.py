"""Helpers for files and what they hold: hashes, JSON, private files, archives, scratch, a lock between processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from loray.errors import ConflictError, IntegrityError

_CHUNK_BYTES = 1 << 20
_MAX_LINE = 64 << 20
_SCRATCH = "loray-scratch-"


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, 64 hex digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def boot_id() -> str:
    """Return the name of this boot of the machine. Raises OSError where the system has none."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and without spaces: equal data gives equal text, and so equal digests."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json_lines(f: BinaryIO, lines: Iterable[Any]) -> None:
    """Write one JSON value a line, and a last line with the SHA-256 of all before it."""
    digest = hashlib.sha256()
    for line in lines:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        digest.update(data)
        f.write(data)
    f.write(json.dumps({"sha256": digest.hexdigest()}).encode() + b"\n")


def read_json_lines(f: BinaryIO) -> Iterator[Any]:
    """The values that `write_json_lines` wrote. Raises IntegrityError at the end where the last line does not confirm
    them.
    """
    digest = hashlib.sha256()
    while line := f.readline(_MAX_LINE):
        content = json.loads(line)
        if isinstance(content, dict) and "sha256" in content:
            if content["sha256"] != digest.hexdigest() or f.read(1):
                raise IntegrityError("it is damaged: its bytes differ from its SHA-256")
            return
        digest.update(line)
        yield content
    raise IntegrityError("it is damaged: its end is missing")


@contextmanager
def replacing_private(path: Path) -> Iterator[BinaryIO]:
    """A file, which this user alone can read, that replaces `path` as with `replacing`."""
    with _replacing(path, 0o600) as f:
        yield f


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` at the end of the block, on disk. After an error in the block, and where the process
    dies, `path` is as before.
    """
    with _replacing(path, 0o666) as f:  # less what the process's mask takes away
        yield f


@contextmanager
def _replacing(path: Path, mode: int) -> Iterator[BinaryIO]:
    name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def write_private(path: Path, text: str) -> None:
    """Write a file atomically, readable by this user only."""
    with replacing_private(path) as f:
        f.write(text.encode())


def touch(path: Path) -> bool:
    """Set the file's time of modification to now; False where there is no such file."""
    try:
        os.utime(path)
    except OSError:
        return False
    return True


def check_private(f: BinaryIO, max_bytes: int) -> float:
    """The time of the file's last modification. Raises IntegrityError where another user may have written or can read
    it, or it is too large.
    """
    found = os.fstat(f.fileno())
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise IntegrityError("others may have written or can read it")
    if found.st_size > max_bytes:
        raise IntegrityError(f"it has {found.st_size} bytes")
    return found.st_mtime


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """A lock between processes: one at a time runs the block. The lock file stays. A process that dies releases it."""
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def unpack_tar(stream: BinaryIO, folder: Path) -> None:
    """Write the files of an archive to the new `folder`, which appears when it is complete.

    Raises ConflictError where it exists, IntegrityError where the archive is cut off or holds anything but plain files.
    """
    with appearing(folder) as made:
        made.mkdir()
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = Path(member.name).name
                    source = archive.extractfile(member) if member.isfile() else None
                    if source is None or not is_plain(name):
                        raise IntegrityError(f"the archive holds {member.name!r}, which is not a plain file")
                    with (made / name).open("xb") as f:
                        while chunk := source.read(_CHUNK_BYTES):
                            f.write(chunk)
        except (tarfile.TarError, OSError, EOFError) as e:
            raise IntegrityError(f"the archive cannot be read ({e}); download it again") from e


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A place beside `path` for a folder or file that the block makes, which becomes `path` at its end. Raises
    ConflictError where `path` exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise ConflictError(f"{path} exists already; name a new one")
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=path.parent) as scratch:
        made = Path(scratch) / "made"
        yield made
        made.rename(path)


def is_plain(name: str) -> bool:
    """A file of this name lies in its folder, and is shown there."""
    return bool(name) and name == Path(name).name and not name.startswith(".")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder for the block. Where the process is killed in it, the next process of this user that makes one
    removes it.
    """
    parent = Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    made = Path(tempfile.mkdtemp(prefix="loray-new-", dir=parent))
    handle = os.open(made, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    folder = made.with_name(_SCRATCH + made.name.rpartition("-")[2])  # from here on, others look at its lock
    made.rename(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@cache  # once in a process
def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # another user's, or one that has just gone
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.geteuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
