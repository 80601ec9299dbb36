"""A budget of bytes for temporary folders: what will be taken is counted before, and refused where it is too much."""

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


class Scratch:
    """Bytes that one process may take of the disk where temporary files lie, in several threads."""

    def __init__(self, max_bytes: int | None = None) -> None:
        """`max_bytes` None: a share of what is free there now."""
        if max_bytes is None:
            max_bytes = int(SHARE * shutil.disk_usage(tempfile.gettempdir()).free)
        self.max_bytes = max_bytes
        self._lock = Lock()
        self._held: Counter[str] = Counter()

    @contextmanager
    def reserve(self, num_bytes: int, of: str = "") -> Iterator[None]:
        """Take so many bytes for the block. `of`: by which `held` finds them.

        Raises Overloaded where others hold too many.
        """
        with self._lock:
            held = self._held.total()
            if held + num_bytes > self.max_bytes:
                raise Overloaded(
                    f"{num_bytes:,} bytes do not fit on this server's disk (LORAY_SCRATCH_BYTES) beside the {held:,} "
                    f"of others; it may hold {self.max_bytes:,}: try again later",
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

    @contextmanager
    def folder(self, num_bytes: int, of: str = "") -> Iterator[Path]:
        """A temporary folder for the block, which will hold so many bytes. Raises as `reserve`."""
        with self.reserve(num_bytes, of), scratch_folder() as folder:
            yield folder
