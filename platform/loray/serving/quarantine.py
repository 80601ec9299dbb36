"""Adapters that seem to kill replicas: which are suspected, and for how long they are refused.

An adapter is suspected if the replica that had a request for it died before any token of the adapter had come from
anywhere. If it was the only such adapter of that replica, it is refused at once, else from its second death on: of
several adapters that were loaded at the same time, most are innocent. Later it is tried with one request at a time,
until a token comes or it is refused for twice as long.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from loray.errors import AdapterQuarantined

FIRST_S = 60.0
LONGEST_S = 3600.0
_KNOWN = 1 << 16  # digests and deaths that are remembered


class Quarantine:
    """One gateway's, used from one event loop. Times are seconds of one clock, which callers give."""

    def __init__(self) -> None:
        self._good: OrderedDict[str, None] = OrderedDict()  # digests of which tokens have come
        self._trying: dict[str, str] = {}  # request → digest that is not known to be good
        self._deaths: OrderedDict[str, set[str]] = OrderedDict()  # replica → digests that it had when it died
        self._strikes: dict[str, int] = {}
        self._until: dict[str, float] = {}

    def enter(self, request_id: str, digest: str, now: float) -> None:
        """A request for `digest` is about to be sent. Raises AdapterQuarantined where it must not be."""
        left_s = self._until.get(digest, now) - now
        if left_s > 0:
            raise AdapterQuarantined(
                f"the adapter {digest[:12]} is refused for {left_s:.0f} s: a replica died while it was loaded there; "
                "`loray adapters verify` checks what is stored, and another version may be served meanwhile",
                left_s,
            )
        if digest in self._until and digest in self._trying.values():
            raise AdapterQuarantined(
                f"the adapter {digest[:12]}, on which a replica died, is being tried again; send the request later", 1.0
            )
        if digest not in self._good:
            self._trying[request_id] = digest

    def leave(self, request_id: str) -> None:
        """The request has ended, whether well or not."""
        self._trying.pop(request_id, None)

    def answered(self, digest: str) -> None:
        """A token computed with the adapter has come."""
        self._good[digest] = None
        _forget(self._good)
        self._strikes.pop(digest, None)
        self._until.pop(digest, None)

    def died(self, request_id: str, replica: str, where: Callable[[str], str | None], now: float) -> None:
        """The replica died with this request. `where` gives the replica of another request."""
        digest = self._trying.get(request_id)
        if digest is None:
            return
        together = self._deaths.setdefault(replica, set())
        _forget(self._deaths)
        together |= {digest, *(d for request, d in self._trying.items() if where(request) == replica)}
        strikes = self._strikes[digest] = self._strikes.get(digest, 0) + 1
        if len(together) == 1 or strikes > 1:
            longer = 2.0 ** max(0, strikes - 1 - (len(together) > 1))
            self._until[digest] = now + min(LONGEST_S, FIRST_S * longer)

    @property
    def refused_until(self) -> Mapping[str, float]:
        """Digest → time from which it is tried again."""
        return self._until


def _forget(known: OrderedDict[str, set[str]] | OrderedDict[str, None]) -> None:
    while len(known) > _KNOWN:
        known.popitem(last=False)
