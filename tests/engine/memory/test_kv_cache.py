"""The prefix cache: a matched block holds exactly the requested tokens, of that adapter and salt; reference counts are
right.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loray.engine.memory.blocks import BlockAllocator, Geometry
from loray.engine.memory.kv_cache import PrefixCache

BLOCK_TOKENS = 2
Owner = tuple[str | None, str]  # digest and salt
GEOMETRY = Geometry(num_blocks=10, num_layers=1, block_tokens=BLOCK_TOKENS, layer_share=4)


class Life(RuleBasedStateMachine):
    """Requests that match, compute, store and end; `content` stands for a block's keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(GEOMETRY)
        self.cache = PrefixCache(self.allocator)
        self.content: dict[int, tuple[Owner, tuple[int, ...]]] = {}
        self.requests: list[tuple[Owner, list[int], list[int]]] = []

    @rule(
        owner=st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from(["", "a"])),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
    )
    def start(self, owner: Owner, tokens: list[int]) -> None:
        digest, salt = owner
        blocks = self.cache.match(digest, tokens[:-1], salt)
        for i, block in enumerate(blocks):
            assert self.content[block] == (owner, tuple(tokens[: (i + 1) * BLOCK_TOKENS]))
        missing = GEOMETRY.blocks_for_tokens(len(tokens)) - len(blocks)
        while (more := self.allocator.allocate_kv(missing)) is None:
            idle, free = self.cache.num_idle, self.allocator.num_free
            freed = self.cache.evict(missing - free)
            assert freed == min(idle, missing - free) == self.allocator.num_free - free
            if not freed:
                self.cache.release(blocks)
                return
        for i, block in enumerate(more, start=len(blocks)):
            self.content[block] = (owner, tuple(tokens[: (i + 1) * BLOCK_TOKENS]))
        self.requests.append((owner, tokens, blocks + more))

    @rule(data=st.data())
    def store(self, data: st.DataObject) -> None:
        if self.requests:
            i = data.draw(st.integers(0, len(self.requests) - 1))
            (digest, salt), tokens, blocks = owner, _, _ = self.requests[i]
            held = self.cache.store(digest, tokens[: data.draw(st.integers(0, len(tokens)))], blocks, salt)
            self.requests[i] = (owner, tokens, held)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.requests:
            self.cache.release(self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))[2])

    @rule(digest=st.sampled_from([None, "a", "b"]))
    def forget(self, digest: str | None) -> None:
        self.cache.forget(digest)
        for salt in ("", "a"):
            assert self.cache.match(digest, [0] * 8, salt) == self.cache.match(digest, [1] * 8, salt) == []

    @rule()
    def clear_run(self) -> None:
        """Free all blocks that can be free side by side; the blocks among them move."""
        num_blocks = self.allocator.num_free
        moves = self.allocator.clear_run(num_blocks)
        if moves:
            self.cache.moved(moves)
            self.content |= {new: self.content[old] for old, new in moves.items()}
            self.requests = [(d, t, [moves.get(b, b) for b in blocks]) for d, t, blocks in self.requests]
            first = self.allocator.allocate_run(num_blocks)
            assert first is not None
            self.allocator.free_run(first)

    @invariant()
    def whole(self) -> None:
        self.cache.check_integrity()
        references = Counter(block for _, _, blocks in self.requests for block in blocks)
        references.update(self.cache.blocks())
        self.allocator.check_integrity(references, [], {})
        for digest, tokens, blocks in self.requests:
            for i, block in enumerate(blocks):
                assert self.content[block] == (digest, tuple(tokens[: (i + 1) * BLOCK_TOKENS]))


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def known(cache: PrefixCache, allocator: BlockAllocator, digest: str | None, tokens: list[int]) -> list[int]:
    """Store what a request of `tokens` leaves in the cache when it ends."""
    blocks = cache.match(digest, tokens)
    more = allocator.allocate_kv(len(tokens) // BLOCK_TOKENS - len(blocks))
    assert more is not None
    blocks += more
    cache.store(digest, tokens, blocks)
    cache.release(blocks)
    return blocks


def test_the_end_of_the_prefix_used_longest_ago_goes_first() -> None:
    allocator = BlockAllocator(GEOMETRY)
    cache = PrefixCache(allocator)
    old = known(cache, allocator, None, [1, 1, 2, 2, 3, 3])
    new = known(cache, allocator, None, [1, 1, 9, 9])
    assert new[0] == old[0]
    freed: list[int] = []
    for _ in range(4):
        before = set(cache.blocks())
        assert cache.evict(1) == 1
        freed += before - set(cache.blocks())
    assert freed == [old[2], old[1], new[1], old[0]]
    assert cache.evict(1) == 0
    assert allocator.num_free == GEOMETRY.num_blocks
