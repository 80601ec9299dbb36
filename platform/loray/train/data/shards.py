"""Shards, which are the tokens of one part of a file, and their cache.

KEY.npy    N token ids, as small as the vocabulary allows, to be mapped into memory; or another array
KEY.index  lengths of its examples and what of them is a target, without the tokens; it is written last, so that a shard
           with an index is whole
KEY.note   what was found out about data and would take long again

Keys name what the tokens depend on: rows are cut out of shards later, and any number of recipes shares them.
"""

from __future__ import annotations

import fcntl
import io
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from loray.telemetry import get_logger

log = get_logger(__name__)

Tokens = NDArray[np.unsignedinteger[Any]]
Integers = NDArray[np.signedinteger[Any]]
TOKENS, INDEX, NOTE = ".npy", ".index", ".note"
_LOCK = "lock"


class ShardIndex(NamedTuple):
    """E examples follow each other; targets are R runs of them, whose tokens are counted from the example's first one.

    lengths_E    tokens
    documents_E  the row of the part that it was made of
    runs_R2      [start, stop) of tokens that are targets; none where `is_text`
    num_runs_E   how many of them are of the example
    is_text      all tokens are targets, and windows may be cut anywhere
    """

    lengths_E: NDArray[np.int32]
    documents_E: NDArray[np.int32]
    runs_R2: NDArray[np.int32]
    num_runs_E: NDArray[np.int32]
    is_text: bool
    num_documents: int

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
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return cls(
                found["lengths_E"],
                found["documents_E"],
                found["runs_R2"],
                found["num_runs_E"],
                bool(found["is_text"]),
                int(found["num_documents"]),
            )


@dataclass(frozen=True, slots=True)
class TokenShard:
    tokens_N: Tokens
    index: ShardIndex


class ShardCache(Protocol):
    """Shards by key, each written whole or not at all. It may be pickled, and several processes may write."""

    def index(self, key: str) -> ShardIndex | None:
        """Read the index of a shard; None where there is no whole one."""
        ...

    def indices(self, keys: Sequence[str]) -> list[ShardIndex | None]:
        """Read the indices of many shards at once."""
        ...

    def tokens(self, key: str) -> Tokens:
        """Map the tokens of a shard from a file of this machine."""
        ...

    def put(self, key: str, shard: TokenShard) -> None: ...

    def note(self, key: str, *, here: bool = False) -> bytes | None:
        """Read what `keep` was given; None where there is none. `here`: on this machine."""
        ...

    def keep(self, key: str, data: bytes, *, here: bool = False) -> None:
        """Write a note. Where that fails, there is none."""
        ...

    def array(self, key: str, *, here: bool = False) -> Integers | None:
        """Map what `keep_array` was given from a file of this machine; None where there is none."""
        ...

    def keep_array(self, key: str, parts: Sequence[Integers], *, here: bool = False) -> None:
        """Write the parts one after the other, of their smallest common type. Where that fails, there is no array."""
        ...

    def alone(self) -> AbstractContextManager[None]:
        """Let no other process of this machine into such a block meanwhile."""
        ...


class FolderCache:
    """A folder of shards, which the processes of a machine share, or several machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def index(self, key: str) -> ShardIndex | None:
        try:
            found = ShardIndex.from_bytes(self.path(key, INDEX).read_bytes())
        except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        with suppress(OSError, ValueError, EOFError):
            return found if len(self.tokens(key)) == found.num_tokens else None
        return None

    def indices(self, keys: Sequence[str]) -> list[ShardIndex | None]:
        return [self.index(key) for key in keys]

    def tokens(self, key: str) -> Tokens:
        return read_tokens(self.path(key, TOKENS))

    def put(self, key: str, shard: TokenShard) -> None:
        self.write(key, TOKENS, tokens_bytes(shard.tokens_N))
        self.write(key, INDEX, shard.index.to_bytes())

    def note(self, key: str, *, here: bool = False) -> bytes | None:
        with suppress(OSError):
            return self.path(key, NOTE).read_bytes()
        return None

    def keep(self, key: str, data: bytes, *, here: bool = False) -> None:
        try:
            self.write(key, NOTE, data)
        except OSError as e:
            log.warning("%s cannot be written, so the next run starts more slowly: %s", self.path(key, NOTE), e)

    def array(self, key: str, *, here: bool = False) -> Integers | None:
        with suppress(OSError, ValueError, EOFError):
            found: Integers = np.load(self.path(key, TOKENS), mmap_mode="r", allow_pickle=False)
            return found
        return None

    def keep_array(self, key: str, parts: Sequence[Integers], *, here: bool = False) -> None:
        dtype = np.result_type(*parts)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (sum(map(len, parts)),)}
        try:
            with self.writing(key, TOKENS) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    part.astype(dtype, copy=False).tofile(file)
        except OSError as e:
            log.warning("%s cannot be written, so workers take more memory: %s", self.path(key, TOKENS), e)

    @contextmanager
    def alone(self) -> Iterator[None]:
        with ExitStack() as stack:
            with suppress(OSError):  # where nothing can be written, all go on
                self.folder.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context((self.folder / _LOCK).open("ab")), fcntl.LOCK_EX)
            yield

    def path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}{suffix}"

    def write(self, key: str, suffix: str, data: bytes) -> None:
        """Write a file that appears when it is complete."""
        with self.writing(key, suffix) as file:
            file.write(data)

    @contextmanager
    def writing(self, key: str, suffix: str) -> Iterator[IO[bytes]]:
        """Open a file that appears when it is complete."""
        path = self.path(key, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def read_tokens(path: Path) -> Tokens:
    """Map tokens into memory."""
    found: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


def tokens_bytes(tokens: Tokens) -> bytes:
    file = io.BytesIO()
    np.save(file, tokens, allow_pickle=False)
    return file.getvalue()
