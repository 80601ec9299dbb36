"""What a server's process still holds of requests, from inside it; and a driver that asks all processes of a cluster.

    python -m tests.faults.spy held [emptied]   what its gateways and replicas hold, and its actors and groups, as JSON
    python -m tests.faults.spy jump 3600        their clocks go by so many seconds, until standard input has a line

The driver is a process of its own, because a connection to the cluster does not outlive each fault. What runs in other
processes needs nothing that they have not imported.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

Held = dict[str, int]
MOVED = "moved"  # what the driver says that has moved the clocks
_OF_REQUESTS = {
    "serve_apps.channel.inbox.Inbox",
    "serve_apps.gateway.answers.answer.AnswerResponse",
    "serve_apps.gateway.answers.answer.ClientConnection",
    "serve_apps.gateway.replicas.engines.Call",
    "serve_apps.replica.requests._Ongoing",
    "loray.engine.request.Request",
    "loray.spec.generation.GenerateRequest",
}
_CONNECTIONS = {"serve_apps.channel.listener._Peer", "serve_apps.channel.connection.Connection"}
_ASK_S = 60


def held(*, emptied: bool) -> Held:
    """The number of objects of requests, of connections between gateways and replicas, of tasks, threads and files.

    `emptied`: of an engine, also the blocks that are not free once its caches and adapters have been thrown out, with
    its books compared before.
    """
    gc.unfreeze()
    gc.collect()
    objects = gc.get_objects()
    names = Counter(_name(o) for o in objects if _name(o) in _OF_REQUESTS | _CONNECTIONS)
    counts = {"requests": sum(names[n] for n in _OF_REQUESTS), "connections": sum(names[n] for n in _CONNECTIONS)}
    counts |= {name.rpartition(".")[2]: names[name] for name in sorted(_OF_REQUESTS) if names[name]}
    tasks = [o for o in objects if _name(o) == "_asyncio.Task" and not o.done()]
    counts |= Counter(f"task {task.get_coro().__qualname__}" for task in tasks)
    pools = [o for o in objects if issubclass(type(o), ThreadPoolExecutor)]
    pooled = {t for pool in pools for t in pool._threads}  # bounded, and begun when they are needed
    own = [re.sub(r"-\d+", "", t.name) for t in threading.enumerate() if t not in pooled]  # numbered as they started
    counts |= Counter(f"thread {name}" for name in own if name != "Dummy")  # those are gRPC's
    counts["files"] = len(os.listdir("/proc/self/fd"))
    if emptied:
        streams = [o for o in objects if _name(o) == "loray.engine.async_engine.AsyncEngine"]
        counts["blocks"] = sum(s.call(lambda engine=s._engine: _not_free(engine)).result(60) for s in streams)
    return counts


def _not_free(engine: Any) -> int:
    engine.check_integrity()
    num_blocks: int = engine.pool.geometry.num_blocks
    engine.scheduler.prefix_cache.evict(num_blocks)
    while engine.adapter_manager.evict_one():
        pass
    engine.check_integrity()
    free: int = engine.pool.allocator.num_free
    return num_blocks - free


def _name(thing: object) -> str:
    cls = type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"


def answer_signals(file: Path) -> None:
    """SIGUSR1 writes `held` into the file, SIGUSR2 with the engine emptied. Called in the main thread."""

    def write(number: int, _: object) -> None:
        try:
            found: object = held(emptied=number == signal.SIGUSR2)
        except Exception as e:  # noqa: BLE001 - the test shows it
            found = repr(e)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.rename(file)

    signal.signal(signal.SIGUSR1, write)
    signal.signal(signal.SIGUSR2, write)


def of_replica(_: object, *, emptied: bool) -> Held:
    return held(emptied=emptied)


def _jump(_: object, *, seconds: float) -> int:
    real = getattr(time, "_chaos_real", time.time)
    time._chaos_real = real  # type: ignore[attr-defined]
    time.time = (lambda: real() + seconds) if seconds else real
    return 0


def each(applications: Iterable[str], ask: Callable[[str], Callable[..., Any]]) -> dict[str, Any]:
    """What the processes of these applications of Serve answer, by application, deployment and name. `ask` is given
    the deployment, and returns what runs in its processes.
    """
    import ray

    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        application, _, rest = actor["name"].partition("SERVE_REPLICA::")[2].partition("#")
        if application in applications:
            deployment, _, name = rest.rpartition("#")
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            asked = handle.__ray_call__.remote(ask(deployment))
            found[f"{application} {deployment} {name}"] = ray.get(asked, timeout=_ASK_S)
    return found


def of_cluster(applications: Iterable[str], *, emptied: bool) -> dict[str, Held]:
    """By process: see `held`; and the number of actors of each class, and of placement groups."""
    from ray.util import placement_group_table
    from ray.util.state import list_actors

    actors = Counter(actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")], limit=1000))
    groups = sum(group["state"] != "REMOVED" for group in placement_group_table().values())
    found = each(applications, lambda kind: partial(of_replica, emptied=emptied and kind.startswith("engine")))
    return found | {"cluster": dict(actors) | {"placement groups": groups}}


def main() -> None:
    """Functions of `__main__` are sent to other processes by value, which cannot import tests."""
    import ray

    from tests.faults.world import APPLICATIONS

    ray.init(log_to_driver=False, logging_level="ERROR")
    if sys.argv[1] == "jump":
        each(APPLICATIONS, lambda _: partial(_jump, seconds=float(sys.argv[2])))
        sys.stdout.write(f"{MOVED}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        each(APPLICATIONS, lambda _: partial(_jump, seconds=0.0))
    else:
        sys.stdout.write(json.dumps(of_cluster(APPLICATIONS, emptied="emptied" in sys.argv)) + "\n")


if __name__ == "__main__":
    main()
