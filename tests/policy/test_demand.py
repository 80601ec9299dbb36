"""What a replica measures: tokens asked for, capacity while saturated, the adapters in demand."""

from __future__ import annotations

import pytest

from loray.policy.demand import (
    MAX_KEYS,
    DemandMeter,
    EngineLoad,
    Observation,
    TrackedRequest,
    adapter_rank,
    key_of_rank,
)
from loray.policy.routing import routing_key
from loray.spec import AdapterBytes, AdapterRef
from tests.fixtures.calls import refused
from tests.fixtures.demand import adapter

WINDOW_S = 10.0
IDLE = EngineLoad(num_running=0, num_waiting=0, num_loading=0, num_tokens=0, kv_bytes=0.0)


class Meter:
    """A meter with its clock."""

    def __init__(self, *, max_num_seqs: int = 4) -> None:
        self.now = 100.0
        self.num_tokens = 0
        self.sizes: dict[str, AdapterBytes] = {}
        self.meter = DemandMeter(
            window_s=WINDOW_S, max_num_seqs=max_num_seqs, pool_bytes=1000.0, adapter_bytes=self._size, now=self.now
        )

    def _size(self, ref: AdapterRef) -> AdapterBytes:
        return self.sizes.get(ref.digest, AdapterBytes(ref.nbytes))

    def ask(self, prompt: int = 10, max_tokens: int = 100, ref: AdapterRef | None = None) -> TrackedRequest:
        return self.meter.arrived(prompt, max_tokens, ref, self.now)

    def answer(self, prompt: int = 10, output: int = 20, ref: AdapterRef | None = None) -> None:
        request = self.ask(prompt, output, ref)
        request.num_output_tokens = output
        self.meter.finished(request, self.now)

    def sample(self, load: EngineLoad, *, rate: int, seconds: int = 5) -> None:
        """Each second with so many tokens more."""
        for _ in range(seconds):
            self.meter.sample(load._replace(num_tokens=self.num_tokens), self.now)
            self.now += 1
            self.num_tokens += rate

    def observe(self) -> Observation:
        return self.meter.observe(self.now)


def test_a_request_is_demand_for_a_window_from_its_arrival() -> None:
    m = Meter()
    m.answer(10, 20)
    m.now += 6
    m.answer(1, 2)
    assert m.observe().tokens == 33
    m.now += 4.5
    assert m.observe().tokens == 3
    m.now += 10
    assert m.observe().tokens == 0


def test_what_waits_and_what_is_refused_is_demand_too() -> None:
    """A saturated engine computes no more, but demand grows with every request."""
    m = Meter()
    m.answer(10, 20)
    waiting = [m.ask(10, 100) for _ in range(3)]
    assert m.observe().tokens == 30 + 3 * (10 + 20)
    m.meter.refused(m.ask(10, 5), m.now)
    assert m.observe().tokens == 120 + 10 + 5  # at most its max_tokens
    waiting[0].num_output_tokens = 50  # more than the mean
    assert m.observe().tokens == 135 + 30


def test_requests_that_are_refused_again_and_again_are_no_more_demand() -> None:
    """Five clients retry every 1.2 seconds, for two windows."""
    m = Meter()
    m.answer(10, 20)
    m.now += WINDOW_S
    seen = []
    for _ in range(17):
        for _ in range(5):
            m.meter.refused(m.ask(10, 100), m.now)
        seen.append(m.observe().tokens)
        m.now += 1.2
    assert set(seen) == {5 * 30}
    m.now += WINDOW_S
    assert m.observe().tokens == 0


def test_an_old_request_counts_with_what_is_left_of_it() -> None:
    m = Meter()
    m.answer(10, 20)
    waiting, running = m.ask(10, 100), m.ask(10, 100)
    running.num_output_tokens = 5
    m.now += WINDOW_S + 1
    assert m.observe().tokens == (10 + 20) + (20 - 5)
    m.meter.finished(running, m.now)
    m.meter.rejected(waiting)
    assert m.observe().tokens == 0


def test_requests_that_move_to_another_replica_leave_the_sum_as_it_was() -> None:
    """Ten requests per second; after 20 s every second one goes to a new replica."""
    old, new = Meter(), Meter()
    sums = []
    for step in range(400):
        (old if step < 200 or step % 2 else new).answer(5, 5)
        old.now += 0.1
        new.now += 0.1
        if step >= 100:
            sums.append(old.observe().tokens + new.observe().tokens)
    assert min(sums) >= 980
    assert max(sums) <= 1020


def test_capacity_is_what_was_managed_while_saturated() -> None:
    m = Meter(max_num_seqs=4)
    for rate, num_running in ((500, 0), (80, 4), (500, 0), (500, 3)):
        m.sample(IDLE._replace(num_running=num_running), rate=rate)
    assert m.meter.capacity == pytest.approx(80)


def test_capacity_is_unknown_until_requests_wait_for_more_than_their_adapters() -> None:
    m = Meter()
    m.sample(IDLE._replace(num_running=1, num_waiting=3, num_loading=2), rate=1)
    assert (m.meter.capacity, m.observe().to_stats()["capacity"]) == (None, 0)
    m.sample(IDLE._replace(num_running=1, num_waiting=3), rate=50)
    assert m.meter.capacity == pytest.approx(50)


def test_capacity_follows_another_mix_of_requests() -> None:
    m = Meter()
    for rate, seconds in ((100, 30), (300, 60)):
        m.sample(IDLE._replace(num_running=4), rate=rate, seconds=seconds)
        assert m.meter.capacity == pytest.approx(rate, rel=0.05)


def test_a_replica_that_computed_nothing_while_saturated_has_no_capacity() -> None:
    """A rate of 0 would divide the demand by zero."""
    m = Meter()
    m.sample(IDLE._replace(num_running=1, num_waiting=3), rate=0)
    assert m.meter.capacity is m.observe().capacity is None


def test_the_backlog_is_what_waits_for_its_turn() -> None:
    m = Meter()
    m.answer(10, 20)
    computed, *waiting = [m.ask(prompt, 100) for prompt in (100, 40, 50)]
    assert m.observe().backlog == 0  # the engine has not been looked at
    m.meter.sample(IDLE._replace(num_running=1, num_waiting=2), m.now)
    assert m.observe().backlog == (40 + 20) + (50 + 20)
    computed.num_output_tokens = waiting[0].num_output_tokens = 1
    assert m.observe().backlog == 50 + 20
    m.meter.finished(waiting[1], m.now)
    assert m.observe().backlog == 0


def test_a_request_that_waits_for_its_adapters_load_is_no_backlog() -> None:
    """Another replica would have to load it as well, and from the same store."""
    m = Meter()
    held, cold = adapter(1), adapter(2)
    m.ask(10, 100, held)
    m.ask(20, 100, cold)
    m.ask(40, 100)
    m.meter.sample(IDLE._replace(num_waiting=3, num_loading=1), m.now)
    assert m.meter.observe(m.now, {held.digest}).backlog == 10 + 40


def test_what_is_computed_is_no_backlog_while_others_wait_for_their_loads() -> None:
    """The engine's waiting requests include those that wait for a load."""
    m = Meter()
    held, cold = adapter(1), adapter(2)
    m.ask(10, 100, held)
    m.ask(20, 100, cold)
    m.meter.sample(IDLE._replace(num_running=1, num_waiting=1, num_loading=1), m.now)
    assert m.meter.observe(m.now, {held.digest}).backlog == 0
    m.ask(40, 100, held)
    m.meter.sample(IDLE._replace(num_running=1, num_waiting=2, num_loading=1), m.now)
    assert m.meter.observe(m.now, {held.digest}).backlog == 40
    m.meter.sample(IDLE, m.now)  # before the engine has them
    assert m.meter.observe(m.now, {held.digest}).backlog == 0


def test_a_backlog_from_before_the_window_is_told_apart() -> None:
    m = Meter()
    m.ask(100, 100).num_output_tokens = 1
    m.ask(10, 100)
    m.now += WINDOW_S + 1
    m.ask(40, 100)
    m.meter.sample(IDLE._replace(num_running=1, num_waiting=2), m.now)
    seen = m.observe()
    assert (seen.tokens, seen.backlog, seen.old_backlog) == (10 + 40, 10 + 40, 10)
    assert Observation.from_stats(seen.to_stats()) == seen


def test_requests_under_way_and_kv_cache_are_means_over_the_window() -> None:
    m = Meter(max_num_seqs=4)
    m.sample(IDLE._replace(num_running=1, num_waiting=1, kv_bytes=300.0), rate=0, seconds=21)
    m.now -= 1
    seen = m.observe()
    assert seen.occupied_s / WINDOW_S == pytest.approx(2 / 4)
    assert seen.kv_byte_s / WINDOW_S == pytest.approx(300)


def test_the_working_set_is_what_was_asked_for_in_the_window() -> None:
    m = Meter()
    a, b, c = (adapter(i, nbytes=100) for i in range(3))
    m.answer(ref=a)
    long = m.ask(ref=b)
    m.now += 6
    m.answer(ref=c)
    m.answer(ref=None)
    m.sizes[c.digest] = AdapterBytes(64)  # it has been loaded, so its size in the pool is known
    key_a, key_b, key_c = (routing_key(ref.digest) for ref in (a, b, c))
    assert m.observe().adapters == {key_a: 100, key_b: 100, key_c: 64}
    m.now += 5
    assert set(m.observe().adapters) == {key_b, key_c}  # b's request is still under way
    m.meter.finished(long, m.now)
    m.now += 11
    assert m.observe().adapters == {}


def test_a_pair_that_adapters_share_is_named_once() -> None:
    m = Meter()
    pair = adapter(100).digest
    for i in range(3):
        m.sizes[adapter(i).digest] = AdapterBytes(10, (pair, 500))
        m.answer(ref=adapter(i))
    seen = m.observe()
    assert seen.pairs == {routing_key(pair): 500}
    assert set(seen.adapters.values()) == {10}
    assert all(isinstance(v, int | float) for v in seen.to_stats().values())  # as Serve wants it
    assert Observation.from_stats(seen.to_stats()) == seen
    refused(KeyError, "", Observation.from_stats, {"age_s": 1.0})


def test_of_many_adapters_those_are_named_that_every_replica_would_name() -> None:
    m = Meter()
    refs = [adapter(i) for i in range(4 * MAX_KEYS)]
    for ref in refs:
        m.answer(ref=ref)
    seen = m.observe()
    assert len(seen.adapters) == MAX_KEYS
    assert set(seen.adapters) == {routing_key(r.digest) for r in refs if adapter_rank(r.digest) < seen.sample}
    assert len(seen.adapters) / seen.sample == pytest.approx(len(refs), rel=0.2)


@pytest.mark.parametrize("rank", [0.0, 2**-52, 0.1, adapter_rank("8" + "0" * 15), 0.9, 1 - 2**-52, 1.0])
def test_keys_of_lower_rank_come_before_the_key_of_a_rank(rank: float) -> None:
    keys = [f"{rng:016x}" for rng in (0, 1 << 12, (1 << 63) - 1, 1 << 63, (1 << 63) + (1 << 12), (1 << 64) - 1)]
    assert [key < key_of_rank(rank) for key in keys] == [adapter_rank(key) < rank for key in keys]
