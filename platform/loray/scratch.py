"""Budgets of bytes, of memory and of temporary folders: what will be taken is counted before, and refused."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from loray.errors import Overloaded
from loray.files import scratch_folder

SHARE = 0.8  # of what is free at the start
_RETRY_S = 10.0


class Budget:
    """Bytes that one process may take, in several threads. `name` is what they are, in messages."""

    def __init__(self, max_bytes: int, name: str) -> None:
        self.max_bytes, self._name = max_bytes, name
        self._lock = Lock()
        self._held: Counter[str] = Counter()

    @contextmanager
    def reserve(self, num_bytes: int, of: str = "") -> Iterator[None]:
        """So many bytes are taken for the block. `of`: by which `held` finds them.

        Raises Overloaded where others hold too many.
        """
        with self._lock:
            held = self._held.total()
            if held + num_bytes > self.max_bytes:
                raise Overloaded(
                    f"{num_bytes:,} bytes do not fit {self._name} beside the {held:,} of others; it may hold "
                    f"{self.max_bytes:,}: try again later",
                    _RETRY_S,
                )
            self._held[of] += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._held[of] -= num_bytes
                if not self._held[of]:
                    del self._held[of]

    def held(self, of: str = "") -> int:
        """The bytes of the blocks that have not ended."""
        with self._lock:
            return self._held[of]


class Scratch(Budget):
    """That of temporary folders."""

    def __init__(self, max_bytes: int | None = None) -> None:
        """None: a share of what is free now where temporary files lie."""
        if max_bytes is None:
            max_bytes = int(SHARE * shutil.disk_usage(tempfile.gettempdir()).free)
        super().__init__(max_bytes, "on this server's disk (LORAY_SCRATCH_BYTES)")

    @contextmanager
    def folder(self, num_bytes: int, of: str = "") -> Iterator[Path]:
        """A temporary folder for the block, which will hold so many bytes. Raises as `reserve`."""
        with self.reserve(num_bytes, of), scratch_folder() as folder:
            yield folder
