"""What the pool's blocks hold, by position: a summary of bounded size, made when somebody asks for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from loray.engine.memory.blocks import BlockAllocator, Occupancy
from loray.engine.memory.kv_cache import PrefixCache
from loray.spec import Stretch

MOST_STRETCHES = 200
_HOLDS = (*(name for name in Occupancy._fields if name != "free"), "cached", "free")  # of as many, the first counts


def layout(allocator: BlockAllocator, prefix_cache: PrefixCache) -> tuple[Stretch, ...]:
    """At most `MOST_STRETCHES`, which together are the whole pool. KV blocks that only the prefix cache holds are
    `cached`. A pool of 100,000 blocks takes about 2 ms, and 5 where the prefix cache holds all of it, so it is made
    between two steps only when somebody asks.
    """
    codes = {name: code for code, name in enumerate(_HOLDS)}
    holds = np.full(allocator.geometry.num_blocks, codes["free"], dtype=np.uint8)
    for name, blocks in allocator.positions().items():
        holds[np.fromiter(blocks, np.intp, len(blocks))] = codes[name]
    holds[np.fromiter(prefix_cache.idle_blocks(), np.intp)] = codes["cached"]
    return summary(holds.tobytes())


def summary(holds: bytes) -> tuple[Stretch, ...]:
    """`holds` has an index into `_HOLDS` for each block. Exact where that makes few enough stretches; else of shares of
    as many blocks each, of which one has the state that most of its blocks have.
    """
    codes = np.frombuffer(holds, dtype=np.uint8)
    starts = _starts(codes)
    if len(starts) > MOST_STRETCHES:
        size = -(-len(codes) // MOST_STRETCHES)
        shares = [codes[at : at + size] for at in range(0, len(codes), size)]
        codes = np.concatenate([np.full_like(share, np.bincount(share).argmax()) for share in shares])
        starts = _starts(codes)
    lengths = np.diff(starts, append=len(codes))
    return tuple(Stretch(_HOLDS[codes[at]], int(n)) for at, n in zip(starts, lengths, strict=True))


def _starts(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Where a block holds something else than the one before it."""
    return np.flatnonzero(np.diff(codes, prepend=codes[:1] + 1))
