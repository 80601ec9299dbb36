"""The faults, each with its end, and what a client may see of it at most."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from loray.local.processes import kill, start_time
from tests.faults.spy import MOVED
from tests.faults.world import GATEWAY_TITLE, PARALLEL, REPLICA_TITLE, World, until

NUM_REPLICAS, NUM_GATEWAYS = 3, 2
LOAD_TIMEOUT_S = 10.0
_TRIES_S = 30.0  # for which a gateway looks for another replica, or waits for a new one
_SILENT_S = 25.0  # after which a connection on which nothing comes is given up
_START_S = 90.0  # of a replaced process, beside all others on a small machine
_SLOW_S = 0.3
_FULL_BYTES = 1 << 20
_RANK_TITLE, _CONTROLLER_TITLE = "ray::RankActor", "ray::ServeController"
_MOST_FIRST, _BOTH = (13, 3), (10, 6)  # a replica has eight slots
Mend = Callable[[], None]
Pids = Callable[[World], list[int]]


class Fault(NamedTuple):
    """`strike` returns what mends it, after `hold_s`.

    limit_s  no client waits longer for a token, or for a refusal
    cuts     connections of clients may end, because their gateway does
    loses    it takes a replica, whose answers go on at another one
    streams  so many long ones have begun when it strikes: of the first application, and of the one with two ranks
    """

    name: str
    strike: Callable[[World], Mend]
    hold_s: float
    limit_s: float
    cuts: bool = False
    loses: bool = False
    streams: tuple[int, int] = (0, 0)


def _titled(title: str) -> Pids:
    return lambda world: world.pids(title)


def _proxies(world: World) -> list[int]:
    """HAProxy's own processes: children of the one that its script has started."""
    return [pid for pid in world.titles() if _executable(pid) == "haproxy"]


def _executable(pid: int) -> str:
    with suppress(OSError):
        return Path(os.readlink(f"/proc/{pid}/exe")).name
    return ""


def is_running(pid: int) -> bool:
    return start_time(pid) is not None


def _killed(which: Pids, most: int | None = None) -> Callable[[World], Mend]:
    """A process that the cluster replaces. `most`: so many run, except that old ones end their connections."""

    def strike(world: World) -> Mend:
        before = which(world)
        victim = world.chance.choice(before)
        os.kill(victim, signal.SIGKILL)

        def replaced() -> bool:
            return not is_running(victim) and len(which(world)) >= min(len(before), most or len(before))

        return lambda: until(replaced, "a killed process is replaced", _START_S)

    return strike


def _stopped(which: Pids) -> Callable[[World], Mend]:
    """SIGSTOP to the process and its children, and SIGCONT in the end."""

    def strike(world: World) -> Mend:
        victim = world.chance.choice(which(world))
        family = [victim, *(child.pid for child in psutil.Process(victim).children(recursive=True))]
        for pid in family:
            os.kill(pid, signal.SIGSTOP)

        def repair() -> None:
            for pid in family:
                kill(pid, signal.SIGCONT)

        return repair

    return strike


def _slow(wire: str) -> Callable[[World], Mend]:
    def strike(world: World) -> Mend:
        world.wires[wire].delay_s = _SLOW_S
        return lambda: setattr(world.wires[wire], "delay_s", 0.0)

    return strike


def _kill_database(world: World) -> Mend:
    world.postgres.kill()
    return world.postgres.start


def _kill_store(world: World) -> Mend:
    world.s3.kill()
    return world.s3.start


def _lose_node(world: World) -> Mend:
    world.node.kill()
    return world.node.start


def lose_gcs(world: World) -> Mend:
    """The cluster's tables are in Redis; what supervises a head starts its server again with the same arguments.

    `ray start --block` would end all other processes of the head, so it stays stopped until the end of the run. Ray's
    dashboard, which would end too, is stopped until the server listens again: otherwise it asks for the server without
    a pause, and takes both cores from gateways and replicas, which Ray starts at niceness 15.
    """
    pid = world.gcs.pid if world.gcs else next(p for p in world.titles() if _executable(p) == "gcs_server")
    process = psutil.Process(pid)
    command, env, folder = process.cmdline(), process.environ(), process.cwd()
    os.kill(world.local.pid, signal.SIGSTOP)
    dashboard = world.pids("ray-dashboard-")
    for part in dashboard:
        os.kill(part, signal.SIGSTOP)
    process.kill()

    def start() -> None:
        try:
            with (world.folder / "gcs.log").open("ab") as log:
                world.gcs = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
            until(lambda: _listens(world.local.gcs_address), "the GCS listens", _START_S)
        finally:
            for part in dashboard:
                kill(part, signal.SIGCONT)

    until(lambda: not is_running(pid), "the GCS has ended", 10)
    return start


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def _fill_disk(world: World) -> Mend:
    """The home, up to the last byte."""
    file = world.settings.home / "full"
    with file.open("wb") as out, suppress(OSError):
        while True:
            out.write(bytes(_FULL_BYTES))
            out.flush()
    assert shutil.disk_usage(world.settings.home).free < 1 << 16
    return lambda: file.unlink()


def _jump(seconds: float) -> Callable[[World], Mend]:
    """Until the driver that has moved the clocks is told to set them right."""

    def strike(world: World) -> Mend:
        driver = world.driver("jump", str(seconds))
        assert driver.stdout is not None
        if driver.stdout.readline().strip() != MOVED:
            raise AssertionError(f"the clocks were not moved: {driver.communicate()[1][-3000:]}")

        def back() -> None:
            _, said = driver.communicate("\n", timeout=_START_S)
            assert driver.returncode == 0, said[-3000:]

        return back

    return strike


_REPLICAS, _GATEWAYS, _CONTROLLER = map(_titled, (REPLICA_TITLE, GATEWAY_TITLE, _CONTROLLER_TITLE))
_STORE_S = LOAD_TIMEOUT_S + _TRIES_S


def _database(world: World) -> list[int]:
    return [world.postgres.pid]


def _store(world: World) -> list[int]:
    return [world.s3.pid]


FAULTS = (
    Fault("replica, kill -9", _killed(_REPLICAS), 0, _TRIES_S, loses=True, streams=_MOST_FIRST),
    Fault("replica, stopped for 10 s", _stopped(_REPLICAS), 10, 10 + _TRIES_S, streams=_MOST_FIRST),
    Fault("rank of two, kill -9", _killed(_titled(_RANK_TITLE)), 0, _START_S, loses=True, streams=_BOTH),
    Fault("gateway, kill -9", _killed(_GATEWAYS), 0, _TRIES_S, cuts=True, streams=_MOST_FIRST),
    Fault("gateway, stopped for 10 s", _stopped(_GATEWAYS), 10, 10 + _TRIES_S),
    Fault("HAProxy, kill -9", _killed(_proxies, most=1), 0, _TRIES_S, cuts=True),
    Fault("Serve's controller, kill -9", _killed(_CONTROLLER), 0, _TRIES_S),
    Fault("Serve's controller, stopped for 10 s", _stopped(_CONTROLLER), 10, _TRIES_S),
    Fault("a node with a replica, kill -9", _lose_node, 5, _SILENT_S + _TRIES_S, True, True, _MOST_FIRST),
    Fault("Ray's GCS, kill -9, back after 5 s", lose_gcs, 5, _TRIES_S),
    Fault("database, kill -9, back after 8 s", _kill_database, 8, _TRIES_S),
    Fault("database, stopped for 10 s", _stopped(_database), 10, _TRIES_S),
    Fault(f"database, {_SLOW_S:g} s a packet", _slow("database"), 10, _TRIES_S),
    Fault("S3, kill -9, back after 8 s", _kill_store, 8, _STORE_S),
    Fault("S3, stopped for 10 s", _stopped(_store), 10, _STORE_S),
    Fault(f"S3, {_SLOW_S:g} s a packet", _slow("store"), 10, _STORE_S),
    Fault("the clock goes forward an hour", _jump(3600), 5, _TRIES_S),
    Fault("the clock goes back an hour", _jump(-3600), 5, _TRIES_S),
)
FULL_DISK = Fault("a full disk", _fill_disk, 10, _TRIES_S)  # where the home may be filled without harm to others


@contextmanager
def struck(fault: Fault, world: World) -> Iterator[Mend]:
    """Strikes; yields what mends it, which is called in any case."""
    mends = [fault.strike(world)]

    def repair() -> None:
        while mends:
            mends.pop()()

    try:
        yield repair
    finally:
        repair()


def missing(world: World) -> str:
    """Which processes do not run that ran before the first fault, in words; empty: none."""
    world.node.keep()
    titles = list(world.titles().values())
    wanted = {
        "replicas": (REPLICA_TITLE, NUM_REPLICAS),
        "gateways": (GATEWAY_TITLE, NUM_GATEWAYS),
        "ranks": (_RANK_TITLE, 1),
        PARALLEL: (f"ray::ServeReplica:{PARALLEL}", 2),
        "controllers": (_CONTROLLER_TITLE, 1),
    }
    found = {name: (sum(t.startswith(title) for t in titles), n) for name, (title, n) in wanted.items()}
    return ", ".join(f"{n} of {of} {name}" for name, (n, of) in found.items() if n != of)
