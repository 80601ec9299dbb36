"""What clients saw of each fault, as a table, and whether they may have seen it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.clients import Seen, quantile
from benchmarks.chaos.faults import Fault

CONTINUED = 0.99  # of streams that lost their replica


@dataclass
class Window:
    """From a fault to the next one. Seconds of `time.monotonic`.

    mended   when its cause had been removed, and all processes ran again: `whole`
    resumed  answers that went on at another replica
    missing  what did not run again in time, in words
    """

    fault: Fault
    begun: float
    mended: float = 0.0
    whole: float = 0.0
    resumed: int = 0
    missing: str = ""
    seen: list[Seen] = field(default_factory=list)

    @property
    def row(self) -> dict[str, Any]:
        ends = Counter(s.end for s in self.seen)
        waits = [s.wait_s for s in self.seen]
        return {
            "fault": self.fault.name,
            "requests": len(self.seen),
            "under_way": sum(s.begun < self.begun for s in self.seen),
            "whole": ends["whole"],
            "retried": sum(s.end == "whole" and s.num_retries > 0 for s in self.seen),
            "resumed": self.resumed,
            "error": ends["error"],
            "cut": ends["cut"],
            "refused": ends["refused"],
            "wrong": ends["wrong"],
            "p50_wait_s": quantile(waits, 0.5),
            "longest_wait_s": max(waits, default=0.0),
            "limit_s": self.fault.limit_s,
            "whole_after_s": self.whole - self.begun,
        }

    def failures(self) -> list[str]:
        """What no client may see, in words."""
        found = []
        for seen in self.seen:
            allowed = seen.end == "whole" or (seen.end == "cut" and self.fault.cuts) or seen.end == "error"
            if not allowed:
                found.append(f"{self.fault.name}: {seen.end} after {seen.num_retries} retries: {seen.detail}")
            if seen.wait_s > self.fault.limit_s:
                found.append(f"{self.fault.name}: {seen.wait_s:.1f} s without a token, {seen.end}")
        return found


def divide(seen: Sequence[Seen], windows: Sequence[Window]) -> None:
    """Gives each request to the last fault that had begun when it ended."""
    for one in seen:
        owner = None
        for window in windows:
            if window.begun <= one.ended:
                owner = window
        if owner is not None:
            owner.seen.append(one)


def continued(windows: Sequence[Window]) -> float | None:
    """The share of answers that went on, of those that had begun and lost their replica. None: there were none."""
    resumed = sum(w.resumed for w in windows)
    lost = sum(s.end == "error" for w in windows for s in w.seen)
    return resumed / (resumed + lost) if resumed + lost else None


_HEADER = (
    f"{'fault':<38} {'requests':>8} {'under way':>9} {'whole':>6} {'retried':>7} {'resumed':>7} {'error':>5} "
    f"{'cut':>4} {'refused':>7} {'wrong':>5} {'wait p50':>8} {'longest':>8} {'whole after':>11}"
)


def table(windows: Sequence[Window]) -> list[str]:
    lines = [_HEADER]
    for window in windows:
        r = window.row
        lines.append(
            f"{r['fault']:<38} {r['requests']:>8} {r['under_way']:>9} {r['whole']:>6} {r['retried']:>7} "
            f"{r['resumed']:>7} {r['error']:>5} {r['cut']:>4} {r['refused']:>7} {r['wrong']:>5} "
            f"{r['p50_wait_s']:>6.2f} s {r['longest_wait_s']:>6.1f} s {r['whole_after_s']:>9.1f} s"
        )
    return lines
