"""Helpers for files and what they hold: SHA-256, canonical JSON, and a lock between processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, 64 hex digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and without spaces: equal data gives equal text, and so equal digests."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Only one process at a time runs the block; others wait. The lock file stays. A process that dies releases it."""
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
