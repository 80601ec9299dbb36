"""What the pool's blocks hold, by position: a summary of bounded size, made when somebody asks for it."""

from __future__ import annotations

import re
from itertools import islice

from loray.engine.memory.blocks import BlockAllocator, Occupancy
from loray.engine.memory.prefix_cache import PrefixCache
from loray.spec import Stretch

MOST_STRETCHES = 200
_HOLDS = (*(name for name in Occupancy._fields if name != "free"), "cached", "free")  # of as many, the first counts
_SAME = re.compile(rb"(.)\1*", re.DOTALL)


def layout(allocator: BlockAllocator, prefix_cache: PrefixCache) -> tuple[Stretch, ...]:
    """At most `MOST_STRETCHES`, which together are the whole pool. KV blocks that only the prefix cache holds are
    `cached`. It takes a few nanoseconds for each block of the pool, so a step never calls it.
    """
    codes = {name: code for code, name in enumerate(_HOLDS)}
    holds = bytearray([codes["free"]]) * allocator.geometry.num_blocks
    for name, blocks in allocator.positions().items():
        code = codes[name]
        for block in blocks:
            holds[block] = code
    for block in prefix_cache.idle_blocks():
        holds[block] = codes["cached"]
    return summary(bytes(holds))


def summary(holds: bytes) -> tuple[Stretch, ...]:
    """`holds` has an index into `_HOLDS` for each block. Exact where that makes few enough stretches; else of shares of
    as many blocks each, of which one has the state that most of its blocks have.
    """
    found = list(islice(_SAME.finditer(holds), MOST_STRETCHES + 1))
    if len(found) > MOST_STRETCHES:
        size = -(-len(holds) // MOST_STRETCHES)
        shares = (holds[at : at + size] for at in range(0, len(holds), size))
        found = list(_SAME.finditer(b"".join(_commonest(share) * len(share) for share in shares)))
    return tuple(Stretch(_HOLDS[match[1][0]], len(match[0])) for match in found)


def _commonest(share: bytes) -> bytes:
    return bytes([max(range(len(_HOLDS)), key=share.count)])
