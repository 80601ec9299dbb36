"""Real ranks over gloo that outlive a test: processes start once, and each test sends them a function."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZES = (1, 2, 4)
# The server that ranks are forked from imports these once, instead of each rank.
_PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "peft", "loray.train.model"]


class Ranks:
    """Four processes; groups of the first 1, 2 and 4 of them."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(max(SIZES)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def __call__(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(group, *args)` on the first `size` ranks, a module's function → results in the order of ranks."""
        connections = self._connections[:size]
        for connection in connections:
            connection.send_bytes(pickle.dumps((size, function, args)))
        results = []
        for rank, connection in enumerate(connections):
            if not connection.poll(120):
                self.stop()
                raise TimeoutError(f"rank {rank} of {size} does not answer")
            succeeded, result = pickle.loads(connection.recv_bytes())
            results.append((rank, succeeded, result))
        failures = [f"rank {rank}:\n{result}" for rank, succeeded, result in results if not succeeded]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [result for _, _, result in results]

    def stop(self) -> None:
        for connection in self._connections:
            connection.close()  # a rank that waits for a call sees this and ends
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank: int, store: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    from loray.train.sequence import SequenceGroup

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(SIZES), timeout=timeout)
    groups = {size: dist.new_group(range(size), timeout=timeout) for size in SIZES}
    while True:
        try:
            size, function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        try:
            answer = True, function(SequenceGroup(groups[size], rank, size), *args)
        except Exception:  # noqa: BLE001 - whatever it is, the test shall see it
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
