"""The engine without one of its features, to measure the gain of that feature. Methods of an engine are wrapped; the
product has no such switches.

fixed-split    adapters and KV cache each have a fixed part of the pool and cannot use free blocks of the other part
no-prefetch    a request's adapter is loaded when the request is next, not while it waits
padded-ranks   every adapter is published with zero rows up to the largest rank (see AdapterSet.padded)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loray.engine.engine import Engine
    from loray.engine.request import TokenOutput
    from loray.spec import GenerateRequest

ABLATIONS = ("fixed-split", "no-prefetch", "padded-ranks")


def ablate(engine: Engine, ablation: str | None, kv_share: float) -> None:
    """Change `engine` in place. `kv_share`: the part of the pool's blocks that KV cache has under the fixed split."""
    if ablation == "fixed-split":
        _split_pool(engine, int(kv_share * engine.pool.geometry.num_blocks))
    elif ablation == "no-prefetch":
        _disable_prefetch(engine)


def _split_pool(engine: Engine, kv_blocks: int) -> None:
    """Refuse allocations beyond a part. KV cache may still evict cached prefixes, but not adapters."""
    allocator, adapter_manager, prefixes = engine.pool.allocator, engine.adapter_manager, engine.scheduler.prefix_cache
    allocate_kv, evict_one = allocator.allocate_kv, adapter_manager.evict_one
    kv_is_short = False

    def split_kv(num_blocks: int) -> list[int] | None:
        nonlocal kv_is_short
        excess = allocator.occupancy().kv + num_blocks - kv_blocks
        if excess > 0:
            excess -= prefixes.evict(excess)
        kv_is_short = excess > 0
        return None if kv_is_short else allocate_kv(num_blocks)

    def split_rows(allocate: Callable[..., Any], undo: Callable[[Any], None]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal kv_is_short
            kv_is_short = False
            taken = allocate(*args, **options)
            state = allocator.occupancy()
            if taken is not None and state.free + state.kv < kv_blocks:
                undo(taken)
                return None
            return taken

        return wrapped

    allocator.allocate_kv = split_kv  # type: ignore[method-assign]
    allocator.allocate_rows = split_rows(  # type: ignore[method-assign]
        allocator.allocate_rows, allocator.free_rows
    )
    allocator.allocate_run = split_rows(allocator.allocate_run, allocator.free_run)  # type: ignore[method-assign]
    adapter_manager.evict_one = lambda: not kv_is_short and evict_one()  # type: ignore[method-assign]


def _disable_prefetch(engine: Engine) -> None:
    """Give the scheduler at most as many requests as can run, so that it asks for no adapter earlier."""
    queued: deque[GenerateRequest] = deque()
    scheduler, add, step = engine.scheduler, engine.add, engine.step

    def queue(spec: GenerateRequest) -> None:
        engine.check(spec)
        queued.append(spec)

    def add_and_step() -> list[TokenOutput]:
        while queued and len(scheduler.running) + len(scheduler.waiting) < engine.spec.max_num_seqs:
            add(queued.popleft())
        return step()

    engine.add = queue  # type: ignore[method-assign]
    engine.step = add_and_step  # type: ignore[method-assign]
