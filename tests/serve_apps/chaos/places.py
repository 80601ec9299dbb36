"""The two servers of a random run: where they answer, which processes they have, what those hold, whom it may kill."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx

from loray.spec import engine_of
from serve_apps.deployment import GATEWAY, ServeApi
from tests.fixtures.cluster import RayCluster, Served
from tests.serve_apps.asking import eventually
from tests.serve_apps.chaos import spy

Held = dict[str, int]
_REPLACED_S = 120.0
ENGINE = engine_of("tiny")


class Place(Protocol):
    """`num_connections`: between gateways and replicas, as each process of them counts its own."""

    served: Served
    num_connections: int

    def held(self, *, emptied: bool) -> dict[str, Held]:
        """What each process holds, by its kind and pid."""

    def kill(self, rng: random.Random) -> int:
        """Ends one process of each kind that is replaced then, by SIGKILL. Returns how many."""

    def is_whole(self) -> bool:
        """Whether all processes run, those that were killed replaced."""

    def private_files(self) -> Counter[str]:
        """The files and sockets of this server alone, without the numbers in their names."""


@dataclass
class Alone:
    """`loray serve`. Its process answers signals, see `spy`."""

    served: Served
    pid: int
    file: Path
    num_connections: int = 0

    def held(self, *, emptied: bool) -> dict[str, Held]:
        self.file.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR2 if emptied else signal.SIGUSR1)
        assert eventually(self.file.exists, 60)
        found = json.loads(self.file.read_text())
        assert isinstance(found, dict), found
        return {f"serve {self.pid}": found}

    def kill(self, rng: random.Random) -> int:
        return 0

    def is_whole(self) -> bool:
        return True

    def private_files(self) -> Counter[str]:
        return _files(self.served.settings.home)


@dataclass
class Cluster:
    """An application on Ray Serve."""

    ray: RayCluster
    served: Served
    name: str
    num_connections: int = 2
    killed: set[int] = field(default_factory=set)

    def held(self, *, emptied: bool) -> dict[str, Held]:
        import ray

        ray.cloudpickle.register_pickle_by_value(spy)  # the replicas cannot import tests
        try:
            found = {}
            for kind in (GATEWAY, ENGINE):
                for name, pid in self._running(kind).items():
                    actor = ray.get_actor(f"SERVE_REPLICA::{self.name}#{kind}#{name}", namespace="serve")
                    ask = partial(_held, emptied=emptied and kind == ENGINE)
                    found[f"{kind} {pid}"] = ray.get(actor.__ray_call__.remote(ask), timeout=60)
            return found
        finally:
            ray.cloudpickle.unregister_pickle_by_value(spy)

    def kill(self, rng: random.Random) -> int:
        pids = [rng.choice(sorted(self._running(kind).values())) for kind in (GATEWAY, ENGINE)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.killed.update(pids)
        return len(pids)

    def is_whole(self) -> bool:
        """Also for the proxy, which has heard of new gateways when each has answered."""
        gateways, replicas = self._running(GATEWAY), self._running(ENGINE)
        if len(gateways) != 2 or len(replicas) != 2 or {*gateways.values(), *replicas.values()} & self.killed:
            return False
        try:
            return len(httpx.get(f"{self.served.url}/status", timeout=30).json()["replicas"]) == 2
        except (httpx.HTTPError, ValueError):
            return False

    def private_files(self) -> Counter[str]:
        return _files(Path(f"{self.ray.local.temp_dir}-http")) + _files(self.ray.home)

    def _running(self, kind: str) -> dict[str, int]:
        applications: dict[str, Any] = ServeApi(self.ray.address)._details()["applications"]
        replicas = applications[self.name]["deployments"][kind]["replicas"]
        return {r["replica_id"]: r["pid"] for r in replicas if r["state"] == "RUNNING"}


def _held(_: object, *, emptied: bool) -> Held:
    return spy.held(emptied=emptied)


def _files(folder: Path) -> Counter[str]:
    """Logs and what a catalog's database writes beside itself are no leftovers."""
    return Counter(
        re.sub(r"[0-9a-f]{8,}|[0-9]+", "*", str(p.relative_to(folder)))
        for p in folder.rglob("*")
        if not p.is_dir() and not p.name.endswith((".log", ".err", ".out", "-wal", "-shm", "-journal"))
    )


def wait_until_whole(place: Place) -> None:
    deadline = time.monotonic() + _REPLACED_S
    while not place.is_whole():
        assert time.monotonic() < deadline, "a killed process was not replaced"
        time.sleep(0.3)
