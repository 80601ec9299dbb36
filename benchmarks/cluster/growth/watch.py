"""The course of each base's replicas, from GET /status once a second."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx

from loray.errors import LorayError
from loray.schemas.status import BaseStatus, ReplicaStatus, Status

_PERIOD_S = 1.0
_MIB = 1 << 20
_WORKING_SET = re.compile(r"working set ([\d.]+) MiB of (\d+) adapters")


class Look(NamedTuple):
    """Of one base. `at`: seconds of time.perf_counter().

    target        replicas that its autoscaler wants
    replicas      those that answer
    num_adapters  in demand, as its autoscaler says; `pools`: how many pools they fill. NaN where it says nothing
    asked         requests so far for an adapter, at all its replicas; `outside`: those that did not find it in the pool
    """

    at: float
    target: int
    replicas: frozenset[str]
    num_adapters: float
    pools: float
    asked: int
    outside: int


class Change(NamedTuple):
    """Of the number of replicas that is wanted. `at`: seconds of time.perf_counter()."""

    at: float
    before: int
    after: int
    reason: str


class Watch:
    """Looks while `running`. A look that gets no answer is left out, and counted."""

    def __init__(self, url: str) -> None:
        self.looks: dict[str, list[Look]] = {}
        self.num_lost = 0
        self._url = url
        self._changes: dict[str, dict[float, Change]] = {}
        self._counts: dict[str, tuple[str, int, int]] = {}  # replica → base and its last counts
        self._ends = threading.Event()

    def changes(self, base: str) -> list[Change]:
        return [change for _, change in sorted(self._changes.get(base, {}).items())]

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="watch")
        thread.start()
        try:
            yield
        finally:
            self._ends.set()
            thread.join()

    def take(self, status: Status, at: float, epoch: float) -> None:
        """`epoch`: seconds between the epoch and time.perf_counter()'s zero."""
        for replica in status.replicas:
            missed = replica.num_host_hits + replica.num_misses
            self._counts[replica.replica] = (replica.base, replica.num_pool_hits + missed, missed)
        for base in status.bases:
            own = [replica for replica in status.replicas if replica.base == base.base]
            self.looks.setdefault(base.base, []).append(self._look(base, own, at))
            for told in base.autoscaling.decisions if base.autoscaling else ():
                change = Change(told.time - epoch, told.from_replicas, told.to_replicas, told.reason)
                self._changes.setdefault(base.base, {})[told.time] = change

    def _look(self, base: BaseStatus, replicas: list[ReplicaStatus], at: float) -> Look:
        said = _WORKING_SET.search(base.autoscaling.reason) if base.autoscaling else None
        pool_bytes = base.spec.fixed_pool_bytes
        nothing = 0.0 if base.target == 0 else float("nan")
        counts = [(asked, missed) for name, asked, missed in self._counts.values() if name == base.base]
        return Look(
            at=at,
            target=base.target,
            replicas=frozenset(replica.replica for replica in replicas),
            num_adapters=float(said[2]) if said else nothing,
            pools=float(said[1]) * _MIB / pool_bytes if said and pool_bytes else nothing,
            asked=sum(asked for asked, _ in counts),
            outside=sum(missed for _, missed in counts),
        )

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=10) as http:
            while not self._ends.wait(_PERIOD_S):
                try:
                    status = Status.model_validate_json(http.get("/status").raise_for_status().content)
                except (httpx.HTTPError, LorayError, ValueError):
                    self.num_lost += 1
                    continue
                at = time.perf_counter()
                self.take(status, at, time.time() - at)
