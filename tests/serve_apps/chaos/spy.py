"""Runs inside a server's process: what of requests it still holds. Needs nothing that the process has not imported."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
_TASK = "_asyncio.Task"


def held(*, emptied: bool) -> dict[str, int]:
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
    tasks = [o for o in objects if _name(o) == _TASK and not o.done()]
    counts |= Counter(f"task {task.get_coro().__qualname__}" for task in tasks)
    pools = [o for o in objects if issubclass(type(o), ThreadPoolExecutor)]
    pooled = {t for pool in pools for t in pool._threads}  # bounded, and begun when they are needed
    own = [t.name for t in threading.enumerate() if t not in pooled]
    own = [re.sub(r"-\d+", "", name) for name in own]  # numbered in the order in which a process started them
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
