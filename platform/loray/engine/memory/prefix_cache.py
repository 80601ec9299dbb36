"""The prefix cache: KV blocks of computed tokens, for later requests that begin with the same tokens.

There is one tree for each adapter's content digest and one for the base; an edge is a full block of tokens. Blocks are
compared by their tokens, never by a hash of them. A digest covers all that determines an adapter's keys and values: so
nothing is shared across adapters or versions, and prefixes stay valid when their adapter leaves the pool.

Only full blocks are shared, and no request writes to a full block, so there is no copy on write. A request that holds a
block of the tree holds all blocks before it. A block that no request holds is idle. Idle blocks are evicted least
recently used first, and the end of a prefix before its beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loray.engine.memory.blocks import BlockAllocator

_Key = str | tuple[int, ...] | None


@dataclass(slots=True, eq=False)
class _Node:
    """A block of tokens after those of its parents. The root's children stand for adapters and hold no block."""

    key: _Key
    block: int
    parent: _Node | None
    children: dict[_Key, _Node] = field(default_factory=dict)


class PrefixCache:
    """Holds one reference to each of its blocks; each request that uses a block holds another one.

    A request that has called `store` releases its KV blocks with `release`, not with the allocator.
    """

    def __init__(self, allocator: BlockAllocator, *, enabled: bool = True) -> None:
        self._allocator = allocator
        self.enabled = enabled
        self._block_tokens = allocator.geometry.block_tokens
        self._root = _Node(None, -1, None)
        self._nodes: dict[int, _Node] = {}
        self._idle: OrderedDict[_Node, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Blocks that `evict` could free."""
        return len(self._idle)

    def match(self, digest: str | None, tokens: Sequence[int]) -> list[int]:
        """The full blocks of the longest known prefix of `tokens`, retained for the caller."""
        node = self._root.children.get(digest)
        blocks: list[int] = []
        for key in self._keys(tokens):
            node = None if node is None else node.children.get(key)
            if node is None:
                break
            self._retain(node)
            blocks.append(node.block)
        return blocks

    def store(self, digest: str | None, tokens: Sequence[int], blocks: list[int]) -> None:
        """Add `blocks`, which hold the keys and values of `tokens`.

        If the tree already has a block of the same tokens, that one replaces the request's in `blocks`.
        """
        if not self.enabled or len(tokens) < self._block_tokens:
            return
        node = self._child(self._root, digest, -1)
        for i, key in enumerate(self._keys(tokens)):
            known = node.children.get(key)
            if known is None:
                known = self._child(node, key, blocks[i])
                self._nodes[blocks[i]] = known
                self._allocator.retain_kv((blocks[i],))
            elif known.block != blocks[i]:
                self._retain(known)
                self._allocator.release_kv((blocks[i],))
                blocks[i] = known.block
            node = known

    def release(self, blocks: Sequence[int]) -> None:
        """Release a request's references to its blocks, given in the order of its tokens."""
        for block in reversed(blocks):
            self._allocator.release_kv((block,))
            node = self._nodes.get(block)
            if node is not None and self._allocator.references(block) == 1:
                self._idle[node] = None

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` idle blocks; returns how many."""
        freed = 0
        while freed < num_blocks and self._idle:
            node, _ = self._idle.popitem(last=False)
            assert node.parent is not None
            assert not node.children
            del node.parent.children[node.key]
            if node.parent.block < 0 and not node.parent.children:
                del self._root.children[node.parent.key]
            self._drop(node)
            freed += 1
        return freed

    def forget(self, digest: str | None) -> None:
        """Drop all prefixes of an adapter, or of the base. Requests that hold blocks of them keep those blocks."""
        adapter = self._root.children.pop(digest, None)
        for node in [] if adapter is None else list(_below(adapter)):
            self._idle.pop(node, None)
            self._drop(node)

    def moved(self, moves: Mapping[int, int]) -> None:
        """The contents of blocks have been copied from the keys of `moves` to its values."""
        nodes = [(moves[block], self._nodes.pop(block)) for block in moves if block in self._nodes]
        for block, node in nodes:
            node.block = block
            self._nodes[block] = node

    def blocks(self) -> list[int]:
        return list(self._nodes)

    def check_integrity(self) -> None:
        """AssertionError unless the tree is consistent, and exactly the blocks without a request are idle, in order."""
        reached = {node.block: node for adapter in self._root.children.values() for node in _below(adapter)}
        assert reached == self._nodes, "the prefix cache's tree differs from its blocks"
        assert all(adapter.children for adapter in self._root.children.values()), "an adapter without a prefix stays"
        idle = {node for block, node in self._nodes.items() if self._allocator.references(block) == 1}
        assert idle == set(self._idle), "idle prefixes differ from those that no request holds"
        order = {node: i for i, node in enumerate(self._idle)}
        for node, i in order.items():
            assert all(order.get(child, i) < i for child in node.children.values()), "a prefix would lose its middle"

    # -- private ------------------------------------------------------------------------------------------------------

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        n = self._block_tokens
        for start in range(0, len(tokens) - n + 1, n):
            yield tuple(tokens[start : start + n])

    def _child(self, parent: _Node, key: _Key, block: int) -> _Node:
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = _Node(key, block, parent)
        return node

    def _retain(self, node: _Node) -> None:
        self._allocator.retain_kv((node.block,))
        self._idle.pop(node, None)

    def _drop(self, node: _Node) -> None:
        del self._nodes[node.block]
        self._allocator.release_kv((node.block,))


def _below(node: _Node) -> Iterator[_Node]:
    stack = list(node.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
