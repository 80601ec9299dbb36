"""Which idle adapter leaves the pool: the one that is worth least, by GreedyDual-Size-Frequency.

    value = floor when it was last used + uses · seconds to fetch it again / blocks that it gives back

The floor is the value of what was evicted last, so whatever is not used falls behind, however costly it was. Seconds
are measured: the last copy from the host, and the last load where the host has no copy any more. Source: Cherkasova,
"Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Laboratories, 1998.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Worth:
    """Of one adapter. `uses`: since it came into the pool. `place_seconds` None: it came layer by layer, unmeasured."""

    floor: float = 0.0
    uses: int = 0
    place_seconds: float | None = None
    load_seconds: float = 0.0


class GreedyDual:
    def __init__(self) -> None:
        self._floor = 0.0
        self._block_seconds = 0.0  # of copying a block from the host, lately

    def placed(self, worth: Worth, seconds: float | None, size: float) -> None:
        worth.uses, worth.place_seconds = 0, seconds
        if seconds is not None:
            share = 0.1 if self._block_seconds else 1.0
            self._block_seconds += share * (seconds / size - self._block_seconds)

    def used(self, worth: Worth) -> None:
        worth.uses += 1
        self.left(worth)

    def left(self, worth: Worth) -> None:
        """A use has ended, which may have been long."""
        worth.floor = self._floor

    def value(self, worth: Worth, size: float, *, on_host: bool) -> float:
        """`size` in blocks."""
        seconds = self._block_seconds * size if worth.place_seconds is None else worth.place_seconds
        if not on_host:
            seconds += worth.load_seconds
        return worth.floor + worth.uses * seconds / size

    def evicted(self, value: float) -> None:
        self._floor = max(self._floor, value)
