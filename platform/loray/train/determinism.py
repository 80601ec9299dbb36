"""What decides whether a run gives the same bits again: the seeds of its steps, and the kernels that torch takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from these arguments alone, so that a resumed run draws the same numbers."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Where `enabled`, torch's deterministic algorithms inside the block; an operation without one raises RuntimeError.

    On a GPU enter it before the first product: cuBLAS reads its setting once.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing here reads memory before it is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled
