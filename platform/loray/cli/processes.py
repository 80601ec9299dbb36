"""Processes of this machine as /proc shows them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def session_members(session: int) -> list[int]:
    """Living processes of the session, whoever their parent is now."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat_fields(int(folder.name))
        if fields is not None and int(fields[3]) == session:
            members.append(int(folder.name))
    return members


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started; None where it does not run (a zombie does not)."""
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[19])


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on; None where `pid` has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields
