"""What a gateway remembers of the demand for a base's adapters, and notes in the cluster for replicas that start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from loray.serving.adapter_demand import AdapterDemand, DemandMemory, DemandRecord
from loray.spec import AdapterRef
from serve_apps.gateway.replicas import router

_LOOK_S = 1.0
_WRITE_S = 5.0  # between two notes, unless the replicas change or a request waits for the first one


class Records(Protocol):
    """`serve_apps.scaling.demand_records.DemandRecords`."""

    def write(self, gateway: str, record: DemandRecord) -> None: ...


class DemandNotes:
    """Of one base at the gateway `name`. Used from one event loop."""

    def __init__(self, records: Records, name: str, deployment: str) -> None:
        self._records, self._name, self._deployment = records, name, deployment
        self._memory = DemandMemory()
        self._has_news = False
        self._written_at = float("-inf")
        self._replicas: frozenset[str] = frozenset()  # as written last

    def came(self, ref: AdapterRef) -> None:
        """A request for an adapter came."""
        self._memory.came(ref, time.time())
        self._has_news = True

    async def run(self) -> None:
        """Writes until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Writes if there is something to be written now."""
        now, replicas = time.monotonic(), router.replicas(self._deployment)
        is_due = self._has_news and (now - self._written_at >= _WRITE_S or not replicas)
        if not is_due and replicas == self._replicas:
            return
        self._has_news, self._written_at, self._replicas = False, now, replicas
        if most := self._memory.most(time.time()):
            await asyncio.to_thread(self._write, most, replicas)

    def _write(self, most: Sequence[AdapterDemand], replicas: frozenset[str]) -> None:
        known = tuple(d._replace(holders=router.holders(self._deployment, d.ref.digest)) for d in most)
        self._records.write(self._name, DemandRecord(time.time(), tuple(sorted(replicas)), known))
