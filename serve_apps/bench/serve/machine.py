"""The machine: what its memory and its arithmetic can do, what a process tree holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serving.floors import MachineRates

_SAMPLE_S = 0.25


def measure_rates(device: str, num_threads: int) -> MachineRates:
    """In a process of its own, so that nothing of torch stays behind in this one."""
    command = [sys.executable, "-m", "benchmarks.serving.machine", device]
    env = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return MachineRates(*json.loads(done.stdout))


def _rates(device: str) -> MachineRates:
    """Reading half a GB (4 GB of a GPU's), and a bf16 product of 2048³ (8192³): the best of several."""
    import torch

    on_gpu = device != "cpu"
    source = torch.ones((4 << 30 if on_gpu else 512 << 20) // 4, device=device)
    n = 8192 if on_gpu else 2048
    x, w = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))

    def seconds(run: Callable[[], object]) -> float:
        def once() -> float:
            began = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - began

        once()
        return min(once() for _ in range(7))

    read = seconds(source.sum)
    product = seconds(lambda: torch.nn.functional.linear(x, w))
    return MachineRates(source.nbytes / read, 2.0 * n**3 / product)


# -- memory -----------------------------------------------------------------------------------------------------------


def tree_pss(pid: int) -> int:
    """Bytes of the process and everything below it, shared pages counted once (proportional set size)."""
    total, todo = 0, [pid]
    while todo:
        process = todo.pop()
        try:
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                todo += map(int, children.read_text(encoding="utf-8").split())
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


class PeakMemory:
    """`nbytes`: the largest sum of PSS of the tree of `pid` that was seen; 0 where nobody looked."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self.nbytes = 0

    def sample(self) -> None:
        if self._pid is not None:
            self.nbytes = max(self.nbytes, tree_pss(self._pid))


@contextmanager
def watch_memory(pid: int | None) -> Iterator[PeakMemory]:
    """Samples the tree of `pid`, four times a second, until the block ends; later ones are the caller's."""
    peak, over = PeakMemory(pid), threading.Event()
    if pid is None:
        yield peak
        return

    def sample() -> None:
        while True:
            peak.sample()
            if over.wait(_SAMPLE_S):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_rates(sys.argv[1])))
