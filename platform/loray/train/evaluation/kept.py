"""Figures of single passes (windows, prompts), kept on disk as they are computed: an evaluation that was interrupted
goes on where it was.

A model has a file of JSON lines, named by a digest of what decides its figures. A line has the digest of a pass's
tokens, and what the pass gave. It is appended in one write, so that a process that is killed loses the pass under way
alone. Floats are read as they were written, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loray.files import canonical_json, touch
from loray.telemetry import StageProgress, get_logger

log = get_logger(__name__)

_FOLDER = Path("cache") / "evaluations"
_FORMAT = 1  # to be raised where the same pass means another figure than before
_UNUSED_S = 30 * 24 * 3600.0

Figures = Mapping[str, float]


class Pass(NamedTuple):
    """`key`: a digest of all that goes into the model. `num_items`: windows or prompts in the pass."""

    key: str
    num_items: int


Take = Callable[[Sequence[Pass], Callable[[int], Figures]], list[Figures]]  # (passes, figures of the i-th)


def compute_all(passes: Sequence[Pass], compute: Callable[[int], Figures]) -> list[Figures]:
    """Keeps nothing."""
    return [compute(i) for i in range(len(passes))]


def digest(*inputs: str | Sequence[int] | NDArray[np.int32]) -> str:
    """SHA-256 of texts and token ids in order, with their shapes."""
    found = hashlib.sha256()
    for data in inputs:
        array = np.frombuffer(data.encode(), np.uint8) if isinstance(data, str) else np.asarray(data, "<i4")
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()


class KeptFigures:
    """`num_taken` and `num_computed` count windows and prompts, of all models.

    home   None: nothing is kept
    fresh  nothing is taken; what is computed replaces what was kept
    Files that were not used for 30 days are removed.
    """

    def __init__(self, home: Path | None = None, *, fresh: bool = False) -> None:
        self._folder = None if home is None else home / _FOLDER
        self._fresh = fresh
        self.num_taken = self.num_computed = 0
        if self._folder is not None:
            _remove_unused(self._folder)

    def figures(
        self,
        model: Mapping[str, Any],
        passes: Sequence[Pass],
        compute: Callable[[int], Figures],
        progress: StageProgress = lambda share: None,
    ) -> list[Figures]:
        """The figures of each pass, in order; `compute(i)` gives those of passes[i] where no earlier run has.

        `model` is what decides the figures beside the passes, as JSON. Progress begins with the share that is taken.
        """
        path = (
            None
            if self._folder is None
            else self._folder / f"{digest(canonical_json({'format': _FORMAT, **model}))}.jsonl"
        )
        known = {} if path is None or self._fresh else _read(path)
        total = sum(p.num_items for p in passes)
        done = sum(p.num_items for p in passes if p.key in known)
        self.num_taken += done
        progress(done / total)
        found: list[Figures] = []
        for i, (key, num_items) in enumerate(passes):
            if key not in known:
                known[key] = compute(i)
                if path is not None:
                    _append(path, {"pass": key, **known[key]})
                done += num_items
                self.num_computed += num_items
                progress(done / total)
            found.append(known[key])
        return found


def _read(path: Path) -> dict[str, Figures]:
    """The figures by pass. A line that a dying process left unfinished is passed over; of equal passes the last one
    counts.
    """
    touch(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return {}
    found: dict[str, Figures] = {}
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            key, figures = record.pop("pass"), {name: float(value) for name, value in record.items()}
            if all(map(isfinite, figures.values())):
                found[key] = figures
    return found


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Begins with a line's end, lest the record join an unfinished one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, f"\n{json.dumps(record)}\n".encode())
        finally:
            os.close(handle)
    except OSError as e:
        log.warning("a figure is not kept, and is computed again after an interruption: %s", e)


def _remove_unused(folder: Path) -> None:
    for path in folder.glob("*.jsonl"):
        with suppress(OSError):  # another process removes it too
            if time.time() - path.stat().st_mtime > _UNUSED_S:
                path.unlink()
