"""What a request costs with thousands of adapters: executed lines of the engine are counted, not time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import loray.engine
from loray.engine.memory.blocks import BlockKind, Extent
from loray.engine.request import Request
from loray.errors import IntegrityError
from loray.spec import AdapterRef
from tests.fixtures.scheduling import Packed, Simulation, World, adapter

ENGINE = str(Path(loray.engine.__file__).parent)
FEW, MANY = 250, 2000


def executed_lines(function: Callable[[], object]) -> int:
    """Lines of the engine that `function` executes, those of comprehensions and of keys of sorts too."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(ENGINE):
            return None
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


class Small(Simulation):
    """Adapters whose rows share blocks: three fit a block, and what an eviction leaves is a gap."""

    def _place(self, ref: AdapterRef, packed: Packed) -> list[Extent] | None:
        return self.allocator.allocate_rows(BlockKind.LAYERED, {2: 1})


def full_engine(num_adapters: int) -> Small:
    """Twice as many adapters have been used as the pool and the host hold; half of the pool are cached prefixes."""
    sim = Small(num_blocks=num_adapters // 2, host_bytes=num_adapters, token_s=1e-4, max_queued=1 << 20)
    for i in range(2 * num_adapters):
        serve(sim, adapter(str(i)))
    assert sim.allocator.num_free <= 2
    return sim


def serve(sim: Small, ref: AdapterRef) -> Request:
    request = sim.add(8, 2, ref)
    for _ in range(8):
        plan = sim.scheduler.next()
        for digest in sim.loading:
            sim.finish(digest)
        sim.loads.clear()
        for chunk in plan.chunks:
            request.num_computed += chunk.num_tokens
            sim.now += 1e-4 * chunk.num_tokens
            sim.scheduler.step_time.observe(plan.work, 1e-4 * chunk.num_tokens)
            request.output_ids.append(1)
        if len(request.output_ids) == 2:
            sim.remove(request)
            return request
    raise AssertionError("no end")


def costs(setup: Callable[[int], Callable[[], object]]) -> tuple[int, int]:
    """Of what `setup` returns, for few and for many."""
    few, many = (executed_lines(setup(n)) for n in (FEW, MANY))
    return few, many


def test_a_cold_request_with_a_full_pool_and_host_costs_the_same_for_any_number() -> None:
    def setup(n: int) -> Callable[[], object]:
        sim = full_engine(n)

        def cold() -> None:
            evictions = sim.adapter_manager.counts.num_evictions
            for i in range(40):
                serve(sim, adapter(f"cold {i}"))
            assert sim.adapter_manager.counts.num_evictions > evictions

        return cold

    few, many = costs(setup)
    assert many < 1.3 * few


def test_an_idle_step_costs_the_same_for_any_number_of_loads_under_way() -> None:
    def setup(n: int) -> Callable[[], object]:
        world = World(host_bytes=1 << 30, checks=False)
        world.want(*map(str, range(n)))
        assert world.num_loads == n
        return world.manager.poll

    few, many = costs(setup)
    assert many == few


def test_a_load_without_room_costs_the_same_for_any_number_of_copies_that_are_needed() -> None:
    def setup(n: int) -> Callable[[], object]:
        world, names = World(host_bytes=100 * n, checks=False), [str(i) for i in range(1, n)]
        world.want("first")
        for name in names:
            world.want(name)
            world.finish(name)
        world.want("large", nbytes=50 * n)
        for name in names[: n // 2 - 1]:  # later requests, which do not make room enough
            world.want(name)
            world.leave(name)

        def steps() -> None:
            for name in names[:40]:
                world.want(name)
                world.leave(name)
                world.manager.poll()
            assert "large" not in world.loads

        return steps

    few, many = costs(setup)
    assert many < 1.3 * few


@pytest.mark.parametrize("outcome", [None, IntegrityError("damaged")], ids=["load", "fail"])
def test_a_step_in_which_many_loads_end_costs_each_as_much_as_few(outcome: Exception | None) -> None:
    def setup(n: int) -> Callable[[], object]:
        sim = Simulation(loads_at_once=False, max_num_seqs=1)
        for i in range(n):
            sim.add(adapter=adapter(f"x{i}"), tenant=f"t{i}")
        sim.scheduler.next()
        for digest in sim.loading:
            sim.finish(digest, outcome)
        return sim.scheduler.next

    few, many = costs(setup)
    assert many < 1.25 * MANY / FEW * few
