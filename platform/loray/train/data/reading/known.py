"""How a local file was cut is kept with the file's state, as Git's index does: a file that did not change is not read.

The state is its path, size, inode, and the times of its last change. A change within the resolution of these times, so
soon after the one before that they stay equal, would not show: what was just changed is read each time.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from loray.train.data.reading import parts
from loray.train.data.reading.files import RowFile
from loray.train.data.reading.parts import CutFile, Part, cut
from loray.train.data.shards import ShardCache

_FORM = 1  # of what is kept
_SETTLED_S = 2.0  # the coarsest resolution of a file system's times, FAT's


def cut_known(file: RowFile, max_rows: int | None, cache: ShardCache) -> CutFile:
    """As `cut`, from what `cache` has of this state of the file."""
    state = _state(file)
    if state is None:
        return cut(file, max_rows)
    named = [_FORM, parts.PART_BYTES, file.kind, file.format, file.columns, max_rows, state]
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()
    kept = cache.note(key, here=True)
    found = None if kept is None else _read(kept, file)
    if found is None:
        found = cut(file, max_rows)
        if state == _state(file):
            cache.keep(key, _written(found), here=True)
    return found


def _state(file: RowFile) -> list[object] | None:
    """None for what is not a local file, or a copy of one elsewhere, or was just changed."""
    path = Path(file.source.path)
    if "://" in file.source.path or path != Path(file.source.name):
        return None
    try:
        stat = path.stat()
    except OSError:
        return None  # which reading it reports
    if time.time() - max(stat.st_mtime, stat.st_ctime) < _SETTLED_S:
        return None
    return [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _written(found: CutFile) -> bytes:
    named = [[part.digest, part.first, part.stop] for part in found.parts]
    return json.dumps([found.sha256, named, found.num_rows]).encode()


def _read(kept: bytes, file: RowFile) -> CutFile | None:
    """None where it is not whole."""
    try:
        sha256, named, num_rows = json.loads(kept)
    except ValueError:
        return None
    return CutFile(sha256, tuple(Part(file, digest, first, stop) for digest, first, stop in named), num_rows)
