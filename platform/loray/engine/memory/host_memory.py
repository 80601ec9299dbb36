"""`HostMemory` counts the adapters and the blocks of prefixes in host memory, and says which are dropped.

Packed rows count with what page-locked memory takes beside them, each VeRA pair once, however many adapters share it,
and loads that have started with the adapter's published size.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

from loray.engine.memory.eviction import Inflation, PriorityQueue


class HostProjection(Protocol):
    """A VeRA pair."""

    @property
    def digest(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


class HostCopy(Protocol):
    """An adapter in host memory, ready to be copied into the pool."""

    @property
    def nbytes(self) -> int:
        """Bytes of its rows, without the pair."""
        ...

    @property
    def host_bytes(self) -> int:
        """Bytes that they take here: page-locked memory may be more."""
        ...

    @property
    def pair(self) -> HostProjection | None: ...


P = TypeVar("P", bound=HostCopy)


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A copy of a prefix's block of keys and values. `owners`: digests of the adapters on which they depend, None for
    the base.
    """

    values: Any
    host_bytes: int
    owners: frozenset[str | None]
    pair: None = None


class HostMemory(Generic[P]):
    """Owns the count, and the order in which copies are dropped: first those for which no request waits, the lowest
    value first; then, for a load, those for which only requests wait that came later, the latest first.

    The value is that of `eviction`, with an inflation of its own and by bytes: a block that is computed again in a
    millisecond makes way for an adapter that is loaded again in a hundred, unless it is used much more often. Of equal
    values the one that was used longest ago goes first.

    Adapters are named by digest, blocks as in `policy.prefixes`. Looking for copies to drop visits all of them if they
    do not suffice: then it is not tried again before they may.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0
        self._reserved = 0
        self._inflation = Inflation()
        self._copies: dict[str, P | BlockCopy] = {}
        self._values: dict[str, tuple[float, int]] = {}  # and the number of blocks before it, negative
        self._sharers: Counter[str] = Counter()  # of each pair
        self._removable: dict[str, float] = {}  # when the first request came that waits; infinite without one
        self._evictable: PriorityQueue[str] = PriorityQueue()  # the infinite ones, by value
        self._needed: list[tuple[float, str]] = []  # the others, sorted
        # Of the last load that did not fit: when its first request came, and at least the bytes that may be dropped for
        # it less those that are used.
        self._blocked: tuple[str, float] = ("", math.inf)
        self._slack = 0

    def reserve(self, nbytes: int) -> None:
        """A load starts, or a copy of blocks."""
        self._reserved += nbytes
        self._use(nbytes)

    def end_reservation(self, nbytes: int) -> None:
        """The load, or the copy of blocks, has a result or has failed."""
        self._reserved -= nbytes
        self._use(-nbytes)

    def block(self, name: str) -> BlockCopy | None:
        """Find the copy of a block."""
        found = self._copies.get(name)
        return found if isinstance(found, BlockCopy) else None

    def add_block(self, name: str, block: BlockCopy, worth: float, before: str) -> None:
        """Add what `touch` will keep; it may be dropped from now on."""
        self.add(name, block)
        self.touch(name, worth, before)
        self.set_removable(name, math.inf)

    def would_keep(self, worths: Iterable[float], nbytes: int) -> list[bool]:
        """Say which copies of blocks, each of `nbytes`, are to be made: those that find room in what is free or in the
        place of copies of a lower value. The others are as good as evicted. `worths`: as in `touch`.
        """
        free, inflation, found = self._limit - self.used, self._inflation.value, list[bool]()
        with closing(self._evictable.ascending()) as evictable:
            least = next(evictable, None)
            for worth in worths:
                value = inflation + worth / max(1, nbytes)
                while free < nbytes and least is not None and self._values[least][0] <= value:
                    free += self._copies[least].host_bytes
                    least = next(evictable, None)
                found.append(free >= nbytes)
                if found[-1]:
                    free -= nbytes
                else:
                    self._inflation.evicted(value)
        return found

    def forget_blocks(self, owner: str | None) -> None:
        """Drop the blocks that depend on an adapter, or on the base. O(n)."""
        for name in [n for n, copy in self._copies.items() if isinstance(copy, BlockCopy) and owner in copy.owners]:
            self.drop(name)

    def add(self, digest: str, packed: P | BlockCopy) -> None:
        self._copies[digest] = packed
        self._values[digest] = (self._inflation.value, 0)
        self._use(packed.host_bytes)
        if packed.pair is not None:
            self._sharers[packed.pair.digest] += 1
            if self._sharers[packed.pair.digest] == 1:
                self._use(packed.pair.nbytes)

    def drop(self, digest: str) -> None:
        self.set_removable(digest, None)
        packed = self._copies.pop(digest)
        del self._values[digest]
        self._use(-packed.host_bytes)
        if packed.pair is not None:
            self._sharers[packed.pair.digest] -= 1
            if not self._sharers[packed.pair.digest]:
                del self._sharers[packed.pair.digest]
                self._use(-packed.pair.nbytes)

    def set_removable(self, digest: str, came: float | None) -> None:
        """`came`: when the first request came that waits for the copy, infinite without one. None: it may not be
        dropped.
        """
        before = self._removable.pop(digest, None)
        if came is not None:
            self._removable[digest] = came
        if came == before:
            return
        if before is not None:
            if math.isinf(before):
                self._evictable.discard(digest)
            else:
                del self._needed[bisect_left(self._needed, (before, digest))]
            if before > self._blocked[1]:
                self._slack -= self._copies[digest].host_bytes
        if came is not None:
            if math.isinf(came):
                self._evictable.set(digest, self._values[digest])
            else:
                insort(self._needed, (came, digest))
            if came > self._blocked[1]:
                packed = self._copies[digest]
                self._slack += packed.host_bytes + (0 if packed.pair is None else packed.pair.nbytes)

    def touch(self, digest: str, worth: float, before: str | None = None) -> None:
        """The copy, if there is one, was used.

        worth   seconds to have it again, for the uses that are expected
        before  the name of the block before a block, which is dropped later than it: alone a block is of no use
        """
        copy = self._copies.get(digest)
        if copy is None:
            return
        value, depth = self._inflation.value + worth / max(1, copy.host_bytes), 0
        if before is not None:
            most, depth = self._values.get(before, (value, 0))
            value, depth = min(value, most), depth - 1
        self._values[digest] = (value, depth)
        if digest in self._evictable:
            self._evictable.set(digest, (value, depth))

    def surplus(self) -> list[str]:
        """Return copies to drop for which no request waits, because the limit is exceeded; it may still be
        afterwards.
        """
        if self.used <= self._limit:
            return []
        with closing(self._evictable.ascending()) as evictable:
            victims, _ = self._victims(self.used - self._limit, evictable)
        return self._evicted(victims)

    def room_for(self, digest: str, nbytes: int, came: float) -> list[str] | None:
        """Return copies to drop so that a load of `nbytes` fits, whose first request came at `came`.

        None if that does not free enough; but one adapter alone always fits, whatever its size.
        """
        excess = self.used + nbytes - self._limit
        if self._blocked[0] == digest and self._slack + self.used < min(self.used, excess):
            return None
        if excess <= 0:
            return []
        with closing(self._evictable.ascending()) as evictable:
            victims, freed = self._victims(excess, chain(evictable, self._needed_after(came)))
        if freed >= min(self.used, excess):
            return self._evicted(victims)
        self._blocked, self._slack = (digest, came), freed - self.used
        return None

    def _evicted(self, victims: list[str]) -> list[str]:
        for digest in victims:
            if math.isinf(self._removable[digest]):
                self._inflation.evicted(self._values[digest][0])
        return victims

    def _use(self, nbytes: int) -> None:
        self.used += nbytes
        self._slack -= nbytes

    def _needed_after(self, came: float) -> Iterator[str]:
        """The latest first."""
        for first_came, digest in reversed(self._needed):
            if first_came <= came:
                return
            yield digest

    def _victims(self, excess: int, candidates: Iterable[str]) -> tuple[list[str], int]:
        """Copies whose removal frees `excess` bytes, or all of them; and how many bytes they free."""
        victims: list[str] = []
        freed = 0
        sharers: Counter[str] = Counter()
        for digest in candidates:
            if freed >= excess:
                break
            packed = self._copies[digest]
            victims.append(digest)
            freed += packed.host_bytes
            if packed.pair is not None:
                sharers[packed.pair.digest] += 1
                if sharers[packed.pair.digest] == self._sharers[packed.pair.digest]:
                    freed += packed.pair.nbytes
        return victims, freed

    def check_integrity(self, reserved: int, removable: Mapping[str, float | None]) -> None:
        """Raise AssertionError unless the count is right, and beside blocks exactly the copies of `removable` are here
        and may be dropped, see `set_removable`. `reserved`: for loads.
        """
        removable = {**removable, **{name: math.inf for name in self._copies if self.block(name) is not None}}
        pairs = {p.pair.digest: p.pair.nbytes for p in self._copies.values() if p.pair is not None}
        assert reserved <= self._reserved
        copied = sum(p.host_bytes for p in self._copies.values())
        assert self.used == self._reserved + copied + sum(pairs.values())
        assert self._values.keys() == self._copies.keys()
        assert removable.keys() == self._copies.keys()
        known = {digest: came for digest, came in removable.items() if came is not None}
        assert known == self._removable, "removable copies differ from those that no request waits for, or a later one"
        assert set(self._evictable) == {digest for digest, came in known.items() if math.isinf(came)}
        assert self._needed == sorted((came, digest) for digest, came in known.items() if not math.isinf(came))
        slack = (
            sum(self._copies[digest].host_bytes for digest, came in known.items() if came > self._blocked[1])
            - self.used
        )
        assert not self._blocked[0] or self._slack >= slack, "a load that fits would not be tried"
