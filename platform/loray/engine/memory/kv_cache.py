"""`KVCacheManager` gives requests their blocks of KV cache, and `PrefixCache` keeps those that others may use again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loray.engine.memory.adapter_manager import AdapterManager
from loray.engine.memory.blocks import BlockAllocator
from loray.engine.memory.eviction import Inflation, PriorityQueue, Reuse
from loray.engine.request import Request


class _Activation(NamedTuple):
    """The key of what an adapter has computed after the base: it is active from token `offset` of the next block on."""

    digest: str
    offset: int


_Key = str | tuple[int, ...] | _Activation | None


@dataclass(slots=True, eq=False)
class _Node:
    """A block of tokens after those of its parents. The root's children stand for adapters, and those of their children
    that have a text as key for salts; neither holds a block, nor does an activation.

    uses  requests that computed it or found it
    rank  since it is idle: its value; of equal ones what was released first
    """

    key: _Key
    block: int
    parent: _Node | None
    children: dict[_Key, _Node] = field(default_factory=dict)
    uses: int = 0
    rank: tuple[float, int] = (0.0, 0)


class PrefixCache:
    """Full blocks by their tokens, in one tree for each adapter's content digest and one for the base.

    Blocks are compared by their tokens, never by a hash of them. A digest covers all that determines an adapter's keys
    and values: so nothing is shared across adapters or versions, and prefixes stay valid when their adapter leaves the
    pool. Callers with a salt share with those of the same salt alone.

    An adapter that is active from a later token on (aLoRA) is a branch of the base's tree: the blocks before the one
    with that token are the base's, which the base and all such adapters share.

    Only full blocks are shared, and no request writes to a full block, so there is no copy on write. A request that
    holds a block of the tree holds all blocks before it. The cache holds one reference to each of its blocks; each
    request that uses a block holds another one. A block that no request holds is idle. Idle blocks are evicted by their
    value, see `eviction`, and the end of a prefix before its beginning.

    A request that has called `store` releases its KV blocks with `release`, not with the allocator.

    inflation      of the pool's blocks
    token_seconds  to compute a token of a prompt again; 0 while that is not known: then a block has no value
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        enabled: bool = True,
        inflation: Inflation | None = None,
        token_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._allocator = allocator
        self.enabled = enabled
        self._inflation, self._reuse = inflation or Inflation(), Reuse()
        self._token_seconds = token_seconds
        self._block_tokens = allocator.geometry.block_tokens
        self._root = _Node(None, -1, None)
        self._nodes: dict[int, _Node] = {}
        self._idle: set[_Node] = set()
        self._ends: PriorityQueue[_Node] = PriorityQueue()  # idle blocks after which none is known, by rank
        self._num_released = 0

    @property
    def num_idle(self) -> int:
        """Blocks that `evict` could free."""
        return len(self._idle)

    @property
    def least_value(self) -> float | None:
        """The value of the block that `evict` would free first; None if none is idle."""
        least = self._ends.peek()
        return None if least is None else least[0][0]

    def match(self, digest: str | None, tokens: Sequence[int], salt: str = "", active_from: int = 0) -> list[int]:
        """Return the full blocks of the longest known prefix of `tokens`, retained for the caller. They count as used
        when `used` is told that its request runs: one that waits for blocks looks again and again.

        active_from  token from which the adapter is active; those before it are the base's
        """
        node = self._root.children.get(None if active_from else digest)
        if salt and node is not None:
            node = node.children.get(salt)
        branch = self._branch(digest, active_from)
        blocks: list[int] = []
        for i, key in enumerate(self._keys(tokens)):
            if node is not None and i in branch:
                node = node.children.get(branch[i])
            node = None if node is None else node.children.get(key)
            if node is None:
                break
            self._retain(node)
            blocks.append(node.block)
        return blocks

    def used(self, blocks: Sequence[int]) -> None:
        """A request that has begun to run found these."""
        for block in blocks:
            self._use(self._nodes[block])

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def store(
        self,
        digest: str | None,
        tokens: Sequence[int],
        blocks: list[int],
        salt: str = "",
        num_known: int = 0,
        active_from: int = 0,
    ) -> list[int]:
        """Add `blocks`, of which the tree has the first `num_known`; the others hold the keys and values of `tokens`.

        Returns what the request holds from now on: `blocks` itself, or, if the tree already has blocks of the same
        tokens, a new list with those in place of the request's.
        """
        if not self.enabled or len(tokens) < self._block_tokens:
            return blocks
        held = blocks
        if num_known:
            node = self._nodes[blocks[num_known - 1]]
        else:
            node = self._child(self._root, None if active_from else digest, -1)
            if salt:
                node = self._child(node, salt, -1)
        branch = self._branch(digest, active_from)
        for i, key in enumerate(self._keys(tokens), num_known):
            if i in branch:
                node = self._child(node, branch[i], -1)
            known = node.children.get(key)
            if known is None:
                known = self._child(node, key, blocks[i])
                self._nodes[blocks[i]] = known
                self._use(known)
                self._allocator.retain_kv((blocks[i],))
            elif known.block != blocks[i]:
                self._retain(known)
                self._use(known)
                self._allocator.release_kv((blocks[i],))
                if held is blocks:
                    held = [*blocks]
                held[i] = known.block
            node = known
        return held

    def release(self, blocks: Sequence[int]) -> None:
        """Release a request's references to its blocks, given in the order of its tokens."""
        block_seconds = self._block_tokens * self._token_seconds()
        for block in reversed(blocks):
            self._allocator.release_kv((block,))
            node = self._nodes.get(block)
            if node is not None and self._allocator.references(block) == 1:
                self._num_released += 1
                value = self._inflation.value + self._reuse.expected(node.uses) * block_seconds
                node.rank = (value, self._num_released)
                self._idle.add(node)
                if not node.children:
                    self._ends.set(node, node.rank)

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` idle blocks; returns how many."""
        freed = 0
        while freed < num_blocks and (least := self._ends.peek()) is not None:
            (value, _), node = least
            self._detach(node)
            self._inflation.evicted(value)
            self._drop(node)
            freed += 1
        return freed

    def forget(self, digest: str | None) -> None:
        """Drop all prefixes of an adapter, or of the base with what adapters computed after it. Requests that hold
        blocks of them keep those blocks.
        """
        own = [node for node in self._root.children.values() if node.key == digest]
        base = self._root.children.get(None)
        if digest is not None and base is not None:  # below the base alone adapters become active
            own += [n for n in _below(base) if isinstance(n.key, _Activation) and n.key.digest == digest]
        for node in own:
            self._detach(node)
            for below in list(_below(node)):
                if below.block >= 0:
                    self._drop(below)

    def moved(self, moves: Mapping[int, int]) -> None:
        """The contents of blocks have been copied from the keys of `moves` to its values."""
        nodes = [(moves[block], self._nodes.pop(block)) for block in moves if block in self._nodes]
        for block, node in nodes:
            node.block = block
            self._nodes[block] = node

    def blocks(self) -> list[int]:
        return list(self._nodes)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the tree is consistent, and exactly the blocks without a request are idle."""
        tree = list(_below(self._root))
        assert {node.block: node for node in tree if node.block >= 0} == self._nodes, (
            "the prefix cache's tree differs from its blocks"
        )
        assert all(node.children for node in tree if node.block < 0), (
            "an adapter, a salt or an activation without a prefix stays"
        )
        idle = {node for block, node in self._nodes.items() if self._allocator.references(block) == 1}
        assert idle == self._idle, "idle prefixes differ from those that no request holds"
        ends = {node for node in idle if not node.children}
        assert ends == self._ends.items(), "the blocks that can be evicted differ from the ends of idle prefixes"
        for node in self._nodes.values():
            parent = node.parent
            while parent is not None and parent.block < 0:
                parent = parent.parent
            assert parent not in idle or node in idle, "a request holds a block, and not the one before it"

    # -- private ------------------------------------------------------------------------------------------------------

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        n = self._block_tokens
        for start in range(0, len(tokens) - n + 1, n):
            yield tuple(tokens[start : start + n])

    def _branch(self, digest: str | None, active_from: int) -> Mapping[int, _Activation]:
        """The number of the block with which an adapter's branch of the base's tree begins, and the branch's key: the
        same tokens may have the adapter active from another one of them on. Empty where it is active from the first.
        """
        if not active_from or digest is None:
            return {}
        block, offset = divmod(active_from, self._block_tokens)
        return {block: _Activation(digest, offset)}

    def _child(self, parent: _Node, key: _Key, block: int) -> _Node:
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = _Node(key, block, parent)
        return node

    def _retain(self, node: _Node) -> None:
        self._allocator.retain_kv((node.block,))
        self._idle.discard(node)
        self._ends.discard(node)

    def _use(self, node: _Node) -> None:
        node.uses += 1
        self._reuse.used(node.uses)

    def _detach(self, node: _Node) -> None:
        """Take a node out of the tree with all below it, and with those above it that stand for nothing else."""
        while (parent := node.parent) is not None:
            del parent.children[node.key]
            if parent in self._idle and not parent.children:
                self._ends.set(parent, parent.rank)
            if parent.children or parent.block >= 0:
                return
            node = parent

    def _drop(self, node: _Node) -> None:
        self._idle.discard(node)
        self._ends.discard(node)
        del self._nodes[node.block]
        self._allocator.release_kv((node.block,))


def _below(node: _Node) -> Iterator[_Node]:
    stack = list(node.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


class KVCacheManager:
    """Writes `blocks`, `num_shared_blocks`, `num_freed_blocks`, `num_computed` and `num_cached_tokens` of requests.

    Where every layer has a window, a request gives up the blocks behind it. The prefix cache then has the first tokens
    of a request, as many as the window: they stay together, so a request gives them up together.

    token_seconds  see PrefixCache
    window         of the base's layers, see ModelConfig.window; None: all blocks are kept
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
    ) -> None:
        self._window = window
        self.prefix_cache = PrefixCache(
            allocator, enabled=enable_prefix_caching, inflation=adapter_manager.inflation, token_seconds=token_seconds
        )
        self.num_queries = self.num_hits = 0
        self._allocator = allocator
        self._adapter_manager = adapter_manager

    def take_cached(self, request: Request) -> None:
        """Take the blocks of a known prefix. The last token is always computed, because its logits are needed."""
        if request.needs_prompt_logits:
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
            if self.prefix_cache.enabled and not request.needs_prompt_logits:
                self.num_queries += request.num_prompt_tokens
            self.num_hits += request.num_cached_tokens

    def share(self, request: Request) -> None:
        """Add the blocks that have become full to the prefix cache, if it is enabled."""
        if not self.prefix_cache.enabled:
            return  # it forgets what it is given, and would be given the whole context with each block
        block_tokens = self._allocator.geometry.block_tokens
        full = min(request.num_computed, self._window or request.num_computed) // block_tokens
        known = request.num_shared_blocks
        if full > known:
            if known and request.blocks[known - 1] not in self.prefix_cache:
                known = 0  # the adapter's prefixes were forgotten
            tokens = request.tokens(known * block_tokens, full * block_tokens)
            request.blocks = self.prefix_cache.store(
                request.kv_digest, tokens, request.blocks, request.spec.cache_salt, known, request.active_from
            )
            request.num_shared_blocks = full

    def free_behind_window(self, request: Request) -> None:
        """Free the blocks that no token from the next one on attends to."""
        if self._window is None:
            return
        behind = (request.num_computed - self._window + 1) // self._allocator.geometry.block_tokens
        first = request.num_freed_blocks
        if behind > first and behind >= request.num_shared_blocks:
            self.prefix_cache.release(request.blocks[first:behind])
            request.blocks = [request.blocks[behind]] * behind + request.blocks[behind:]
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
        while (blocks := self._allocator.allocate_kv(missing)) is None:
            if not self.make_room(missing - self._allocator.num_free):
                return False
        request.blocks.extend(blocks)
        return True

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
        for request in requests:
            request.blocks = [moves.get(block, block) for block in request.blocks]
