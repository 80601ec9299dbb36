"""Keys of objects, relative POSIX paths that stay below the store's root, and what a listing tells of each object."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import NamedTuple

TEMPORARY = ".tmp"  # first part of the names of a store's temporary objects


class ObjectEntry(NamedTuple):
    """`written_at` is the time at which the object was written, in seconds since 1970, by the store's clock. `etag` is
    S3's name of the content, empty elsewhere.
    """

    key: str
    num_bytes: int
    written_at: float
    etag: str = ""


def check_key(key: str) -> str:
    """`key` itself. Raises ValueError where it leads out of the store or to its temporary objects."""
    parts = PurePosixPath(key).parts
    if not parts or key != "/".join(parts) or ".." in parts or parts[0] == TEMPORARY:
        raise ValueError(f"{key!r} is not a valid key")
    return key
