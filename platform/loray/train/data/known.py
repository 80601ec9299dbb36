"""Keeps how a file was cut with the file's state, as Git's index does: a file that did not change is not read.

The state of a local file is its path, size, inode, and the times of its last change. A change within the resolution of
these times, so soon after the one before that they stay equal, would not show: what was just changed is read each time.
The state of an object in a bucket is its name, size, time and ETag, which every machine sees alike.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from loray.recipes.sources import SourceFiles
from loray.spec import DataSpec, SftSpec
from loray.train.data import read
from loray.train.data.formats import Formats
from loray.train.data.read import CutFile, FilePart, Head, RowFile, cut, read_head, rows_of
from loray.train.data.shards import FolderCache

_FORM = 2  # of what is kept
_SETTLED_S = 2.0  # the coarsest resolution of a file system's times, FAT's


def open_known(source: SourceFiles, spec: DataSpec, cache: FolderCache, formats: Formats = SftSpec.formats) -> RowFile:
    """Open the rows of a file. What an object in a bucket begins with is from `cache`, where it has that."""
    if source.remote is None:
        return rows_of(source, read_head(source), spec, formats)
    key = _key("head", source.remote.state)
    if (kept := _kept(cache, key)) is None:
        kept = read_head(source)
        cache.keep(key, json.dumps(kept).encode())
    kind, names = kept
    return rows_of(source, Head(kind, tuple(names)), spec, formats)


def cut_known(file: RowFile, max_rows: int | None, cache: FolderCache) -> CutFile:
    """Cut a file as `cut` does, from what `cache` has of this state of it."""
    state, here = _state(file.source), file.source.remote is None
    if state is None:
        return cut(file, max_rows)
    key = _key(read.PART_BYTES, file.kind, file.columns, max_rows, state)
    if (kept := _kept(cache, key, here=here)) is not None:
        sha256, parts, num_rows = kept
        return CutFile(sha256, tuple(FilePart(file, digest, first, stop) for digest, first, stop in parts), num_rows)
    found = cut(file, max_rows)
    if state == _state(file.source):
        parts = [[part.digest, part.first, part.stop] for part in found.parts]
        cache.keep(key, json.dumps([found.sha256, parts, found.num_rows]).encode(), here=here)
    return found


def _kept(cache: FolderCache, key: str, *, here: bool = False) -> Any:
    """None where there is no note, or none that is whole."""
    with suppress(ValueError):
        return json.loads(cache.note(key, here=here) or b"")
    return None


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
