"""What an idle adapter is worth, see `memory.worth`. The seconds to have it again are measured: the last copy from the
host, and the last load if the host has no copy any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from loray.engine.memory.worth import Floor, Reuse


@dataclass(slots=True)
class EvictionScore:
    """Of one adapter. `uses`: since it came into the pool. `place_seconds` None: it was copied layer by layer, which is
    not measured.
    """

    floor: float = 0.0
    uses: int = 0
    place_seconds: float | None = None
    load_seconds: float = 0.0


class AdapterWorth:
    """What changes the scores. Sizes are in blocks."""

    def __init__(self) -> None:
        self.floor = Floor()
        self._reuse = Reuse()
        self._block_seconds = 0.0  # to copy one block from the host, a running mean

    def placed(self, score: EvictionScore, seconds: float | None, size: float) -> None:
        score.uses, score.place_seconds = 0, seconds
        if seconds is not None:
            share = 0.1 if self._block_seconds else 1.0
            self._block_seconds += share * (seconds / size - self._block_seconds)

    def used(self, score: EvictionScore) -> None:
        score.uses += 1
        self._reuse.used(score.uses)
        self.released(score)

    def released(self, score: EvictionScore) -> None:
        """A use has ended; it may have begun long ago, so the floor is taken again."""
        score.floor = self.floor.value

    def value(self, score: EvictionScore, size: float, *, on_host: bool) -> float:
        seconds = self._block_seconds * size if score.place_seconds is None else score.place_seconds
        if not on_host:
            seconds += score.load_seconds
        return score.floor + self._reuse.expected(score.uses) * seconds / size
