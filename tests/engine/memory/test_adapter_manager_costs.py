"""What a request costs with thousands of adapters: executed lines of the engine are counted, not time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import loray.engine
from loray.engine.memory.blocks import BlockKind, Extent
from loray.engine.request import Request
from loray.spec import AdapterRef
from tests.fixtures.simulation import Packed, Simulation, World, adapter, ref

ENGINE = str(Path(loray.engine.__file__).parent)
FEW, MANY = 250, 4000


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


def test_a_cold_request_with_a_full_pool_and_host_costs_the_same_for_any_number() -> None:
    lines = []
    for n in (FEW, MANY):
        sim = full_engine(n)
        evictions = sim.adapter_manager.counts.num_evictions
        lines.append(executed_lines(lambda sim=sim: [serve(sim, adapter(f"cold {i}")) for i in range(40)]))  # type: ignore[misc]
        assert sim.adapter_manager.counts.num_evictions > evictions
        sim.check_integrity()
    assert lines[1] < 1.3 * lines[0]


def test_an_idle_step_costs_the_same_for_any_number_of_loads_under_way() -> None:
    lines = []
    for n in (FEW, MANY):
        world = World(host_bytes=1 << 30)
        for i in range(n):
            world.manager.add_waiter(ref(str(i)))
        world.manager.poll()
        assert world.num_loads == n
        lines.append(executed_lines(world.manager.poll))
    assert lines[1] == lines[0]


def test_a_load_without_room_costs_the_same_for_any_number_of_copies_that_are_needed() -> None:
    lines = []
    for n in (FEW, MANY):
        world = World(host_bytes=100 * n)
        adapter_manager = world.manager
        adapter_manager.add_waiter(ref("first"))
        adapter_manager.poll()
        for i in range(1, n):
            adapter_manager.add_waiter(ref(str(i)))
            adapter_manager.poll()
            world.loads[str(i)].set_result(Packed(100))
            adapter_manager.poll()
        adapter_manager.add_waiter(ref("large", 50 * n))
        for i in range(1, n // 2):  # later requests, which do not make room enough
            adapter_manager.add_waiter(ref(str(i)))
            adapter_manager.remove_waiter(ref(str(i)))
        adapter_manager.poll()

        def steps(world: World = world) -> None:
            for i in range(40):
                world.manager.add_waiter(ref(str(i + 1)))
                world.manager.poll()
                world.manager.remove_waiter(ref(str(i + 1)))
                world.manager.poll()

        lines.append(executed_lines(steps))
        assert "large" not in world.loads
        adapter_manager.table.check_integrity()
    assert lines[1] < 1.3 * lines[0]
