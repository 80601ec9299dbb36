"""What running requests will still need of the pool, and that admission which looks ahead ends preemption."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.engine.request import Request
from loray.engine.scheduling.scheduler import Admission, Growth, OutputLengths, blocks_wanted
from tests.engine.scheduling.simulation import BLOCK_TOKENS, Simulation


def wanted_step_by_step(running: list[Growth]) -> int:
    """The oracle: generate token after token."""
    most = now = sum(g.num_blocks for g in running)
    now -= 0
    for step in range(1, int(max(g.remaining for g in running)) + 1):
        blocks = 0
        for g in running:
            if g.remaining >= step:
                stored = g.num_tokens + step - 1
                blocks += max(g.num_blocks, -(-stored // BLOCK_TOKENS))
            else:
                blocks += g.num_shared_blocks
        most = max(most, blocks)
    return most - now


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(0, 3)), min_size=1, max_size=12),
)
def test_wanted_blocks_are_those_needed_to_half_a_block_for_each_request(kinds: list[tuple[int, int, int]]) -> None:
    running = [
        Growth(num_tokens, -(-num_tokens // BLOCK_TOKENS), min(shared, num_tokens // BLOCK_TOKENS), remaining)
        for num_tokens, remaining, shared in kinds
    ]
    needed, wanted = wanted_step_by_step(running), blocks_wanted(running, BLOCK_TOKENS)
    assert abs(wanted - needed) <= len(running) / 2


def test_an_output_is_expected_to_be_as_long_as_the_longer_ones_before_it() -> None:
    lengths = OutputLengths()
    assert (lengths.mean, lengths.remaining(0), lengths.remaining(500)) == (0, 128, 500)
    rng = random.Random(0)
    seen = [rng.randint(1, 100) for _ in range(200)]
    for n in seen:
        lengths.observe(n)
    latest = seen[-64:]
    assert lengths.mean == pytest.approx(sum(latest) / 64)
    for generated in range(120):
        longer = [n for n in latest if n > generated]
        expected = sum(longer) / len(longer) - generated if longer else generated
        assert lengths.remaining(generated) == pytest.approx(expected)


def crowd(prompt: int, ends: tuple[int, int], num_blocks: int) -> Simulation:
    """Requests that may generate up to 2,000 tokens, more than the pool holds; all end before."""
    sim = Simulation(
        num_blocks=num_blocks,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        step_s=0.013,
        token_s=0.0006,
    )
    sim.check_integrity = lambda: None  # type: ignore[method-assign]
    rng = random.Random(0)
    for _ in range(200):
        sim.add(prompt, 2000, ends=rng.randint(*ends))
    sim.run()
    assert set(sim.outcomes.values()) == {None}
    return sim


@pytest.mark.parametrize(
    ("prompt", "ends", "num_blocks", "share"),
    [(64, (200, 200), 600, 0.15), (64, (1, 200), 600, 0.15), (100, (1, 400), 1000, 0.15), (500, (5, 50), 2100, 0.3)],
)
def test_admission_that_looks_ahead_ends_the_thrash(
    monkeypatch: pytest.MonkeyPatch, prompt: int, ends: tuple[int, int], num_blocks: int, share: float
) -> None:
    """`share`: of the preemptions that remain. It does not cost time."""
    ahead = crowd(prompt, ends, num_blocks)
    monkeypatch.setattr(Admission, "_lasts", lambda self, request, running: True)
    full = crowd(prompt, ends, num_blocks)
    print(f"preemptions {full.scheduler.num_preemptions} -> {ahead.scheduler.num_preemptions}", end=", ")
    print(f"seconds {full.now:.0f} -> {ahead.now:.0f}")
    assert ahead.scheduler.num_preemptions <= share * full.scheduler.num_preemptions
    assert ahead.now <= full.now


def test_without_a_prefix_cache_a_full_block_costs_nothing_for_the_tokens_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    tokens = Request.tokens

    def reading(self: Request, start: int, stop: int) -> Sequence[int]:
        read.append(stop - start)
        return tokens(self, start, stop)

    sim = Simulation(enable_prefix_caching=False, max_num_batched_tokens=512)
    sim.add(num_prompt=400, max_tokens=60)
    sim.step()
    monkeypatch.setattr(Request, "tokens", reading)
    sim.run()
    assert max(read, default=0) <= BLOCK_TOKENS
