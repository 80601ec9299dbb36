"""Real processes with a gloo group, forked from one server that has torch and transformers loaded already."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

_PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "peft", "loray.train.loop", "deepspeed"]


def run_ranks(target: Callable[..., None], size: int, folder: Path, *args: Any) -> None:
    """`target(rank, *args)` on `size` ranks of one thread; `folder` is for their rendezvous. Raises what one raises."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}  # which the server takes over
    multiprocessing.set_forkserver_preload(_PRELOADED)
    mp.start_processes(  # type: ignore[no-untyped-call]
        _rank, args=(target, size, folder / "rendezvous", args), nprocs=size, start_method="forkserver"
    )


def _rank(rank: int, target: Callable[..., None], size: int, rendezvous: Path, args: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    target(rank, *args)
    torch.distributed.destroy_process_group()
