"""The servers that `loray serve` runs from one LORAY_HOME: a file for each, while it serves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loray.local.processes import Process, alive, identity, read_state, write_state

_FOLDER = "serve"


@dataclass(frozen=True, slots=True)
class StandaloneServer(Process):
    """`url`: where it answers, without a path."""

    url: str


@contextmanager
def announced(home: Path, url: str) -> Iterator[None]:
    """This process serves at `url` while the block runs."""
    file = home / _FOLDER / f"{os.getpid()}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_state(file, StandaloneServer(**identity(os.getpid()), url=url))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def standalone_servers(home: Path) -> list[StandaloneServer]:
    """Those that run now. Files of servers that died are removed."""
    found = []
    for file in sorted((home / _FOLDER).glob("*.json")):
        server = alive(read_state(file, StandaloneServer))
        if server is None:
            file.unlink(missing_ok=True)
        else:
            found.append(server)
    return found
