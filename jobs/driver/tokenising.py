"""Tokenising on a cluster: a Ray task for each part of the data, a few at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayTaskError

from jobs.events import Stages
from jobs.workers.placement import worker_resources
from loray.spec import TrainingGroup, TrainSpec
from loray.telemetry import get_logger
from loray.train.data.corpus import Task, run_here
from loray.train.data.read import BadRow, Content, FilePart, located
from loray.train.data.shards import FolderCache
from loray.train.data.tokenize import Tokenisation

log = get_logger(__name__)

_MOST_AT_ONCE = 64  # parts in the object store: half a gigabyte
_STAGE = "tokenising"


class RayTasks:
    """A Runner whose tasks take what a worker of the run takes, but for its GPU.

    A single part is tokenised here, which takes less time than a task needs to start. `connect` connects to Ray, if
    that has not been done, and is called when there are more. `stages` is told how many parts are done.
    """

    def __init__(
        self, spec: TrainSpec, group: TrainingGroup | None, connect: Callable[[], None], stages: Stages
    ) -> None:
        self._spec, self._group, self._connect, self._stages = spec, group, connect, stages

    def __call__(self, tokenisation: Tokenisation, cache: FolderCache, tasks: Iterator[Task], num_tasks: int) -> None:
        if num_tasks == 1:
            self._stages(_STAGE)
            run_here(tokenisation, cache, tasks, num_tasks)
            return
        self._stages(_STAGE, 0, num_tasks)
        self._connect()
        log.info("tokenising %d parts of the data, which stay in the cache", num_tasks)
        takes = worker_resources(self._spec, self._group)
        takes.pop("GPU", None)
        remote: Any = ray.remote(_tokenise).options(num_cpus=takes.pop("CPU", 0), resources=takes)
        shared = ray.put((tokenisation, cache))
        most = min(int(ray.cluster_resources().get("CPU", 1)) + 1, _MOST_AT_ONCE)
        running: deque[tuple[FilePart, ObjectRef]] = deque()
        num_done = 0

        def finish() -> None:
            nonlocal num_done
            _finish(*running.popleft())
            num_done += 1
            self._stages(_STAGE, num_done, num_tasks)

        for task in tasks:
            if len(running) == most:
                finish()
            running.append((task.part, remote.remote([shared], task.key, task.content)))
        while running:
            finish()


def _finish(part: FilePart, reference: ObjectRef) -> None:
    try:
        bad: BadRow | None = ray.get(reference)
    except RayTaskError as e:
        raise e.cause from None
    if bad is not None:
        raise located(bad, part)


def _tokenise(shared: list[ObjectRef], key: str, content: Content) -> BadRow | None:
    """Runs as a task, with one thread. `shared` is a list so that Ray passes the reference, and a process reads the
    tokenizer once.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenisation, cache = _shared(shared[0])
    try:
        cache.put(key, tokenisation.shard(content))
    except BadRow as e:
        return e
    return None


@lru_cache(maxsize=1)
def _shared(reference: ObjectRef) -> tuple[Tokenisation, FolderCache]:
    found: tuple[Tokenisation, FolderCache] = ray.get(reference)
    return found
