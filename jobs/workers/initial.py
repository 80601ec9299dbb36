"""The published adapter that a run goes on from, on its way to the workers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class InitialFiles(NamedTuple):
    """The files of a published adapter by name, for workers on any machine."""

    digest: str
    files: Mapping[str, bytes]

    @contextmanager
    def as_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="loray-initial-") as folder:
            for name, data in self.files.items():
                Path(folder, name).write_bytes(data)
            yield Path(folder)
