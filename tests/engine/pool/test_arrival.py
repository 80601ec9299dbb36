"""Which steps wait for rows that are on their way to the pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loray.engine.pool.pool import Pool
from loray_kernels import PageWriter
from loray_kernels.kv import DirectWriter
from tests.engine.adapters import TestAdapter
from tests.engine.pool.test_packed import LAYOUT, packer, weights


class Copies:
    """A page writer whose copies arrive when a test says so."""

    def __init__(self, pool: Tensor) -> None:
        self.direct, self.there, self.num_waits = DirectWriter(pool), 0, 0
        self._num = 0

    def write(self, *args: Any) -> None:
        self.direct.write(*args)

    def wait(self) -> None:
        self.num_waits += 1

    def arrival(self) -> Callable[[], bool]:
        self._num += 1
        own = self._num
        return lambda: self.there >= own


def test_a_step_waits_only_for_adapters_of_its_own_that_are_on_their_way(adapters: dict[str, TestAdapter]) -> None:
    made: list[Copies] = []

    def writer(pool: Tensor) -> PageWriter:
        made.append(Copies(pool))
        return made[-1]

    pool = Pool(LAYOUT, 40, dtype=torch.float32, device=torch.device("cpu"), page_writer=writer)
    (copies,) = made
    first, second, third = (
        pool.place(adapters["r2"].ref, packer().pack(weights(dict.fromkeys(range(4), 2), seed=i))) for i in range(3)
    )
    assert first is not None
    assert second is not None
    assert third is not None
    copies.there = 1
    assert [pool.copy_is_done(a) for a in (first, second)] == [True, False]
    pool.wait_for([first])
    assert copies.num_waits == 0
    pool.remove(third)  # its blocks will be another's: they wait for its copy
    assert copies.num_waits == 1
    assert pool.copy_is_done(second)  # whatever is queued from now on sees it too
    pool.remove(first)
    pool.wait_for([second])
    assert copies.num_waits == 1
