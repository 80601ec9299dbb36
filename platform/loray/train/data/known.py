"""Keeps how a file was cut with the file's state, as Git's index does: a file that did not change is not read.

The state of a local file is its path, size, inode, and the times of its last change. A change within the resolution of
these times, so soon after the one before that they stay equal, would not show: what was just changed is read each time.
The state of an object in a bucket is its name, size, time and ETag, which every machine sees alike.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Literal

from loray.recipes.sources import SourceFiles
from loray.train.data import read
from loray.train.data.read import CutFile, DataFormat, FilePart, Head, RowFile, cut, read_head, rows_of
from loray.train.data.shards import ShardCache

_FORM = 1  # of what is kept
_SETTLED_S = 2.0  # the coarsest resolution of a file system's times, FAT's


def open_known(
    source: SourceFiles, format: DataFormat | Literal["auto"], cache: ShardCache, *, paired: bool = False
) -> RowFile:
    """Open the rows of a file. What an object in a bucket begins with is from `cache`, where it has that."""
    if source.remote is None:
        return rows_of(source, read_head(source), format, paired=paired)
    key = _key("head", source.remote.state)
    kept = cache.note(key)
    head = None if kept is None else _read_head(kept)
    if head is None:
        head = read_head(source)
        cache.keep(key, json.dumps(head).encode())
    return rows_of(source, head, format, paired=paired)


def cut_known(file: RowFile, max_rows: int | None, cache: ShardCache) -> CutFile:
    """Cut a file as `cut` does, from what `cache` has of this state of it."""
    state, here = _state(file.source), file.source.remote is None
    if state is None:
        return cut(file, max_rows)
    key = _key(read.PART_BYTES, file.kind, file.format, file.columns, max_rows, state)
    kept = cache.note(key, here=here)
    found = None if kept is None else _read(kept, file)
    if found is None:
        found = cut(file, max_rows)
        if state == _state(file.source):
            cache.keep(key, _written(found), here=here)
    return found


def _key(*named: object) -> str:
    return hashlib.sha256(json.dumps([_FORM, *named]).encode()).hexdigest()


def _state(source: SourceFiles) -> tuple[str | int, ...] | None:
    """None for a copy whose original was not asked for its state, and for a local file that was just changed."""
    if source.remote is not None:
        return source.remote.state
    path = Path(source.path)
    if "://" in source.path or path != Path(source.name):
        return None
    try:
        stat = path.stat()
    except OSError:
        return None  # which reading it reports
    if time.time() - max(stat.st_mtime, stat.st_ctime) < _SETTLED_S:
        return None
    return str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _written(found: CutFile) -> bytes:
    named = [[part.digest, part.first, part.stop] for part in found.parts]
    return json.dumps([found.sha256, named, found.num_rows]).encode()


def _read(kept: bytes, file: RowFile) -> CutFile | None:
    """None where it is not whole."""
    try:
        sha256, named, num_rows = json.loads(kept)
    except ValueError:
        return None
    return CutFile(sha256, tuple(FilePart(file, digest, first, stop) for digest, first, stop in named), num_rows)


def _read_head(kept: bytes) -> Head | None:
    """None where it is not whole."""
    try:
        kind, names = json.loads(kept)
    except ValueError:
        return None
    return Head(kind, tuple(names))
