"""Where a deployment keeps the tokens of training data: `LORAY_HOME/tokens`, or `tokens/` in the bucket of the store.

Other recipes, further runs and `--resume` find there what has been tokenised. A worker maps shards into memory: from
that folder, which machines share as they share `LORAY_HOME`, or from copies on its own disk of those in the bucket.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from loray.errors import StoreError
from loray.locations import S3Location, parse_location
from loray.settings import Settings
from loray.store import open_filesystem
from loray.telemetry import get_logger
from loray.train.data.shards import (
    INDEX,
    NOTE,
    TOKENS,
    FolderCache,
    Integers,
    ShardCache,
    ShardIndex,
    Tokens,
    TokenShard,
    tokens_bytes,
)

log = get_logger(__name__)

_FOLDER = "tokens"
_READERS = 16  # threads that fetch indices
_PIECE_BYTES = 64 << 20  # of an array that are in memory on the way: more than a shard's
_MAX_COPIES_BYTES = 64 << 30  # on a machine's disk: those that were used least recently are removed


def open_tokens(settings: Settings) -> ShardCache:
    """Returns the deployment's cache. Connects at the first use."""
    folder = settings.home / _FOLDER
    if not isinstance(parse_location(settings.store), S3Location):
        return FolderCache(folder)
    filesystem, root = open_filesystem(settings.store)
    return BucketCache(filesystem, f"{root}/{_FOLDER}", folder)


class BucketCache:
    """Shards in a bucket, with copies on this machine's disk. Methods raise StoreError where the bucket refuses."""

    def __init__(self, filesystem: Any, prefix: str, copies: Path, max_bytes: int = _MAX_COPIES_BYTES) -> None:
        self._filesystem, self._prefix, self._max_bytes = filesystem, prefix, max_bytes
        self._copies = FolderCache(copies)
        self._room = 0  # bytes that may be added before copies are counted again

    def index(self, key: str) -> ShardIndex | None:
        return self.indices([key])[0]

    def indices(self, keys: Sequence[str]) -> list[ShardIndex | None]:
        """Reads what the bucket has. Each shard has its tokens there, because they are written first."""
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(lambda key: self._read(key, INDEX), keys))
        return [None if data is None else ShardIndex.from_bytes(data) for data in found]

    def tokens(self, key: str) -> Tokens:
        path = self._copies.path(key, TOKENS)
        with suppress(OSError, ValueError, EOFError):
            os.utime(path)
            return self._copies.tokens(key)
        if not self._copy(key):
            raise StoreError(f"{self._name(key, TOKENS)} was removed while a run reads it; start the run again")
        return self._copies.tokens(key)

    def put(self, key: str, shard: TokenShard) -> None:
        for suffix, data in ((TOKENS, tokens_bytes(shard.tokens_N)), (INDEX, shard.index.to_bytes())):
            self._write(key, suffix, data)

    def note(self, key: str, *, here: bool = False) -> bytes | None:
        with suppress(StoreError):
            return self._copies.note(key) if here else self._read(key, NOTE)
        return None

    def keep(self, key: str, data: bytes, *, here: bool = False) -> None:
        if here:
            self._copies.keep(key, data)
            return
        try:
            self._write(key, NOTE, data)
        except StoreError as e:
            log.warning("the next run starts more slowly: %s", e)

    def array(self, key: str, *, here: bool = False) -> Integers | None:
        found = self._copies.array(key)
        with suppress(OSError):
            os.utime(self._copies.path(key, TOKENS))
        if found is None and not here:
            with suppress(StoreError):
                if self._copy(key):
                    found = self._copies.array(key)
        return found

    def keep_array(self, key: str, parts: Sequence[Integers], *, here: bool = False) -> None:
        self._make_room(sum(part.nbytes for part in parts))
        self._copies.keep_array(key, parts)
        if here:
            return
        try:
            with (
                self._errors(key, TOKENS),
                self._copies.path(key, TOKENS).open("rb") as copy,
                self._filesystem.open_output_stream(self._name(key, TOKENS)) as file,
            ):
                shutil.copyfileobj(copy, file, _PIECE_BYTES)
        except (FileNotFoundError, StoreError) as e:
            log.warning("other machines make it again: %s", e)

    def alone(self) -> AbstractContextManager[None]:
        return self._copies.alone()

    def _copy(self, key: str) -> bool:
        """Says whether the bucket has such an array, of which there is a copy now."""
        try:
            with self._errors(key, TOKENS), self._filesystem.open_input_file(self._name(key, TOKENS)) as file:
                self._make_room(file.size())
                with self._copies.writing(key, TOKENS) as copy:
                    shutil.copyfileobj(file, copy, _PIECE_BYTES)
        except FileNotFoundError:
            return False
        return True

    def _write(self, key: str, suffix: str, data: bytes) -> None:
        with self._errors(key, suffix), self._filesystem.open_output_stream(self._name(key, suffix)) as file:
            file.write(data)

    def _read(self, key: str, suffix: str) -> bytes | None:
        try:
            with self._errors(key, suffix), self._filesystem.open_input_file(self._name(key, suffix)) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def _name(self, key: str, suffix: str) -> str:
        return f"{self._prefix}/{key[:2]}/{key}{suffix}"

    @contextmanager
    def _errors(self, key: str, suffix: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as e:
            raise StoreError(f"tokens {self._name(key, suffix)} cannot be read or written: {e}") from e

    def _make_room(self, num_bytes: int) -> None:
        """Removes the oldest copies. What a process has mapped stays readable."""
        self._room -= num_bytes
        if self._room >= 0:
            return
        found = []
        for path in self._copies.folder.glob(f"*/*{TOKENS}"):
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
