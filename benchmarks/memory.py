"""What processes hold in memory: this one's resident set, and the shared-once sum of a tree of processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SAMPLE_S = 0.25


def resident_bytes() -> int:
    """Of this process."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def tree_pss(pid: int) -> int:
    """Bytes of the process and everything below it, shared pages counted once (proportional set size)."""
    total, todo = 0, [pid]
    while todo:
        process = todo.pop()
        try:
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                todo += map(int, children.read_text(encoding="utf-8").split())
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


class PeakMemory:
    """`nbytes`: the largest sum of PSS of the tree of `pid` that was seen; 0 where nobody looked."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self.nbytes = 0

    def sample(self) -> None:
        if self._pid is not None:
            self.nbytes = max(self.nbytes, tree_pss(self._pid))


@contextmanager
def watch_memory(pid: int | None) -> Iterator[PeakMemory]:
    """Samples the tree of `pid`, four times a second, until the block ends; later ones are the caller's."""
    peak, over = PeakMemory(pid), threading.Event()
    if pid is None:
        yield peak
        return

    def sample() -> None:
        while True:
            peak.sample()
            if over.wait(_SAMPLE_S):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
