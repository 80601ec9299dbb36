"""What clients saw of each fault, as a table, and whether they may have seen it; and what was left behind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.faults.faults import Fault
from tests.faults.load import Seen
from tests.faults.spy import Held

CONTINUED = 0.99  # of streams that lost their replica
_SPARE_FILES = 8  # of a process that has been replaced: its database connections come when they are needed


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
        waits = [s.wait_s for s in self.seen]
        return {
            "fault": self.fault.name,
            "requests": len(self.seen),
            "under_way": sum(s.begun < self.begun for s in self.seen),
            "whole": ends["whole"],
            "retried": sum(s.end == "whole" and bool(s.tries) for s in self.seen),
            "resumed": self.resumed,
            "error": ends["error"],
            "cut": ends["cut"],
            "refused": ends["refused"],
            "wrong": ends["wrong"],
            "p50_wait_s": median(waits) if waits else math.nan,
            "longest_wait_s": max(waits, default=0.0),
            "whole_after_s": (self.whole or math.nan) - self.begun,
            "limit_s": self.fault.limit_s,
        }


def divide(seen: Sequence[Seen], windows: Sequence[Window]) -> None:
    """Each request belongs to the last fault before its end."""
    for one in seen:
        before = [window for window in windows if window.begun <= one.ended]
        if before:
            before[-1].seen.append(one)


def failures(windows: Sequence[Window]) -> list[str]:
    """What no client may see, in words. A request that lasted from one fault to the next may see what either allows."""
    found = [window.missing for window in windows if window.missing]
    for number, window in enumerate(windows):
        for seen in window.seen:
            faults = [w.fault for w in windows[: number + 1] if w is window or w.next_begun >= seen.begun]
            is_allowed = seen.end in ("whole", "error") or (seen.end == "cut" and any(f.cuts for f in faults))
            if not is_allowed:
                found.append(f"{window.fault.name}: {seen.end} after {len(seen.tries)} retries: {seen.detail}")
            if seen.wait_s > max(f.limit_s for f in faults):
                tries = "".join(f"; tried {said}" for said in seen.tries)
                found.append(f"{window.fault.name}: {seen.wait_s:.1f} s without a token, {seen.end}{tries}")
    share = continued(windows)
    if share is not None and share < CONTINUED:
        found.append(f"{share:.1%} of the streams that lost their replica went on, of {CONTINUED:.0%}")
    if share is None and any(window.fault.loses for window in windows):
        found.append("replicas were lost, and no answer went on: it is not shown that any does")
    return found


def continued(windows: Sequence[Window]) -> float | None:
    """The share of answers that went on to their end, of those that had begun and lost their replica. None: none had.

    An answer counts as resumed when it is sent elsewhere, so one that ends with an error may have been counted.
    """
    resumed = sum(w.resumed for w in windows)
    failed = sum(s.end == "error" for w in windows for s in w.seen)
    return max(0, resumed - failed) / max(resumed, 1) if resumed or failed else None


def table(windows: Sequence[Window]) -> list[str]:
    names = [name for name in windows[0].row if name != "limit_s"]
    lines = [f"{names[0]:<38}" + "".join(f"{name.replace('_', ' '):>15}" for name in names[1:])]
    for row in (window.row for window in windows):
        values = [f"{row[name]:.2f}" if isinstance(row[name], float) else f"{row[name]}" for name in names[1:]]
        lines.append(f"{row['fault']:<38}" + "".join(f"{value:>15}" for value in values))
    return lines


def left_behind(before: Mapping[str, Held], after: Mapping[str, Held]) -> list[str]:
    """What processes hold of requests, and what the cluster has more than before the first fault."""
    usual: dict[str, Held] = {}
    for process, figures in before.items():
        most = usual.setdefault(_role(process), {})
        most |= {name: max(n, most.get(name, 0)) for name, n in figures.items()}
    found = []
    for process, figures in after.items():
        for name, n in figures.items():
            allowed = 0 if name in ("requests", "blocks") else usual.get(_role(process), {}).get(name, 0)
            allowed += _SPARE_FILES if name == "files" else 0
            if n > allowed:
                found.append(f"left behind: {process}: {n} {name} of {allowed}")
    return found


def _role(process: str) -> str:
    """Gateway or engine, of either application; or the cluster."""
    return process.split(" ")[1] if " " in process else process
