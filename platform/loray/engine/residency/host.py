"""Host memory: how many bytes adapters take there, and which copies are dropped for others.

Counted are packed rows; each VeRA pair once, however many adapters share it; and loads that have started, with the
adapter's published size.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import chain
from typing import Generic, Protocol, TypeVar

from loray.engine.residency.partial import PartialLoad


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
    def partial(self) -> PartialLoad | None:
        """None if it was complete from the start."""
        ...


P = TypeVar("P", bound=Packed)


class HostMemory(Generic[P]):
    """Owns the count, and the order in which evictable copies are dropped: least recently used first.

    A copy is evictable while no request waits for it. Adapters are named by digest.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0
        self._copies: dict[str, P] = {}
        self._evictable: OrderedDict[str, None] = OrderedDict()
        self._sharers: Counter[str] = Counter()  # of each pair

    def reserve(self, nbytes: int) -> None:
        """A load starts."""
        self.used += nbytes

    def end_reservation(self, nbytes: int) -> None:
        """The load has a result or has failed."""
        self.used -= nbytes

    def add(self, digest: str, packed: P) -> None:
        self._copies[digest] = packed
        self.used += packed.nbytes
        if packed.pair is not None:
            self._sharers[packed.pair.digest] += 1
            if self._sharers[packed.pair.digest] == 1:
                self.used += packed.pair.nbytes

    def drop(self, digest: str) -> None:
        self._evictable.pop(digest, None)
        packed = self._copies.pop(digest)
        self.used -= packed.nbytes
        if packed.pair is not None:
            self._sharers[packed.pair.digest] -= 1
            if not self._sharers[packed.pair.digest]:
                del self._sharers[packed.pair.digest]
                self.used -= packed.pair.nbytes

    def mark_evictable(self, digest: str) -> None:
        """The copy may be dropped, after all that are evictable already."""
        self._evictable.setdefault(digest)

    def mark_needed(self, digest: str) -> None:
        """The copy, if there is one, may not be dropped."""
        self._evictable.pop(digest, None)

    def touch(self, digest: str) -> None:
        """The copy was used."""
        if digest in self._evictable:
            self._evictable.move_to_end(digest)

    def surplus(self) -> list[str]:
        """Evictable copies to drop, the oldest first, because the limit is exceeded; it may still be afterwards."""
        victims, _ = self._victims(self.used - self._limit, ())
        return victims

    def room_for(self, nbytes: int, others: Iterable[str]) -> list[str] | None:
        """Copies to drop so that `nbytes` more fit: evictable ones first, then those of `others`, in their order.

        None if that does not free enough; but one adapter alone always fits, whatever its size.
        """
        excess = self.used + nbytes - self._limit
        victims, freed = self._victims(excess, others)
        return victims if freed >= excess or freed == self.used else None

    def _victims(self, excess: int, others: Iterable[str]) -> tuple[list[str], int]:
        """Copies whose removal frees `excess` bytes, or all that may be removed; and how many bytes they free."""
        victims: list[str] = []
        freed = 0
        sharers: Counter[str] = Counter()
        for digest in chain(self._evictable, others):
            if freed >= excess:
                break
            packed = self._copies[digest]
            victims.append(digest)
            freed += packed.nbytes
            if packed.pair is not None:
                sharers[packed.pair.digest] += 1
                if sharers[packed.pair.digest] == self._sharers[packed.pair.digest]:
                    freed += packed.pair.nbytes
        return victims, freed

    def check_integrity(self, reserved: int, evictable: set[str]) -> None:
        """AssertionError unless the count is right, and exactly `evictable` may be dropped."""
        pairs = {p.pair.digest: p.pair.nbytes for p in self._copies.values() if p.pair is not None}
        assert self.used == reserved + sum(p.nbytes for p in self._copies.values()) + sum(pairs.values())
        assert evictable == set(self._evictable), "evictable copies differ from those that no request waits for"
