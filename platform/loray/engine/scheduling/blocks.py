"""The KV blocks that requests hold: found in the prefix cache, allocated, shared and released."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from loray.engine.memory.blocks import BlockAllocator
from loray.engine.memory.prefix_cache import PrefixCache
from loray.engine.memory.worth import Floor
from loray.engine.request import Request


class IdleAdapters(Protocol):
    """See Residency."""

    @property
    def floor(self) -> Floor: ...

    @property
    def least_value(self) -> float | None: ...

    def evict_one(self) -> bool: ...


class RequestBlocks:
    """Writes `blocks`, `num_shared_blocks`, `num_computed` and `num_cached_tokens` of requests.

    compact        tries to free that many blocks by closing gaps between rows; False if it frees none
    token_seconds  see PrefixCache
    num_queries    prompt tokens looked up in the prefix cache; num_hits: those found there, as in vLLM. A preempted
                   request counts once.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        adapters: IdleAdapters,
        compact: Callable[[int], bool],
        token_seconds: Callable[[], float],
        *,
        enable_prefix_caching: bool,
    ) -> None:
        self.prefix_cache = PrefixCache(
            allocator, enabled=enable_prefix_caching, floor=adapters.floor, token_seconds=token_seconds
        )
        self.num_queries = self.num_hits = 0
        self._allocator = allocator
        self._adapters = adapters
        self._compact = compact

    def take_cached(self, request: Request) -> None:
        """Take the blocks of a known prefix. The last token is always computed, because its logits are needed."""
        if request.needs_prompt_logits:
            return
        tokens = request.tokens(0, request.num_tokens - 1)
        request.blocks = self.prefix_cache.match(request.adapter_digest, tokens, request.spec.cache_salt)
        request.num_shared_blocks = len(request.blocks)
        request.num_computed = len(request.blocks) * self._allocator.geometry.block_tokens

    def count_cached(self, request: Request) -> None:
        """It starts: count the use of its cached blocks and, when it starts for the first time, its cached tokens."""
        self.prefix_cache.used(request.blocks[: request.num_shared_blocks])
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed, request.num_prompt_tokens)
            if self.prefix_cache.enabled and not request.needs_prompt_logits:
                self.num_queries += request.num_prompt_tokens
            self.num_hits += request.num_cached_tokens

    def share(self, request: Request) -> None:
        """Add the blocks that have become full to the prefix cache, if it is enabled."""
        if not self.prefix_cache.enabled:
            return  # it forgets what it is given, and would be given the whole context with each block
        block_tokens = self._allocator.geometry.block_tokens
        full = request.num_computed // block_tokens
        known = request.num_shared_blocks
        if full > known:
            if known and request.blocks[known - 1] not in self.prefix_cache:
                known = 0  # the adapter's prefixes were forgotten
            tokens = request.tokens(known * block_tokens, full * block_tokens)
            request.blocks = self.prefix_cache.store(
                request.adapter_digest, tokens, request.blocks, request.spec.cache_salt, known
            )
            request.num_shared_blocks = full

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Allocate blocks for `num_tokens` tokens in all; False, and nothing changed, if blocks are short."""
        missing = self._allocator.geometry.blocks_for_tokens(num_tokens) - len(request.blocks)
        if missing <= 0:
            return True
        while (blocks := self._allocator.allocate_kv(missing)) is None:
            if not self.make_room(missing - self._allocator.num_free):
                return False
        request.blocks.extend(blocks)
        return True

    def make_room(self, num_blocks: int) -> bool:
        """Try to free that many blocks; False if there is nothing to evict.

        Of cached prefixes and idle adapters what is worth least goes first, see `memory.worth`. An adapter may leave
        gaps that suffice instead of blocks: the caller tries again after each. At last gaps are closed.
        """
        for freed in range(num_blocks):
            prefix, adapter = self.prefix_cache.least_value, self._adapters.least_value
            if prefix is None or (adapter is not None and adapter < prefix):
                return self._adapters.evict_one() or freed > 0 or self._compact(num_blocks)
            self.prefix_cache.evict(1)
        return True

    def release(self, request: Request) -> None:
        """Release all its blocks. What it has computed is lost, except for what the prefix cache keeps."""
        self.prefix_cache.release(request.blocks)
        request.blocks = []
        request.num_computed = request.num_shared_blocks = 0

    def moved(self, requests: Iterable[Request], moves: Mapping[int, int]) -> None:
        """KV blocks have been copied from the keys of `moves` to its values, also in the allocator's books."""
        self.prefix_cache.moved(moves)
        for request in requests:
            request.blocks = [moves.get(block, block) for block in request.blocks]
