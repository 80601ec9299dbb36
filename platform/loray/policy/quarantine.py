"""Adapters on which replicas died are refused for a time.

An adapter is suspected if the replica that had a request for it died before any token of the adapter had come, or its
engine stopped in a step with the adapter. If it was the only such adapter of that replica, and no other replica has it,
it is refused at once, else from its second death on: of several adapters that were loaded at the same time, most are
innocent, and one that another replica has loaded is probably known to be good by gateways that this one has replaced.
Later it is tried with one request at a time, until a token comes or it is refused for twice as long.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from loray.errors import AdapterQuarantined

FIRST_S = 60.0
LONGEST_S = 3600.0
TRIAL_S = 60.0  # within which the one request that tries an adapter again has a token, or has failed
_KNOWN = 1 << 16  # digests and deaths that are remembered


class Death(NamedTuple):
    """A replica that died with a request for this adapter. `alone`: it had no other that was not known to be good, and
    no other replica has this one.
    """

    digest: str
    replica: str
    alone: bool

    def refused_s(self, deaths: int) -> float | None:
        """Return for how long the adapter is refused after so many deaths; None: it is only suspected."""
        if deaths == 1 and not self.alone:
            return None
        return min(LONGEST_S, FIRST_S * 2.0 ** max(0, deaths - 1 - (not self.alone)))


class Suspicion(NamedTuple):
    """`until`: when the adapter may be tried again; None: it is not refused. `replica`: the last that died."""

    deaths: int
    until: float | None
    replica: str = ""


class Quarantine:
    """One gateway's knowledge, used from one event loop. Times are seconds of one clock, which callers give."""

    def __init__(self) -> None:
        self._good: OrderedDict[str, None] = OrderedDict()  # digests of which tokens have come
        self._trying: dict[str, str] = {}  # request → digest that is not known to be good
        self._deaths: OrderedDict[str, set[str]] = OrderedDict()  # replica → digests that it had when it died
        self._suspects: dict[str, Suspicion] = {}

    def is_good(self, digest: str) -> bool:
        """Return whether tokens of it have come here, and nothing is known against it."""
        return digest in self._good

    def is_due(self, digest: str, now: float) -> bool:
        """Return whether it was refused, and may be tried again."""
        known = self._suspects.get(digest)
        return known is not None and known.until is not None and known.until <= now

    def enter(self, request_id: str, digest: str, now: float) -> None:
        """A request for `digest` is about to be sent. Raises AdapterQuarantined where it must not be."""
        until = self._suspects[digest].until if digest in self._suspects else None
        if until is not None and until > now:
            left_s = until - now
            raise AdapterQuarantined(
                f"the adapter {digest[:12]} is refused for {left_s:.0f} s: a replica died while it was loaded there; "
                "`loray adapters verify` checks what is stored, `loray adapters release` lifts this, and another "
                "version may be served meanwhile",
                left_s,
            )
        if until is not None and digest in self._trying.values():
            raise being_tried(digest)
        if digest not in self._good:
            self._trying[request_id] = digest

    def leave(self, request_id: str) -> None:
        """The request has ended, whether well or not."""
        self._trying.pop(request_id, None)

    def answered(self, digest: str) -> bool:
        """A token computed with the adapter has come. Returns whether it was suspected."""
        self._good[digest] = None
        _forget(self._good)
        return self._suspects.pop(digest, None) is not None

    def died(
        self,
        request_id: str,
        replica: str,
        where: Callable[[str], str | None],
        is_held: Callable[[str], bool],
        among: Collection[str] | None = None,
    ) -> Death | None:
        """Return the death of the replica with this request; None if its adapter is not the reason. `where` gives the
        replica of another request; `is_held` says whether another replica has the adapter. `among`: the adapters that
        can be the reason; None: all of the replica's.
        """
        digest = self._trying.get(request_id)
        if digest is None or (among is not None and digest not in among):
            return None
        together = self._deaths.setdefault(replica, set())
        _forget(self._deaths)
        there = {digest, *(d for request, d in self._trying.items() if where(request) == replica)}
        together |= there if among is None else there.intersection(among)
        return Death(digest, replica, len(together) == 1 and not is_held(digest))

    def count(self, death: Death, now: float) -> None:
        """Judges a death by what is known here alone. Every request that the replica had reports it."""
        before = self._suspects.get(death.digest, Suspicion(0, None))
        if before.replica == death.replica:
            return
        deaths = before.deaths + 1
        seconds = death.refused_s(deaths)
        self._suspects[death.digest] = Suspicion(deaths, None if seconds is None else now + seconds, death.replica)

    def learn(self, suspects: Mapping[str, Suspicion]) -> list[str]:
        """Take over what all gateways know now. Returns those refused after a single death of which tokens had come
        here: they are innocent.
        """
        innocent = [d for d, s in suspects.items() if s.deaths == 1 and s.until is not None and d in self._good]
        self._suspects = {digest: known for digest, known in suspects.items() if digest not in innocent}
        for digest, known in self._suspects.items():
            if known.deaths > 1:
                self._good.pop(digest, None)
        return innocent

    @property
    def suspects(self) -> Mapping[str, Suspicion]:
        return self._suspects


def being_tried(digest: str) -> AdapterQuarantined:
    return AdapterQuarantined(
        f"the adapter {digest[:12]}, on which a replica died, is being tried again; send the request later", 1.0
    )


def _forget(known: OrderedDict[str, set[str]] | OrderedDict[str, None]) -> None:
    while len(known) > _KNOWN:
        known.popitem(last=False)
