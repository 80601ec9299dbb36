"""Shards, which are the tokens of one part of a file, and their cache.

KEY.npy    N token ids, as small as the vocabulary allows, to be mapped into memory; or a column of rows: where each
           begins, or how long it is
KEY.index  lengths of its examples and what of them is a target, without the tokens; it is written last, so that a shard
           with an index is whole
KEY.note   what was found out about data and would take long again

Keys name what the tokens depend on: rows are cut out of shards later, and any number of recipes shares them.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loray.errors import StoreError
from loray.files import replacing_private
from loray.telemetry import get_logger

_PARSING = Lock()  # threads that parse the headers of arrays at once end in a SystemError of CPython 3.11 now and then

log = get_logger(__name__)

Tokens = NDArray[np.unsignedinteger[Any]]
TOKENS, INDEX, NOTE = ".npy", ".index", ".note"


class ShardIndex(NamedTuple):
    """E examples follow each other; targets are R runs of them, whose tokens are counted from the example's first one.

    lengths_E    tokens
    documents_E  the row of the part that it was made of
    runs_R2      [start, stop) of tokens that are targets; none where `is_text`
    num_runs_E   how many of them are of the example
    is_text      all tokens are targets, and windows may be cut anywhere
    desirable_E  false for an answer that a row says is not desirable
    """

    lengths_E: NDArray[np.int32]
    documents_E: NDArray[np.int32]
    runs_R2: NDArray[np.int32]
    num_runs_E: NDArray[np.int32]
    is_text: bool
    num_documents: int
    desirable_E: NDArray[np.bool_]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths_E.sum(dtype=np.int64))

    def mask(self) -> NDArray[np.bool_]:
        """True for the shard's tokens that are targets."""
        if self.is_text:
            return np.ones(self.num_tokens, np.bool_)
        ends_E = np.cumsum(self.lengths_E, dtype=np.int64)
        begins_R1 = np.repeat(ends_E - self.lengths_E, self.num_runs_E)[:, None]
        changes = np.zeros(self.num_tokens + 1, np.int8)
        np.add.at(changes, (self.runs_R2 + begins_R1)[:, 0], 1)
        np.add.at(changes, (self.runs_R2 + begins_R1)[:, 1], -1)
        return np.cumsum(changes[:-1], dtype=np.int8).astype(np.bool_)

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **{n: np.asarray(value) for n, value in self._asdict().items()})
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardIndex:
        with _PARSING, np.load(io.BytesIO(data), allow_pickle=False) as found:
            read = cls(*(found[name] for name in cls._fields))
        return read._replace(is_text=bool(read.is_text), num_documents=int(read.num_documents))


@dataclass(frozen=True, slots=True)
class TokenShard:
    tokens_N: Tokens
    index: ShardIndex


def let_go(mapped: NDArray[Any]) -> None:
    """Take a mapped array's pages out of this process's memory. They stay in the system's, and come back when read."""
    if isinstance(mapped.base, mmap.mmap):
        mapped.base.madvise(mmap.MADV_DONTNEED)


class FolderCache:
    """A folder of shards by key, each written whole or not at all, which the processes of a machine share, or several
    machines. It may be pickled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def index(self, key: str) -> ShardIndex | None:
        """Read the index of a shard; None where there is no whole one."""
        try:
            data = self.read(key, INDEX)
            found = None if data is None else ShardIndex.from_bytes(data)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        with suppress(OSError, ValueError, EOFError):
            return found if found is not None and len(self.tokens(key)) == found.num_tokens else None
        return None

    def tokens(self, key: str) -> Tokens:
        """Map the tokens of a shard from a file of this machine."""
        with _PARSING:
            found: Tokens = np.load(self.path(key, TOKENS), mmap_mode="r", allow_pickle=False)
        return found

    def put(self, key: str, shard: TokenShard) -> None:
        self.save(key, shard.tokens_N)
        self.write(key, INDEX, shard.index.to_bytes())

    def put_column(self, numbers: NDArray[np.int64]) -> str:
        """Write numbers by their content, which is kept once. Returns their key."""
        key = hashlib.sha256(np.ascontiguousarray(numbers).data).hexdigest()
        with suppress(OSError, StoreError, ValueError, EOFError):
            if self.note(key) is not None and len(self.column(key)) == len(numbers):
                return key
        self.save(key, numbers)
        self.keep(key, b"")  # last, so that a column with a note is whole, and everywhere
        return key

    def column(self, key: str) -> NDArray[np.int64]:
        """Map what `put_column` has written. Raises StoreError where it is gone."""
        try:
            found: NDArray[Any] = self.tokens(key)
        except FileNotFoundError as e:
            raise StoreError(f"{e.filename} was removed while a run reads it; start the run again") from None
        return found

    def save(self, key: str, numbers: NDArray[Any]) -> None:
        """Write an array, which `tokens` maps."""
        file = io.BytesIO()
        np.save(file, numbers, allow_pickle=False)
        self.write(key, TOKENS, file.getvalue())

    def note(self, key: str, *, here: bool = False) -> bytes | None:
        """Read what `keep` was given; None where there is none. `here`: on this machine."""
        with suppress(OSError, StoreError):
            return self.read(key, NOTE, here=here)
        return None

    def keep(self, key: str, data: bytes, *, here: bool = False) -> None:
        """Write a note. Where that fails, there is none."""
        try:
            self.write(key, NOTE, data, here=here)
        except (OSError, StoreError) as e:
            log.warning("what was found out about the data is not kept, so the next run starts more slowly: %s", e)

    def path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}{suffix}"

    def read(self, key: str, suffix: str, *, here: bool = False) -> bytes | None:
        try:
            return self.path(key, suffix).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, key: str, suffix: str, data: bytes, *, here: bool = False) -> None:
        """Write a file that appears when it is complete."""
        path = self.path(key, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_private(path) as file:
            file.write(data)
