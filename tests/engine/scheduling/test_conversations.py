"""Conversations over a bounded pool: how much of each turn's prompt is found, and how soon its first token comes."""

from __future__ import annotations

import heapq
import random
from statistics import median
from typing import Any, NamedTuple

from loray.engine.request import Request
from tests.fixtures.scheduling import BLOCK_TOKENS, Simulation, adapter

USERS, TURNS, ADAPTERS = 32, 8, 4
SYSTEM, MESSAGE, ANSWER = 128, 32, 32  # tokens; the system prompt is an adapter's
ADAPTER_BLOCKS = 8
# All conversations at their ends with the adapters take 1,088 blocks.
NUM_BLOCKS = 1000


class Talk(NamedTuple):
    """`hits`: of the prompts' tokens; `known`: those that a cache without bound would have, token by token."""

    hits: float
    known: float
    ttft_s: float


def talk(*, cached: bool = True, num_blocks: int = NUM_BLOCKS, **options: Any) -> Talk:
    """Each user thinks for some seconds before the next turn, which repeats what was said."""
    rng = random.Random(0)
    sim = Simulation(
        num_blocks=num_blocks,
        block_tokens=16,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        enable_prefix_caching=cached,
        checks=False,
        step_s=0.008,
        token_s=0.0008,
        **options,
    )
    refs = [adapter(f"a{i}", ADAPTER_BLOCKS) for i in range(ADAPTERS)]
    system = [tuple(range(1000 * (i + 1), 1000 * (i + 1) + SYSTEM)) for i in range(ADAPTERS)]
    said = [list(system[user % ADAPTERS]) for user in range(USERS)]
    due = [(rng.uniform(0, 4), user, 0) for user in range(USERS)]
    heapq.heapify(due)
    running: dict[Request, tuple[int, int]] = {}
    waited: list[float] = []
    came: dict[Request, float] = {}
    num_tokens = known = 0
    while due or running:
        if not running:
            sim.now = max(sim.now, due[0][0])
        while due and due[0][0] <= sim.now:
            at, user, turn = heapq.heappop(due)
            before = len(said[user]) - 1 if turn else SYSTEM * (user >= ADAPTERS)
            said[user] += [(user << 20) + (turn << 8) + i for i in range(MESSAGE)]
            request = sim.add(0, ANSWER, refs[user % ADAPTERS], prompt_ids=said[user])
            running[request], came[request] = (user, turn), at
            num_tokens, known = num_tokens + len(said[user]), known + before
        sim.step()
        for request in [r for r in running if r in sim.outcomes]:
            assert sim.outcomes[request] is None
            user, turn = running.pop(request)
            waited.append(sim.first_token_at[request] - came[request])
            said[user] += request.output_ids
            if turn + 1 < TURNS:
                heapq.heappush(due, (sim.now + rng.expovariate(1 / 4), user, turn + 1))
    assert len(waited) == USERS * TURNS
    return Talk(sim.scheduler.kv_cache.num_hits / num_tokens, known / num_tokens, median(waited))


def test_the_next_turn_finds_what_was_computed_for_the_last_one() -> None:
    with_cache, without = talk(), talk(cached=False)
    assert with_cache.hits >= 0.9 * with_cache.known
    assert with_cache.ttft_s <= 0.3 * without.ttft_s
    assert without.hits == 0


def test_a_host_tier_finds_what_a_third_of_the_pool_does_not_hold() -> None:
    small, tiered = talk(num_blocks=NUM_BLOCKS // 3), talk(num_blocks=NUM_BLOCKS // 3, has_host_tier=True)
    assert small.hits < 0.7 * small.known
    assert tiered.hits >= 0.9 * tiered.known
    assert tiered.ttft_s < 0.7 * small.ttft_s


def test_the_host_tier_keeps_within_its_bytes_and_gives_way_to_adapters() -> None:
    """A byte of an adapter is loaded again in a longer time than a block is computed."""
    bounded = talk(num_blocks=NUM_BLOCKS // 3, has_host_tier=True, host_bytes=400)
    unbounded = talk(num_blocks=NUM_BLOCKS // 3, has_host_tier=True)
    none = talk(num_blocks=NUM_BLOCKS // 3)
    assert none.hits < bounded.hits < unbounded.hits


def test_what_is_forgotten_on_its_way_from_the_host_is_not_kept() -> None:
    sim = Simulation(num_blocks=64, has_host_tier=True, copy_steps=lambda: 3)
    prompt = range(8 * BLOCK_TOKENS)
    sim.add(max_tokens=1, prompt_ids=prompt)
    sim.run()
    for _ in range(3):
        sim.step()
    sim.scheduler.prefix_cache.evict(64)
    sim.add(max_tokens=40)  # beside which the blocks come
    sim.step()
    asked = [sim.add(max_tokens=1, prompt_ids=prompt) for _ in range(2)]
    sim.step()
    assert sim.scheduler.kv_cache.fetched()
    sim.scheduler.kv_cache.forget(None)
    sim.run()
    assert [request.num_cached_tokens for request in asked] == [0, 7 * BLOCK_TOKENS]  # the second has the first one's


def test_prefixes_do_not_take_the_place_of_adapters_that_are_worth_more() -> None:
    sim = Simulation(num_blocks=64, has_host_tier=True, host_bytes=10, loads_at_once=False, step_s=0.1, token_s=0.001)
    ref = adapter("a", 8)
    sim.add(max_tokens=1, adapter=ref)
    sim.add(max_tokens=40)
    for _ in range(50):
        sim.step()
    sim.finish(ref.digest)
    sim.run()
    for i in range(4):
        sim.add(8 * BLOCK_TOKENS, max_tokens=1)
        for _ in range(3):
            sim.step()
        assert sim.adapter_manager.host_used <= 10, i
    assert sim.adapter_manager.counts.num_host_evictions == 0
