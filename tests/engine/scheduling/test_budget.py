"""How much of a prompt fits a step, against trying every size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loray.engine.request import Chunk, Request, StepWork
from loray.engine.scheduling.step_budget import ALONE, MIN_CHUNK, StepBudget, StepTimeModel
from loray.spec import GenerateRequest, SamplingParams

TARGET, MAX_TOKENS = 0.1, 512
LARGEST = StepWork(1, 64, 1 << 20, 4096, 1 << 30, 4096)


def known(*costs: float) -> StepTimeModel:
    steps = StepTimeModel()
    steps.costs, steps.largest = StepWork(*costs), LARGEST
    return steps


def prompt(num_tokens: int) -> Request:
    return Request(GenerateRequest("r", (1,) * num_tokens, SamplingParams()), 0)


costs = st.tuples(
    st.floats(0, 0.05),
    st.floats(0, 1e-3),
    st.floats(0, 1e-6),
    st.floats(0, 2e-3),
    st.floats(0, 1e-6),
    st.floats(0, 1e-3),
)


@given(costs, st.integers(0, 10_000), st.integers(1, 2000), st.integers(0, 32), st.booleans())
def test_a_chunk_is_the_largest_that_its_time_allows(
    costs: tuple[float, ...], start: int, num_pending: int, num_decoding: int, scored: bool
) -> None:
    steps = known(*costs)
    budget = StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
    for i in range(num_decoding):
        assert budget.decode(100, 1, num_decoding - 1 - i) == 1
    decoding = budget.work
    n = budget.fit(start, num_pending, scored=scored)
    target = TARGET if num_decoding else ALONE * TARGET
    room = max(target - steps.predict(decoding), target / 4)
    most = min(num_pending, MAX_TOKENS - num_decoding)

    def cost(n: int) -> float:
        pairs = n * start + n * (n + 1) // 2
        return steps.predict(StepWork(0, 0, start + n, n, pairs, n if scored else 0))

    def expected(room: float) -> int:
        fits = max((m for m in range(1, most + 1) if cost(m) <= room), default=0)
        if fits == most:
            return most
        return fits - fits % MIN_CHUNK if fits >= MIN_CHUNK else min(most, MIN_CHUNK)

    assert n in {expected(room * (1 - 1e-6)), expected(room * (1 + 1e-6))}


def test_a_step_that_gives_a_token_keeps_to_the_target() -> None:
    budget = StepBudget(known(0, 0, 0, 1e-3, 0, 0), max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
    assert budget.fit(0, 1000) == 400  # tokens in ALONE times the target
    short = prompt(3)
    budget.add(Chunk(short, 0, 3))
    assert budget.fit(0, 1000) == 96
    budget.add(Chunk(prompt(1000), 0, 96))
    assert budget.fit(0, 1000) == 0  # nobody is given less than MIN_CHUNK
    assert budget.work == StepWork(1, 0, 3 + 96, 3 + 96, 6 + 96 * 97 // 2)


def test_before_anything_is_measured_tokens_decide_and_then_chunks_grow_step_by_step() -> None:
    steps = StepTimeModel()
    assert StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET).fit(0, 1000) == MAX_TOKENS
    sizes = []
    for num_tokens in (3, 32, 64, 128):
        steps.observe(StepWork(1).plus(StepWork.of(0, num_tokens)), 0.01)
        budget = StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
        budget.decode(10, 1, 0)
        sizes.append(budget.fit(0, 1000))
    assert sizes == [16, 64, 128, 256]


def test_one_slow_step_does_not_keep_chunks_small() -> None:
    """What comes after it is short and alike, and does not show what more tokens would cost."""
    steps, sizes = StepTimeModel(), []
    steps.observe(StepWork(1).plus(StepWork.of(0, 64)), 40 * TARGET)  # adapters were loaded
    for _ in range(8):
        budget = StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
        budget.decode(10, 1, 0)
        sizes.append(n := budget.fit(64, 1000))
        budget.add(Chunk(prompt(1000), 64, n))
        steps.observe(budget.work, 0.01 + 0.0005 * n)
    assert sizes[0] == MIN_CHUNK
    assert 64 <= max(sizes) <= 0.09 / 0.0005


def test_what_took_more_than_half_of_the_target_is_not_doubled() -> None:
    steps = known(0, 0, 0, 1.0, 0, 0)
    budget = StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
    budget.decode(10, 1, 0)
    last = StepWork(1, 1, 100, 32, 1000)
    for seconds, expected in ((0.49 * TARGET, 64), (0.51 * TARGET, MIN_CHUNK)):
        steps.last_with_prompts = (last, seconds)
        assert budget.fit(0, 1000) == expected
    steps.last_with_prompts = (last._replace(num_decoded=0), 0.01)  # nobody decoded beside it
    assert budget.fit(0, 1000) == MIN_CHUNK


def test_forced_tokens_are_computed_together_and_leave_the_others_theirs() -> None:
    budget = StepBudget(StepTimeModel(), max_tokens=20, itl_slo_s=TARGET)
    assert budget.decode(100, 40, num_others=2) == MIN_CHUNK
    assert budget.decode(100, 40, num_others=1) == 3
    assert budget.decode(100, 1, num_others=0) == 1
    assert budget.fit(0, 10) == 0
