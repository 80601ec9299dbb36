"""Memory of processes: the resident set of this process, and the proportional set size of a process tree."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.processes import tree

_SAMPLE_S = 0.25


def resident_bytes() -> int:
    """Resident set of this process."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The largest resident set of this process since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Start `peak_bytes` anew from the present resident set."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def tree_pss(pid: int) -> int:
    """Bytes of process `pid` and its descendants; shared pages count once (proportional set size)."""
    total = 0
    for process in tree(pid):
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


class PeakMemory:
    """`nbytes`: the largest PSS of the tree of `pid` among the samples; 0 without a sample."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self.nbytes = 0

    def sample(self) -> None:
        if self._pid is not None:
            self.nbytes = max(self.nbytes, tree_pss(self._pid))


@contextmanager
def watch_memory(pid: int | None) -> Iterator[PeakMemory]:
    """Sample the tree of `pid` four times a second until the block ends. The caller may take further samples later."""
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
