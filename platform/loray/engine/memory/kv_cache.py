"""`KVCacheManager` gives requests their blocks of KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loray.engine.memory.adapter_manager import AdapterManager
from loray.engine.memory.blocks import BlockAllocator
from loray.engine.memory.prefix_cache import PrefixCache
from loray.engine.request import Request


@dataclass(slots=True, eq=False)
class _Fetch:
    """Blocks on their way from host memory. As a request does, it holds them and the `num_known` blocks before them,
    and stores them when they are there; not where prefixes have been forgotten since, perhaps these.
    """

    like: Request
    tokens: list[int]
    blocks: list[int]
    num_known: int
    names: Sequence[str]
    began: float
    is_there: Callable[[], bool]
    waiting: list[Request] = field(default_factory=list)
    is_forgotten: bool = False


class KVCacheManager:
    """Writes `blocks`, `num_shared_blocks`, `num_freed_blocks`, `num_computed`, `num_cached_tokens` and
    `prefix_is_coming` of requests.

    Where every layer has a window, a request gives up the blocks behind it. The prefix cache then has the first tokens
    of a request, as many as the window: they stay together, so a request gives them up together.

    token_seconds  see PrefixCache
    window         of the base's layers, see ModelConfig.window; None: all blocks are kept
    clock          seconds
    num_queries    prompt tokens looked up in the prefix cache; num_hits: those found there, as in vLLM. A preempted
                   request counts once.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        adapter_manager: AdapterManager[Any, Any],
        token_seconds: Callable[[], float],
        *,
        enable_prefix_caching: bool,
        window: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window = window
        self.prefix_cache = PrefixCache(
            allocator, enabled=enable_prefix_caching, inflation=adapter_manager.inflation, token_seconds=token_seconds
        )
        self.num_queries = self.num_hits = 0
        self._clock = clock
        self._fetches: list[_Fetch] = []
        self._coming: dict[str, _Fetch] = {}  # by the names of its blocks
        self._allocator = allocator
        self._adapter_manager = adapter_manager

    def take_cached(self, request: Request) -> None:
        """Take the blocks of a known prefix. The last token is always computed, because its logits are needed."""
        if request.needs_whole_prompt:
            return
        tokens = request.tokens(0, request.num_tokens - 1)
        request.blocks = self.prefix_cache.match(
            request.kv_digest, tokens, request.spec.cache_salt, request.active_from
        )
        request.num_shared_blocks = len(request.blocks)
        request.num_computed = len(request.blocks) * self._allocator.geometry.block_tokens

    def count_cached(self, request: Request) -> None:
        """Count the use of a starting request's cached blocks and, at its first start, its cached tokens."""
        self.prefix_cache.used(request.blocks[: request.num_shared_blocks])
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed, request.num_prompt_tokens)
            if self.prefix_cache.enabled and not request.needs_whole_prompt:
                self.num_queries += request.num_prompt_tokens
            self.num_hits += request.num_cached_tokens

    def share(self, request: Request, num_ahead: int = 0) -> None:
        """Add the blocks that have become full to the prefix cache, if it is enabled. Those of an embedding are not
        kept: the texts of a collection come once, and would drive out conversations, which go on.

        num_ahead  further tokens, which the step that is being scheduled computes
        """
        if not self.prefix_cache.enabled or request.spec.pooling is not None:
            return  # the first forgets what it is given, and would be given the whole context with each block
        block_tokens = self._allocator.geometry.block_tokens
        full = min(request.num_computed + num_ahead, self._window or request.num_tokens) // block_tokens
        known = request.num_shared_blocks
        if full > known:
            if known and request.blocks[known - 1] not in self.prefix_cache:
                known = 0  # the adapter's prefixes were forgotten
            tokens = request.tokens(known * block_tokens, full * block_tokens)
            request.blocks = self.prefix_cache.store(
                request.kv_digest,
                tokens,
                request.blocks,
                request.spec.cache_salt,
                known,
                request.active_from,
                ahead=num_ahead > 0,
            )
            while num_ahead and known < full and request.blocks[known] in self.prefix_cache:
                known += 1
            request.num_shared_blocks = known if num_ahead else full

    def take_more(self, request: Request) -> None:
        """Share what the request has computed of its prompt, and take what others have computed of it meanwhile."""
        self.share(request)
        known, block_tokens = request.num_shared_blocks, self._allocator.geometry.block_tokens
        if not self.prefix_cache.enabled or request.needs_whole_prompt:
            return
        if known < request.num_computed // block_tokens:  # behind it no block is shared
            return
        if known and request.blocks[known - 1] not in self.prefix_cache:
            return
        tokens = request.tokens(known * block_tokens, request.num_tokens - 1)
        found = self.prefix_cache.match(
            request.kv_digest, tokens, request.spec.cache_salt, request.active_from, request.blocks[:known]
        )
        if not found:
            return
        self.prefix_cache.used(found)
        own, request.num_shared_blocks = request.blocks, known + len(found)
        request.blocks = [*own[:known], *found, *own[request.num_shared_blocks :]]
        self._allocator.release_kv(own[known : request.num_shared_blocks])
        before = max(request.num_computed, request.charged_until)
        request.num_computed = request.num_shared_blocks * block_tokens
        num_hits = max(0, min(request.num_computed, request.num_prompt_tokens) - before)
        request.num_cached_tokens = (request.num_cached_tokens or 0) + num_hits
        self.num_hits += num_hits

    def fetch(self, request: Request) -> bool:
        """Bring back from host memory what follows a request's cached blocks, if there are blocks for it; True if the
        request waits for that. It looks once, so that it does not wait for ever where others take the blocks first.
        """
        host, known = self.prefix_cache.host, request.blocks
        if host is None or request.needs_whole_prompt or request.prefix_is_coming is not None:
            return False
        tokens = request.tokens(len(known) * self._allocator.geometry.block_tokens, request.num_tokens - 1)
        found = self.prefix_cache.on_host(
            request.kv_digest, tokens, request.spec.cache_salt, request.active_from, known
        )
        if not found:
            return False
        fetch = self._coming.get(next(iter(found)))
        if fetch is None:
            blocks = self._allocate(len(found))
            if blocks is None:
                return False
            self._allocator.retain_kv(known)
            is_there = host.copies.restore(
                {block: copy.values for block, copy in zip(blocks, found.values(), strict=True)}
            )
            fetch = _Fetch(request, tokens, [*known, *blocks], len(known), [*found], self._clock(), is_there)
            self._fetches.append(fetch)
            self._coming |= dict.fromkeys(found, fetch)
        request.prefix_is_coming = True
        fetch.waiting.append(request)
        return True

    def poll(self, *, at_once: bool) -> list[Request]:
        """Take the blocks that have come from host memory, and return the requests that waited for them; copy idle ones
        there. `at_once`: no step runs that a copy could hold up, so the next one may wait for what is on its way.
        """
        self.prefix_cache.save_idle()
        if not self._fetches:
            return []
        there = [fetch for fetch in self._fetches if at_once or fetch.is_there()]
        if at_once and self.prefix_cache.host is not None:
            self.prefix_cache.host.copies.wait()
        for fetch in there:
            self._fetches.remove(fetch)
            for name in fetch.names:
                self._coming.pop(name, None)
            blocks, known, like = fetch.blocks, fetch.num_known, fetch.like
            # A failed step may have forgotten those before them.
            if not fetch.is_forgotten and (not known or blocks[known - 1] in self.prefix_cache):
                tokens = fetch.tokens[: len(fetch.names) * self._allocator.geometry.block_tokens]
                salt = like.spec.cache_salt
                blocks = self.prefix_cache.store(like.kv_digest, tokens, blocks, salt, known, like.active_from)
            self.prefix_cache.release(blocks)
            if not at_once:
                self.prefix_cache.restored((self._clock() - fetch.began) / len(fetch.names))
        return [request for fetch in there for request in fetch.waiting]

    def forget(self, digest: str | None) -> None:
        """Drop all prefixes of an adapter or the base, see PrefixCache, and keep nothing of them that is on its way."""
        self.prefix_cache.forget(digest)
        for fetch in self._fetches:
            if digest in (None, fetch.like.kv_digest):
                fetch.is_forgotten = True
                for name in fetch.names:
                    self._coming.pop(name, None)

    def fetched(self) -> list[int]:
        """The blocks that are held for what is on its way from host memory."""
        return [block for fetch in self._fetches for block in fetch.blocks]

    def free_behind_window(self, request: Request) -> None:
        """Free the blocks that no token from the next one on attends to. They keep their places in the request's list,
        where nothing reads them.
        """
        if self._window is None:
            return
        behind = (request.num_computed - self._window + 1) // self._allocator.geometry.block_tokens
        first = request.num_freed_blocks
        if behind > first and behind >= request.num_shared_blocks:
            self.prefix_cache.release(request.blocks[first:behind])
            request.num_freed_blocks = behind

    def most_blocks(self, num_tokens: int, num_held: int) -> int:
        """Return how many blocks a request holds at once: it has `num_held` tokens now, and `num_tokens` at its end."""
        if self._window is not None:  # the shared ones, the window's, and one of which a part is in it
            num_tokens = min(num_tokens, max(num_held, 2 * self._window + self._allocator.geometry.block_tokens))
        return self._allocator.geometry.blocks_for_tokens(num_tokens)

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Allocate blocks for `num_tokens` tokens in all; False, and nothing changed, if blocks are short."""
        missing = self._allocator.geometry.blocks_for_tokens(num_tokens) - len(request.blocks)
        if missing <= 0:
            return True
        blocks = self._allocate(missing)
        if blocks is not None:
            request.blocks.extend(blocks)
        return blocks is not None

    def _allocate(self, num_blocks: int) -> list[int] | None:
        while (blocks := self._allocator.allocate_kv(num_blocks)) is None:
            if not self.make_room(num_blocks - self._allocator.num_free):
                return None
        return blocks

    def make_room(self, num_blocks: int) -> bool:
        """Try to free that many blocks; False if there is nothing to evict.

        The cached prefix or idle adapter of the lowest value goes first, see `eviction`. An adapter may leave
        gaps that suffice instead of blocks: the caller tries again after each.
        """
        for freed in range(num_blocks):
            prefix, adapter = self.prefix_cache.least_value, self._adapter_manager.least_value
            if prefix is None or (adapter is not None and adapter < prefix):
                return self._adapter_manager.evict_one() or freed > 0
            self.prefix_cache.evict(1)
        return True

    def release(self, request: Request) -> None:
        """Release all its blocks. What it has computed is lost, except for what the prefix cache keeps."""
        self.prefix_cache.release(request.held_blocks)
        request.blocks = []
        request.num_computed = request.num_shared_blocks = request.num_freed_blocks = 0

    def moved(self, requests: Iterable[Request], moves: Mapping[int, int]) -> None:
        """KV blocks have been copied from the keys of `moves` to its values, also in the allocator's books."""
        self.prefix_cache.moved(moves)
        for fetch in self._fetches:
            fetch.blocks = [moves.get(block, block) for block in fetch.blocks]
        for request in requests:
            request.blocks = [moves.get(block, block) for block in request.blocks]
