"""Host memory: how many bytes adapters take there, and whose copies go when others come.

Counted are packed rows, each VeRA pair once however many adapters share it, and flights with their published size
until they land.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import chain
from typing import Generic, Protocol, TypeVar

from loray.engine.residency.arrival import Arrival


class SharedPair(Protocol):
    """A VeRA pair."""

    @property
    def digest(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


class Packed(Protocol):
    """An adapter in host memory, ready to be copied into the pool."""

    @property
    def nbytes(self) -> int:
        """Without the pair."""
        ...

    @property
    def pair(self) -> SharedPair | None: ...

    @property
    def arrival(self) -> Arrival | None:
        """None where it is whole."""
        ...


P = TypeVar("P", bound=Packed)


class HostMemory(Generic[P]):
    """Owns the count, and the order in which copies go that nobody waits for. By digest."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0
        self._copies: dict[str, P] = {}
        self._spare: OrderedDict[str, None] = OrderedDict()
        self._sharers: Counter[str] = Counter()  # of each pair

    def expect(self, nbytes: int) -> None:
        """A flight begins."""
        self.used += nbytes

    def expect_no_more(self, nbytes: int) -> None:
        """It has landed or failed."""
        self.used -= nbytes

    def keep(self, digest: str, packed: P) -> None:
        self._copies[digest] = packed
        self.used += packed.nbytes
        if packed.pair is not None:
            self._sharers[packed.pair.digest] += 1
            if self._sharers[packed.pair.digest] == 1:
                self.used += packed.pair.nbytes

    def drop(self, digest: str) -> None:
        self._spare.pop(digest, None)
        packed = self._copies.pop(digest)
        self.used -= packed.nbytes
        if packed.pair is not None:
            self._sharers[packed.pair.digest] -= 1
            if not self._sharers[packed.pair.digest]:
                del self._sharers[packed.pair.digest]
                self.used -= packed.pair.nbytes

    def spare(self, digest: str) -> None:
        """Nobody waits for this copy: it may go, after all that are spare already."""
        self._spare.setdefault(digest)

    def touch(self, digest: str) -> None:
        """It was used."""
        if digest in self._spare:
            self._spare.move_to_end(digest)

    def need(self, digest: str) -> None:
        self._spare.pop(digest, None)

    def surplus(self) -> list[str]:
        """Spare copies, the oldest first, without which the limit is kept, or kept better."""
        going, _ = self._going(self.used - self._limit, ())
        return going

    def room_for(self, nbytes: int, before: Iterable[str]) -> list[str] | None:
        """What goes so that `nbytes` more have room: spare copies first, then, in this order, those of `before`.

        None where that is not room enough, unless nothing else is there: one adapter always may come in.
        """
        excess = self.used + nbytes - self._limit
        going, freed = self._going(excess, before)
        return going if freed >= excess or freed == self.used else None

    def _going(self, excess: int, others: Iterable[str]) -> tuple[list[str], int]:
        """Copies until `excess` bytes are free, and how many they free."""
        going: list[str] = []
        freed = 0
        sharers: Counter[str] = Counter()
        for digest in chain(self._spare, others):
            if freed >= excess:
                break
            packed = self._copies[digest]
            going.append(digest)
            freed += packed.nbytes
            if packed.pair is not None:
                sharers[packed.pair.digest] += 1
                if sharers[packed.pair.digest] == self._sharers[packed.pair.digest]:
                    freed += packed.pair.nbytes
        return going, freed

    def check_integrity(self, flying_bytes: int, spare: set[str]) -> None:
        """AssertionError unless the count is that of the copies and flights, and exactly `spare` may go."""
        pairs = {p.pair.digest: p.pair.nbytes for p in self._copies.values() if p.pair is not None}
        assert self.used == flying_bytes + sum(p.nbytes for p in self._copies.values()) + sum(pairs.values())
        assert spare == set(self._spare), "spare copies differ from those that nobody waits for"
