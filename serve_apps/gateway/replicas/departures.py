"""Replicas that Serve has removed and that still have requests of this gateway."""

from __future__ import annotations

from collections.abc import Collection


class Departures:
    """Serve tells routers at once that a replica is removed, by an update or by scaling, and the replica nothing: it
    takes no new requests and ends when it has none.
    """

    def __init__(self, grace_s: float) -> None:
        """`grace_s`: seconds for its requests to end by themselves."""
        self._grace_s = grace_s
        self._since: dict[str, float] = {}

    def due(self, busy: Collection[str | None], running: Collection[str], now: float) -> frozenset[str]:
        """Those of `busy`, which have requests, whose requests go elsewhere now; none while no replica is `running`.

        `now`: seconds of one clock.
        """
        gone = {name for name in busy if name is not None and name not in running}
        self._since = {name: self._since.get(name, now) for name in gone}
        if not running:
            return frozenset()
        return frozenset(name for name, since in self._since.items() if now - since >= self._grace_s)
