"""Keys of objects: relative POSIX paths that stay below the store's root."""

from __future__ import annotations

from pathlib import PurePosixPath

TEMPORARY = ".tmp"  # the first part of names that a store keeps for itself


def check_key(key: str) -> str:
    """`key` itself; ValueError where it would leave the store or meet what the store keeps for itself."""
    parts = PurePosixPath(key).parts
    if not parts or key != "/".join(parts) or ".." in parts or parts[0] == TEMPORARY:
        raise ValueError(f"{key!r} is not a valid key")
    return key
