"""Which idle adapter leaves the pool: the one with the lowest value, by GreedyDual-Size-Frequency.

    value = floor at the last use + number of uses · seconds to fetch it again / blocks that it frees

The floor is the value of the last evicted adapter. It rises, so the value of an adapter that is not used falls behind,
however long it takes to fetch. The seconds are measured: the last copy from the host, and the last load if the host
has no copy any more. Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching
Policy", HP Laboratories, 1998.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EvictionScore:
    """Of one adapter. `uses`: since it came into the pool. `place_seconds` None: it was copied layer by layer, which is
    not measured.
    """

    floor: float = 0.0
    uses: int = 0
    place_seconds: float | None = None
    load_seconds: float = 0.0


class GreedyDual:
    """The floor, and what changes the scores. Sizes are in blocks."""

    def __init__(self) -> None:
        self._floor = 0.0
        self._block_seconds = 0.0  # to copy one block from the host, a running mean

    def placed(self, score: EvictionScore, seconds: float | None, size: float) -> None:
        score.uses, score.place_seconds = 0, seconds
        if seconds is not None:
            share = 0.1 if self._block_seconds else 1.0
            self._block_seconds += share * (seconds / size - self._block_seconds)

    def used(self, score: EvictionScore) -> None:
        score.uses += 1
        self.released(score)

    def released(self, score: EvictionScore) -> None:
        """A use has ended; it may have begun long ago, so the floor is taken again."""
        score.floor = self._floor

    def value(self, score: EvictionScore, size: float, *, on_host: bool) -> float:
        seconds = self._block_seconds * size if score.place_seconds is None else score.place_seconds
        if not on_host:
            seconds += score.load_seconds
        return score.floor + score.uses * seconds / size

    def evicted(self, value: float) -> None:
        self._floor = max(self._floor, value)
