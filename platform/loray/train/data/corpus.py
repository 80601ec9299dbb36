"""The tokens of all files of a run, in shards of a cache, and the index that rows are cut by."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from loray.errors import DataError
from loray.train.data.known import cut_known
from loray.train.data.read import BadRow, Content, FilePart, RowFile, located, read_parts
from loray.train.data.shards import FolderCache, ShardIndex, Tokens
from loray.train.data.tokenize import Tokenisation

_READERS = 16  # threads that read indices, which may come from a bucket
_OPEN_SHARDS = 32  # of a reader: each is one mapping and one file

Indices = NDArray[np.int64]
Files = Sequence[Sequence[RowFile]]  # of each source


class Task(NamedTuple):
    """One shard that the cache lacks."""

    key: str
    part: FilePart
    content: Content


class Runner(Protocol):
    def __call__(self, tokenisation: Tokenisation, cache: FolderCache, tasks: Iterator[Task], num_tasks: int) -> None:
        """Put the shard of every task into the cache. Raises DataError."""
        ...


def run_here(tokenisation: Tokenisation, cache: FolderCache, tasks: Iterator[Task], num_tasks: int) -> None:
    """Run one task after the other, in this process."""
    for task in tasks:
        try:
            cache.put(task.key, tokenisation.shard(task.content))
        except BadRow as e:
            raise located(e, task.part) from e


class TemporaryCache(FolderCache):
    """A folder that is removed with this object, or at the latest when the process ends."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="loray-tokens-")))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


class ShardTokens:
    """The tokens of shards, one shard after the other. Pickling it copies their names, not the tokens."""

    def __init__(self, cache: FolderCache, keys: Sequence[str], ends_K: Indices) -> None:
        self.cache, self._keys, self._ends_K = cache, keys, ends_K
        self._tokens = lru_cache(_OPEN_SHARDS)(self._open)
        self._mask = lru_cache(_OPEN_SHARDS)(self._read_mask)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardTokens, (self.cache, self._keys, self._ends_K)

    def ids(self, start: int, stop: int) -> NDArray[np.int32]:
        """Read token ids [start, stop)."""
        parts = [self._tokens(k)[a:b].astype(np.int32) for k, a, b in self._parts(start, stop)]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def targets(self, start: int, stop: int) -> NDArray[np.bool_]:
        """True for those that are targets."""
        return np.concatenate([self._mask(k)[a:b] for k, a, b in self._parts(start, stop)])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, start, stop) there."""
        k = int(np.searchsorted(self._ends_K, start, side="right"))
        while start < stop:
            first, end = int(self._ends_K[k - 1]) if k else 0, int(self._ends_K[k])
            yield k, start - first, min(stop, end) - first
            start, k = end, k + 1

    def _open(self, k: int) -> Tokens:
        return self.cache.tokens(self._keys[k])

    def _read_mask(self, k: int) -> NDArray[np.bool_]:
        index = self.cache.index(self._keys[k])
        if index is None:
            raise DataError(f"the tokens {self._keys[k]} were removed while a run reads them; start it again")
        return index.mask()


class Corpus(NamedTuple):
    """E examples in the order of sources, files and rows.

    documents_E  counted through all files
    sources_E    which source it is of
    is_text_E    every token is a target, and it may be cut anywhere
    desirable_E  no row says that it is not
    runs         indices of examples and [start, stop) of the targets in them, of those that are no texts
    sha256s      of the files of each source
    beginning    token ids that a stream of joined texts begins with
    """

    tokens: ShardTokens
    starts_E: Indices
    lengths_E: Indices
    documents_E: Indices
    sources_E: NDArray[np.int16]
    is_text_E: NDArray[np.bool_]
    desirable_E: NDArray[np.bool_]
    runs: tuple[Indices, NDArray[np.int32]]
    num_documents: int
    sha256s: tuple[str, ...]
    beginning: Sequence[int]

    def num_targets_within(self, max_length: int) -> Indices:
        """Count the targets of each example that is no text among its first `max_length` tokens but the very first."""
        owners_R, runs_R2 = self.runs
        within_R = np.minimum(runs_R2[:, 1], max_length) - np.maximum(runs_R2[:, 0], 1)
        counts = np.bincount(owners_R, weights=np.maximum(within_R, 0), minlength=len(self.lengths_E))
        return counts.astype(np.int64)


def load_corpus(
    files: Files, max_rows: int | None, tokenisation: Tokenisation, cache: FolderCache, run: Runner = run_here
) -> Corpus:
    """Load the tokens of these files, or of the first `max_rows` rows of every source. What the cache lacks is
    tokenised.

    Raises DataError.
    """
    sha256s, parts_of = list[str](), list[list[FilePart]]()
    for source in files:
        parts_of.append([])
        left = max_rows
        for file in source:
            tokenisation.check_format(file.source, file.format)
            found = cut_known(file, left, cache)
            sha256s.append(found.sha256)
            parts_of[-1] += found.parts
            if left is not None:
                left -= found.num_rows or 0
    sources_K = np.repeat(np.arange(len(files)), [len(parts) for parts in parts_of])
    parts = [part for of_source in parts_of for part in of_source]
    keys = [tokenisation.key(part) for part in parts]
    return _assembled(cache, keys, _indices(parts, keys, tokenisation, cache, run), sources_K)._replace(
        sha256s=tuple(sha256s), beginning=tokenisation.beginning
    )


def _indices(
    parts: Sequence[FilePart], keys: Sequence[str], tokenisation: Tokenisation, cache: FolderCache, run: Runner
) -> list[ShardIndex]:
    found = _read(cache, keys)
    missing = {key: part for key, part in zip(keys, parts, strict=True) if found[key] is None}
    if missing:
        run(tokenisation, cache, _tasks(missing), len(missing))
        found |= _read(cache, list(missing))
    indices = [index for key in keys if (index := found[key]) is not None]
    if len(indices) < len(keys):
        raise DataError("tokens that were just written cannot be read again: is the cache on a disk that is full?")
    return indices


def _read(cache: FolderCache, keys: Sequence[str]) -> dict[str, ShardIndex | None]:
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(keys, pool.map(cache.index, keys), strict=True))


def _tasks(missing: dict[str, FilePart]) -> Iterator[Task]:
    """A file is read once, for all its parts; equal parts are one."""
    by_file: dict[RowFile, dict[FilePart, str]] = {}
    for key, part in missing.items():
        by_file.setdefault(part.file, {})[part] = key
    for wanted in by_file.values():
        for part, content in read_parts(sorted(wanted, key=lambda part: part.first)):
            yield Task(wanted[part], part, content)


def _assembled(
    cache: FolderCache, keys: Sequence[str], indices: Sequence[ShardIndex], sources_K: NDArray[np.int_]
) -> Corpus:
    num_examples = [len(index.lengths_E) for index in indices]
    documents_K = np.cumsum([0, *(index.num_documents for index in indices)])
    lengths_E = np.concatenate([index.lengths_E for index in indices]).astype(np.int64)
    num_runs_E = np.concatenate([index.num_runs_E for index in indices])
    return Corpus(
        tokens=ShardTokens(cache, tuple(keys), np.cumsum([index.num_tokens for index in indices])),
        starts_E=np.cumsum(lengths_E) - lengths_E,
        lengths_E=lengths_E,
        documents_E=np.concatenate(
            [index.documents_E + first for index, first in zip(indices, documents_K[:-1], strict=True)]
        ),
        sources_E=np.repeat(sources_K, num_examples).astype(np.int16),
        is_text_E=np.repeat([index.is_text for index in indices], num_examples),
        desirable_E=np.concatenate([index.desirable_E for index in indices]),
        runs=(
            np.repeat(np.arange(len(num_runs_E)), num_runs_E),
            np.concatenate([index.runs_R2 for index in indices]),
        ),
        num_documents=int(documents_K[-1]),
        sha256s=(),
        beginning=(),
    )
