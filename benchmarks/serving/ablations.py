"""The engine without one of its ideas, to see what that idea is worth. Wrapped around an engine; no product code.

fixed-split    adapters and KV cache each in a fixed part of the pool; neither takes the other's free blocks
no-prefetch    a request's adapter begins to load when the request is next in turn, not while it queues
padded-ranks   every adapter published with zero rows up to the largest rank (see AdapterSet.padded)
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
    """`kv_share`: of the pool's blocks, for the fixed split."""
    if ablation == "fixed-split":
        _split(engine, int(kv_share * engine._pool.geometry.num_blocks))
    elif ablation == "no-prefetch":
        _hold_back(engine)


def _split(engine: Engine, kv_blocks: int) -> None:
    """Refuse what goes beyond a part. Cached prefixes make room for KV as ever; adapters do not, in the other part."""
    allocator, residency, prefixes = engine._pool.allocator, engine._residency, engine._scheduler.prefix_cache
    allocate_kv, evict_one = allocator.allocate_kv, residency.evict_one
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
    residency.evict_one = lambda: not kv_is_short and evict_one()  # type: ignore[method-assign]


def _hold_back(engine: Engine) -> None:
    """Show the scheduler no more requests than it could run, so that it wants no adapter before its turn."""
    held: deque[GenerateRequest] = deque()
    scheduler, add, step = engine._scheduler, engine.add, engine.step

    def held_add(spec: GenerateRequest) -> None:
        engine.check(spec)
        held.append(spec)

    def fed_step() -> list[TokenOutput]:
        while held and len(scheduler.running) + len(scheduler.waiting) < engine.spec.max_num_seqs:
            add(held.popleft())
        return step()

    engine.add = held_add  # type: ignore[method-assign]
    engine.step = fed_step  # type: ignore[method-assign]
