"""Where a deployment keeps the tokens of training data: `LORAY_HOME/tokens`, or `tokens/` in the bucket of the store.

Other recipes, further runs and `--resume` find there what has been tokenised. A worker maps shards into memory: from
that folder, which machines share as they share `LORAY_HOME`, or from copies on its own disk of those in the bucket.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loray.errors import StoreError
from loray.locations import S3Location, parse_location
from loray.settings import Settings
from loray.store import open_filesystem
from loray.train.data.shards import INDEX, TOKENS, FolderCache, ShardIndex, Tokens

_FOLDER = "tokens"
_MAX_COPIES_BYTES = 64 << 30  # on a machine's disk: those that were used least recently are removed


def open_tokens(settings: Settings) -> FolderCache:
    """Returns the deployment's cache. Connects at the first use."""
    folder = settings.home / _FOLDER
    if not isinstance(parse_location(settings.store), S3Location):
        return FolderCache(folder)
    filesystem, root = open_filesystem(settings.store)
    return BucketCache(filesystem, f"{root}/{_FOLDER}", folder)


class BucketCache(FolderCache):
    """Shards in a bucket, with copies in a folder of this machine. Methods raise StoreError where the bucket refuses.

    What is `here` is in that folder alone.
    """

    def __init__(self, filesystem: Any, prefix: str, copies: Path, max_bytes: int = _MAX_COPIES_BYTES) -> None:
        super().__init__(copies)
        self._filesystem, self._prefix, self._max_bytes = filesystem, prefix, max_bytes
        self._room = 0  # bytes that may be added before copies are counted again

    def index(self, key: str) -> ShardIndex | None:
        """Each index in the bucket has its tokens there, because they are written first."""
        data = self.read(key, INDEX)
        return None if data is None else ShardIndex.from_bytes(data)

    def tokens(self, key: str) -> Tokens:
        with suppress(OSError, ValueError, EOFError):
            os.utime(self.path(key, TOKENS))
            return super().tokens(key)
        data = self.read(key, TOKENS)
        if data is None:
            raise StoreError(f"{self._name(key, TOKENS)} was removed while a run reads it; start the run again")
        self._make_room(len(data))
        super().write(key, TOKENS, data)
        return super().tokens(key)

    def read(self, key: str, suffix: str, *, here: bool = False) -> bytes | None:
        if here:
            return super().read(key, suffix)
        name = self._name(key, suffix)
        try:
            with self._errors(name), self._filesystem.open_input_file(name) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, key: str, suffix: str, data: bytes, *, here: bool = False) -> None:
        if here:
            super().write(key, suffix, data)
            return
        name = self._name(key, suffix)
        with self._errors(name), self._filesystem.open_output_stream(name) as file:
            file.write(data)

    def _name(self, key: str, suffix: str) -> str:
        return f"{self._prefix}/{key[:2]}/{key}{suffix}"

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as e:
            raise StoreError(f"tokens {name} cannot be read or written: {e}") from e

    def _make_room(self, num_bytes: int) -> None:
        """Removes the oldest copies. What a process has mapped stays readable."""
        self._room -= num_bytes
        if self._room >= 0:
            return
        found = []
        for path in self.folder.glob(f"*/*{TOKENS}"):
            with suppress(FileNotFoundError):  # another process removes them too
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in found) + num_bytes
        for _, size, path in sorted(found):
            if total <= self._max_bytes * 9 // 10:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._room = max(0, self._max_bytes - total)
