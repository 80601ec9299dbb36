"""The workers of a job of several adapters, as the driver has them: shares are trained a few at a time, and one whose
worker is lost is started again.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.controller import is_lost
from jobs.events import Emit, first_line
from jobs.workers.many import EventSink, Judge, Rendezvous, Share, train_share
from jobs.workers.placement import worker_resources
from loray_kernels.memory import is_out_of_memory

_POLL_S = 0.5
_MAX_LOST = 3  # of one share


def start_sink(job: Path, files: Mapping[str, str], judge: Judge | None = None) -> ActorHandle:
    """Starts the actor of `EventSink` on this node, whose files it writes. It ends with this driver."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(EventSink)
    strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    started: ActorHandle = actor.options(scheduling_strategy=strategy).remote(str(job), dict(files), judge)
    return started


class Progress(NamedTuple):
    """A share that has ended, and why it failed; two times None: some time has passed."""

    share: str | None = None
    error: Exception | None = None


class Team:
    """Trains shares, at most `num_workers` at a time. `emit` is told of workers that were lost."""

    def __init__(self, num_workers: int, emit: Emit) -> None:
        self._num_workers, self._emit = num_workers, emit
        self._waiting: deque[tuple[str, Callable[[], Share]]] = deque()
        self._running: dict[str, tuple[Share, list[ObjectRef]]] = {}
        self._num_lost: dict[str, int] = {}
        self._store: Any = None  # torch's, in which the ranks of sequence groups meet

    def add(self, name: str, make: Callable[[], Share]) -> None:
        """Has a share be trained; `make` makes it when its turn has come."""
        self._waiting.append((name, make))

    def run(self) -> Iterator[Progress]:
        """Yields what has ended, and twice a second that nothing has."""
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._num_workers:
                name, make = self._waiting.popleft()
                share = make()
                self._running[name] = share, self._start(share)
            every = [ref for _, refs in self._running.values() for ref in refs]
            ray.wait(every, timeout=_POLL_S)
            for name in list(self._running):
                if (ended := self._look(name)) is not None:
                    yield ended
            yield Progress()

    def kill(self) -> None:
        for _, refs in self._running.values():
            _cancel(refs)

    def _look(self, name: str) -> Progress | None:
        share, refs = self._running[name]
        done, running = ray.wait(refs, num_returns=len(refs), timeout=0)
        errors = [error for ref in done if (error := _error_of(ref)) is not None]
        if not errors:
            if running:
                return None
            del self._running[name]
            return Progress(name)
        _cancel(running)
        error = min(errors, key=is_lost)  # of ranks that lost a peer, that of the peer
        self._num_lost[name] = self._num_lost.get(name, 0) + 1
        if is_lost(error) and self._num_lost[name] <= _MAX_LOST:
            self._emit({"event": "worker_lost", "message": first_line(error)})
            self._running[name] = share, self._start(share)
            return None
        del self._running[name]
        return Progress(name, error)

    def _start(self, share: Share) -> list[ObjectRef]:
        """Starts a worker, or all ranks of a sequence group."""
        spec = share.specs[0]
        takes = worker_resources(spec, share.settings.training_group)
        worker: Any = ray.remote(max_retries=0, max_calls=1)(train_share).options(
            num_cpus=takes.pop("CPU", 0), num_gpus=takes.pop("GPU", 0), resources=takes
        )
        size = spec.parallel.sequence
        if size == 1:
            return [worker.remote(share)]
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = ray.util.get_node_ip_address()
        self._store = self._store or TCPStore(host, 0, is_master=True, wait_for_workers=False)
        meeting = Rendezvous(host, self._store.port, secrets.token_hex(8), 0, size)
        return [worker.remote(share._replace(group=meeting._replace(rank=rank))) for rank in range(size)]


def _error_of(ref: ObjectRef) -> Exception | None:
    try:
        ray.get(ref)
    except RayTaskError as e:
        cause: Exception = e.cause
        if is_out_of_memory(cause):
            return RuntimeError(f"out of memory: {first_line(cause)}; train fewer adapters at once")
        return cause
    except RayError as e:
        error: Exception = e
        return error
    return None


def _cancel(refs: list[ObjectRef]) -> None:
    for ref in refs:
        ray.cancel(ref, force=True)
