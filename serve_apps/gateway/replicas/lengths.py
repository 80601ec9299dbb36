"""How many requests each replica has, as its router knows it.

Serve says the length of a replica's queue with each request that the replica accepts. That is as of the acceptance:
what was sent meanwhile is not in it. And a request that has got its replica is sent a turn of the event loop later.
Both are counted here, so that requests that come at once do not all find the same replica idle.

The length known of a replica contains the requests that are under way to it: sent, and neither accepted nor refused.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable

_UNDER_WAY_S = 1.0  # after which a request that was sent is not waited for: it was cancelled, or its replica is silent


class QueueLengths:
    """Replicas by name, requests by any key. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._known: dict[str, int] = {}
        self._chosen: dict[Hashable, str] = {}  # by request: not sent yet
        self._num_chosen: Counter[str] = Counter()
        self._sent: dict[str, OrderedDict[Hashable, float]] = {}  # by replica: not accepted yet

    def of(self, replica: str) -> int:
        return self.known(replica) + self._num_chosen[replica]

    def known(self, replica: str) -> int:
        """Without those that are not sent yet."""
        return self._known.get(replica, 0)

    def chosen(self, request: Hashable, replica: str) -> None:
        """The request will be sent there, unless it is cancelled before: `leaves` or `withdrawn` follows."""
        self._chosen[request] = replica
        self._num_chosen[replica] += 1

    def leaves(self, request: Hashable) -> None:
        """It is sent now: `sent` follows for its replica."""
        replica = self.withdrawn(request)
        if replica is not None:
            self._sent.setdefault(replica, OrderedDict())[request] = self.now()

    def withdrawn(self, request: Hashable) -> str | None:
        """It will not be sent. Returns the replica that was chosen for it."""
        replica = self._chosen.pop(request, None)
        if replica is not None:
            self._num_chosen[replica] -= 1
        return replica

    def sent(self, replica: str) -> None:
        self._known[replica] = self.known(replica) + 1

    def heard(self, replica: str, length: int) -> None:
        """What the replica says with its answer to a request, of which `accepted` or `refused` follows."""
        self._known[replica] = length + self._num_sent(replica)

    def accepted(self, request: Hashable, replica: str) -> None:
        """The length that the replica said contains the request."""
        self._answered(request, replica)

    def refused(self, request: Hashable) -> None:
        """It is on no replica, and will be sent again. Nothing happens if it was not sent."""
        for replica in self._sent:
            self._answered(request, replica)

    def probed(self, replica: str, length: int) -> None:
        """What the replica says when it is asked. What is under way may be in it, and then counts twice at first."""
        self._known[replica] = length + self._num_sent(replica)

    def ended(self, replica: str) -> None:
        self._known[replica] = max(0, self.known(replica) - 1)

    def retain(self, replicas: Collection[str]) -> None:
        """Forgets what was sent to all others."""
        for numbers in (self._known, self._sent):
            for replica in [name for name in numbers if name not in replicas]:
                del numbers[replica]

    def _answered(self, request: Hashable, replica: str) -> None:
        under_way = self._sent.get(replica)
        if under_way is not None and under_way.pop(request, None) is not None:
            self.ended(replica)

    def _num_sent(self, replica: str) -> int:
        under_way = self._sent.get(replica, OrderedDict())
        while under_way and next(iter(under_way.values())) < self.now() - _UNDER_WAY_S:
            under_way.popitem(last=False)
        return len(under_way)
