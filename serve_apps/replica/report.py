"""What an engine in this process reports: its status, and where adapters are."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING

from loray.api.status import AdapterPlacement, ReplicaStatus
from loray.errors import EngineError
from loray.spec import Stretch

if TYPE_CHECKING:
    from loray.engine.stream import EngineStream


_LAYOUT_TIMEOUT_S = 1.0


async def replica_status(
    stream: EngineStream, replica: str, started_at: float, layout: bool | frozenset[str]
) -> ReplicaStatus:
    """The replica's status; adapters are named by digest. `started_at`: seconds since the epoch. `layout`: with what
    the pool's blocks hold by position, where the engine says it within a second; or names of the replicas for which.
    """
    stretches: tuple[Stretch, ...] = ()
    if layout if isinstance(layout, bool) else replica in layout:
        with suppress(EngineError, TimeoutError):
            async with asyncio.timeout(_LAYOUT_TIMEOUT_S):
                stretches = await stream.layout()
    return ReplicaStatus(
        replica=replica,
        node=socket.gethostname(),
        pid=os.getpid(),
        uptime_s=time.time() - started_at,
        layout=stretches,
        **dict(stream.stats()),
    )


async def placements(
    stream: EngineStream, replica: str, digests: Collection[str] | None = None
) -> list[AdapterPlacement]:
    """Where these adapters are, or all that the engine has loaded. Adapters that were never used here, or not for long,
    are left out. Raises EngineError if the engine has stopped.
    """
    node = socket.gethostname()
    return [
        AdapterPlacement(
            replica=replica,
            node=node,
            digest=placement.ref.digest,
            name=placement.ref.name,
            version=placement.ref.version,
            nbytes=placement.ref.nbytes,
            tier="none" if placement.tier is None else placement.tier.value,
            uses=placement.num_uses,
            last_used_at=placement.last_used_at,
            num_tokens=placement.num_tokens,
        )
        for placement in await stream.adapters(digests)
    ]
