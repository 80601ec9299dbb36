"""How many threads a process on a node computes with."""

from __future__ import annotations

import os
from pathlib import Path

import ray


def num_threads(num_workers: int) -> int:
    """OMP_NUM_THREADS of the node's environment if it is set, else this node's cores divided by `num_workers` on it.

    If it is not set, Ray sets it later to the number of CPUs that a worker reserves. A worker reserves one CPU, so that
    training also starts on a node whose other CPUs a replica has reserved.
    """
    preset = preset_threads(Path("/proc/self/environ").read_bytes())
    if preset is not None:
        return preset
    node = next(n for n in ray.nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id())
    cores = min(int(node["Resources"].get("CPU", 1)), len(os.sched_getaffinity(0)))
    return max(1, cores // num_workers)


def preset_threads(environ: bytes) -> int | None:
    """OMP_NUM_THREADS in the environment that a process was started with: NAME=value, each followed by a NUL byte."""
    variables = dict(entry.partition(b"=")[::2] for entry in environ.split(b"\0"))
    value = variables.get(b"OMP_NUM_THREADS", b"").partition(b",")[0]  # a list is for nested parallelism
    return int(value) if value.isdigit() and int(value) > 0 else None
