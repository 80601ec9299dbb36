"""The prefix cache: a matched block holds exactly the requested tokens, of that adapter and salt; reference counts are
right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loray.engine.memory.blocks import BlockAllocator, Geometry
from loray.engine.memory.host_memory import HostMemory
from loray.engine.memory.prefix_cache import HostTier, PrefixCache
from loray.policy.prefixes import block_names, told_names
from loray.spec import NEVER

BLOCK_TOKENS = 2
Owner = tuple[str | None, str, int]  # digest, salt, and the token from which the adapter is active
GEOMETRY = Geometry(num_blocks=10, num_layers=1, block_tokens=BLOCK_TOKENS, layer_share=4)


def content_of(owner: Owner, tokens: list[int], i: int) -> tuple[Owner, tuple[int, ...]]:
    """What block i of a request's tokens holds: the base's keys and values before the block that activates it."""
    _, salt, active_from = owner
    is_bases = i < active_from // BLOCK_TOKENS
    return (None, salt, 0) if is_bases else owner, tuple(tokens[: (i + 1) * BLOCK_TOKENS])


class Life(RuleBasedStateMachine):
    """Requests that match, compute, store and end; `content` stands for a block's keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(GEOMETRY)
        self.cache = PrefixCache(self.allocator)
        self.content: dict[int, tuple[Owner, tuple[int, ...]]] = {}
        self.requests: list[tuple[Owner, list[int], list[int]]] = []

    @rule(
        owner=st.one_of(
            st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from(["", "a"]), st.just(0)),
            st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["", "a"]), st.sampled_from([1, 2, 3, 4, NEVER])),
        ),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
    )
    def start(self, owner: Owner, tokens: list[int]) -> None:
        digest, salt, active_from = owner
        blocks = self.cache.match(digest, tokens[:-1], salt, active_from)
        for i, block in enumerate(blocks):
            assert self.content[block] == content_of(owner, tokens, i)
        missing = GEOMETRY.blocks_for_tokens(len(tokens)) - len(blocks)
        while (more := self.allocator.allocate_kv(missing)) is None:
            idle, free = self.cache.num_idle, self.allocator.num_free
            freed = self.cache.evict(missing - free)
            assert freed == min(idle, missing - free) == self.allocator.num_free - free
            if not freed:
                self.cache.release(blocks)
                return
        for i, block in enumerate(more, start=len(blocks)):
            self.content[block] = content_of(owner, tokens, i)
        self.requests.append((owner, tokens, blocks + more))

    @rule(data=st.data())
    def store(self, data: st.DataObject) -> None:
        if self.requests:
            i = data.draw(st.integers(0, len(self.requests) - 1))
            (digest, salt, active_from), tokens, blocks = owner, _, _ = self.requests[i]
            part = tokens[: data.draw(st.integers(0, len(tokens)))]
            held = self.cache.store(digest, part, blocks, salt, active_from=active_from)
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
            assert digest is None or self.cache.match(digest, [0] * 8, salt, active_from=1) == []

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
        for owner, tokens, blocks in self.requests:
            for i, block in enumerate(blocks):
                assert self.content[block] == content_of(owner, tokens, i)


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


def test_adapters_branch_off_from_the_bases_tree() -> None:
    allocator = BlockAllocator(replace(GEOMETRY, num_blocks=11))
    cache = PrefixCache(allocator)
    base = known(cache, allocator, None, [1, 1, 2, 2, 3, 3])
    tokens = [1, 1, 2, 2, 3, 9, 4, 4]  # active within the third block, or from the fourth on
    found = {}
    for digest, active_from in (("a", 5), ("b", 5), ("a", 4), ("b", 6)):
        blocks = cache.match(digest, tokens, active_from=active_from)
        assert blocks == base[:2]
        more = allocator.allocate_kv(2)
        assert more is not None
        found[digest, active_from] = cache.store(digest, tokens, blocks + more, active_from=active_from)
        cache.release(found[digest, active_from])
        cache.check_integrity()
    assert len({tuple(blocks[2:]) for blocks in found.values()}) == 4  # none of them is another's
    assert all(blocks == cache.match(digest, tokens, active_from=n) for (digest, n), blocks in found.items())
    assert found["b", 6][2] == cache.match(None, tokens)[2]  # before its invocation an adapter computes for the base
    assert cache.match("a", tokens) == []
    assert cache.match("a", tokens, active_from=NEVER) == cache.match(None, tokens)


def test_what_a_failed_step_should_have_written_goes_with_all_after_it() -> None:
    allocator = BlockAllocator(GEOMETRY)
    cache = PrefixCache(allocator)
    blocks = allocator.allocate_kv(4)
    assert blocks is not None
    tokens = [1, 1, 2, 2, 3, 3, 4, 4]
    cache.store(None, tokens[:4], blocks[:2], ahead=True)
    cache.release(cache.store(None, tokens[4:], blocks, num_known=2))  # from the host
    assert cache.drop_unwritten() == frozenset(blocks[:2])
    cache.check_integrity()
    assert cache.match(None, tokens) == []
    assert allocator.num_free == GEOMETRY.num_blocks


def test_prefixes_that_no_router_asks_for_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.engine.memory.prefix_cache._MOST_TOLD", 3)
    allocator = BlockAllocator(GEOMETRY)
    cache = PrefixCache(allocator)
    for i in range(9):
        known(cache, allocator, None, [i] * 8)
        cache.evict(4)
    assert len(cache._untold) == 3
    assert cache.told() == ()


class Copies:
    """Copies of nothing, of a byte each, which are made at once."""

    host_bytes = 1

    def save(self, blocks: Sequence[int]) -> Future[list[Any]]:
        saved: Future[list[Any]] = Future()
        saved.set_result([None for _ in blocks])
        return saved

    def restore(self, copies: Mapping[int, Any]) -> Callable[[], bool]:
        return lambda: True

    def wait(self) -> None:
        pass


def test_the_host_drops_what_an_adapter_computed_after_the_base_before_the_base() -> None:
    """Without the base's blocks before it, it is of no use, however often it was used."""
    allocator, memory = BlockAllocator(GEOMETRY), HostMemory[Any](3)
    cache = PrefixCache(allocator, token_seconds=lambda: 1.0)
    cache.host = HostTier(memory, Copies())
    blocks = allocator.allocate_kv(3)
    assert blocks is not None
    tokens = [1, 1, 2, 2, 3, 3]
    cache.store("a", tokens, blocks, active_from=4)
    for _ in range(4):
        cache.used(blocks[2:])
    cache.release(blocks)
    cache.save_idle()
    cache.save_idle()
    assert len(cache.on_host("a", tokens, active_from=4)) == 3
    victims = memory.room_for("b", 1, 0.0)
    assert victims == [[*block_names("a", tokens, BLOCK_TOKENS, active_from=4)][2]]


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.sampled_from([None, "a"]),
    st.sampled_from(["", "salt"]),
    st.sampled_from([0, 3, 8, NEVER]),
)
def test_routers_are_told_the_names_that_they_give_a_prompt(
    tokens: list[int], digest: str | None, salt: str, active_from: int
) -> None:
    active_from = 0 if digest is None else active_from
    allocator = BlockAllocator(replace(GEOMETRY, num_blocks=20))
    cache = PrefixCache(allocator)
    blocks = allocator.allocate_kv(len(tokens) // BLOCK_TOKENS)
    assert blocks is not None
    cache.release(cache.store(digest, tokens, blocks, salt, active_from=active_from))
    names = told_names(digest, tokens, BLOCK_TOKENS, salt=salt, active_from=active_from)
    assert cache.told() == names
    for other in (digest and "b", "more"):
        assert not set(names) & set(told_names(other, tokens, BLOCK_TOKENS, salt=f"{salt}x"))
    cache.evict(20)
    assert cache.told() == ()
