"""What clients saw of each fault, as a table, and whether they may have seen it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.clients import Seen
from benchmarks.chaos.faults import Fault
from benchmarks.serving.figures.rows import quantile

CONTINUED = 0.99  # of streams that lost their replica


@dataclass
class Window:
    """From a fault to the next one. Seconds of `time.monotonic`.

    whole    when all processes ran again, or were given up
    next_begun  when the next fault began
    resumed  answers that were sent on to another replica after they had begun
    missing  what did not run again in time, in words
    last_missing  what ran again last, in words
    """

    fault: Fault
    begun: float
    whole: float = 0.0
    next_begun: float = math.inf
    resumed: int = 0
    missing: str = ""
    last_missing: str = ""
    seen: list[Seen] = field(default_factory=list)

    @property
    def row(self) -> dict[str, Any]:
        ends = Counter(s.end for s in self.seen)
        waits = sorted(s.wait_s for s in self.seen)
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
            "whole_after_s": (self.whole or math.nan) - self.begun,
        }


def divide(seen: Sequence[Seen], windows: Sequence[Window]) -> None:
    """Gives each request to the last fault that had begun when it ended."""
    for one in seen:
        before = [window for window in windows if window.begun <= one.ended]
        if before:
            before[-1].seen.append(one)


def failures(windows: Sequence[Window]) -> list[str]:
    """What no client may see, in words. A request that lasted from one fault to the next may see what either allows."""
    found = []
    for number, window in enumerate(windows):
        for seen in window.seen:
            faults = [w.fault for w in windows[: number + 1] if w is window or w.next_begun >= seen.begun]
            is_allowed = seen.end in ("whole", "error") or (seen.end == "cut" and any(f.cuts for f in faults))
            if not is_allowed:
                found.append(f"{window.fault.name}: {seen.end} after {seen.num_retries} retries: {seen.detail}")
            if seen.wait_s > max(f.limit_s for f in faults):
                tries = "".join(f"; tried {said}" for said in seen.tries)
                found.append(f"{window.fault.name}: {seen.wait_s:.1f} s without a token, {seen.end}{tries}")
    return found


def continued(windows: Sequence[Window]) -> float | None:
    """The share of answers that went on to their end, of those that had begun and lost their replica. None: none had.

    An answer counts as resumed when it is sent elsewhere, so one that ends with an error may have been counted.
    """
    resumed = sum(w.resumed for w in windows)
    failed = sum(s.end == "error" for w in windows for s in w.seen)
    return max(0, resumed - failed) / max(resumed, 1) if resumed or failed else None


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
