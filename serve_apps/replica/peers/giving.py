"""Gives other replicas what this node's cache has: the published files, which the asker verifies by their digest."""

from __future__ import annotations

import asyncio

from loray.errors import IntegrityError
from loray.store import AdapterCache, AdapterCopy
from loray.store.copies import read_copy
from loray.telemetry import get_logger

_log = get_logger(__name__)

_MAX_BYTES = 256 << 20  # of one adapter: a larger one would fill a small node's object store
_AT_ONCE = 2


class CopyGiver:
    """Gives copies. Used from one event loop; files are read in threads, beside the engine's."""

    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def give(self, digest: str) -> AdapterCopy | None:
        """Give a copy; None where the cache does not have the adapter, or it is too large. Waits for no load."""
        async with self._turns:
            return await asyncio.to_thread(self._read, digest)

    def _read(self, digest: str) -> AdapterCopy | None:
        try:
            with self._cache.present(digest) as folder:
                return None if folder is None else read_copy(folder, _MAX_BYTES)
        except (IntegrityError, OSError) as e:
            _log.warning("adapter %s in the cache cannot be given to another replica: %s", digest[:12], e)
            return None
