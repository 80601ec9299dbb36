"""The fair queue: who is next, what is charged, the bounds of the counters, and what tenants notice of each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loray.engine.request import Request, RequestState
from loray.engine.scheduling import fairness
from loray.engine.scheduling.fairness import MAX_OVERTAKES, FairQueue, token_weight
from loray.errors import Overloaded
from loray.spec import BATCH_PRIORITY, GenerateRequest, SamplingParams
from tests.fixtures.scheduling import Bound, Simulation, adapter


def waiting(arrival: int, tenant: str, *, priority: int = 0, num_prompt: int = 4) -> Request:
    spec = GenerateRequest(str(arrival), (1,) * num_prompt, SamplingParams(), tenant=tenant, priority=priority)
    return Request(spec, arrival, token_weight=1.0)


def queue_of(*requests: Request, lead: float = 0) -> FairQueue:
    queue = FairQueue(lead)
    for request in requests:
        queue.push(request)
    return queue


def take(queue: FairQueue, request: Request) -> None:
    """Compute the whole prompt of the request that `pick` gave."""
    queue.serve(request)
    queue.begin(request)
    queue.remove(request)


def serve_next(queue: FairQueue, num_input: int = 0) -> Request:
    request = queue.pick(lambda r: False)
    assert request is not None
    take(queue, request)
    queue.charge(request, num_input=num_input)
    return request


def drain(queue: FairQueue, *, num_output: int = 0, preferred: frozenset[Request] = frozenset()) -> list[Request]:
    """Take all requests; each is charged for its prompt and so many output tokens at once."""
    order = []
    while (request := queue.pick(preferred.__contains__)) is not None:
        take(queue, request)
        queue.charge(request, num_input=request.num_prompt_tokens, num_output=num_output)
        queue.leave(request)
        order.append(request)
    return order


def test_the_tenant_that_has_had_least_is_next_and_of_equals_who_asks_for_less() -> None:
    a = [waiting(i, "a", num_prompt=6) for i in range(3)]
    b = [waiting(i, "b", num_prompt=2) for i in range(3, 9)]
    order = drain(queue_of(*a, *b), num_output=1)  # 8 units a request of a, 4 of b
    assert [r.tenant for r in order] == list("babbabbab")
    assert [r for r in order if r.tenant == "b"] == b


def test_of_one_tenant_the_shortest_is_next_unless_a_longer_one_has_waited() -> None:
    long, short = waiting(0, "t", num_prompt=100), waiting(1, "t", num_prompt=10)
    queue = queue_of(long, short)
    assert queue.pick(lambda r: False) is short
    queue.charge(long, num_input=89)  # with 11 units left it is still the longer one
    queue.push(later := waiting(2, "t", num_prompt=12))
    assert drain(queue) == [short, long, later]


def test_idleness_is_no_credit() -> None:
    queue = queue_of(*(waiting(i, "busy") for i in range(10)))
    for _ in range(5):
        serve_next(queue, 100)
    queue.push(waiting(100, "late"))
    queue.push(waiting(101, "late"))
    assert queue.counter("late") == queue.counter("busy") == 500
    assert [r.tenant for r in drain(queue)][:4] == ["busy", "late", "busy", "late"]
    queue.push(waiting(102, "new"))  # nobody waits: as much as whoever left the queue last
    assert queue.counter("new") == queue.counter("busy")


def test_a_request_of_a_better_priority_is_next_whoever_asks_and_earns_no_credit_for_the_wait() -> None:
    queue = queue_of(waiting(0, "a"), waiting(1, "a", priority=-1), waiting(2, "b", priority=1), waiting(3, "c"))
    assert [r.arrival for r in drain(queue)] == [1, 3, 0, 2]
    behind = queue_of(*(waiting(i, "a") for i in range(4)), waiting(4, "b", priority=1))
    serve_next(behind, 50)
    behind.push(waiting(5, "b"))  # it waited behind its own choice of priority, and starts where a is
    assert behind.counter("b") == 50


def test_preference_stays_within_its_lead_and_overtakes_nobody_for_ever() -> None:
    cold = waiting(0, "cold")
    hot = [waiting(i, "hot") for i in range(1, 40)]
    roomy = queue_of(cold, *hot, lead=1e9)
    assert drain(roomy, preferred=frozenset(hot))[: MAX_OVERTAKES + 1] == [*hot[:MAX_OVERTAKES], cold]
    assert cold.num_overtaken == MAX_OVERTAKES

    cold = waiting(0, "cold")
    tight = queue_of(cold, *hot, lead=8)  # units of two requests
    order = drain(tight, preferred=frozenset(hot))
    assert order.index(cold) == 3  # at 0, 4 and 8 it may go, not at 12

    own = [waiting(i, "one") for i in range(12)]
    within = queue_of(*own)
    assert drain(within, preferred=frozenset(own[3:])) == [*own[3:11], *own[:3], own[11]]
    assert max(r.num_overtaken for r in own) == MAX_OVERTAKES

    cold, tired, last = waiting(0, "a"), waiting(1, "b"), waiting(2, "b")
    tired.num_overtaken = MAX_OVERTAKES
    assert queue_of(cold, tired, last, lead=1e9).pick({last}.__contains__) is cold
    high, low = waiting(1, "a", priority=-1), waiting(0, "b")
    assert queue_of(high, low, lead=1e9).pick({low}.__contains__) is high, "a better priority is never passed"


def test_cancelled_requests_leave_the_order_whole() -> None:
    a, b = [waiting(i, "a") for i in range(4)], [waiting(i, "b") for i in range(4, 8)]
    queue = queue_of(*a, *b)
    for request in (a[0], a[2], *b):
        queue.remove(request)
    assert drain(queue) == [a[1], a[3]]


def test_tenants_that_have_gone_are_forgotten() -> None:
    queue = FairQueue()
    for i in range(10_000):
        queue.push(waiting(i, f"tenant-{i}"))
        drain(queue)
    assert len(queue._counters) < 2_000
    queue.push(waiting(0, "standing", priority=1))
    for i in range(10_000):  # each goes to the front of a queue that is never empty
        queue.push(waiting(i + 1, "standing"))
        serve_next(queue)
    assert len(queue._order) < 100


class Twin:
    """Two queues with the same requests; one forgets tenants. It takes what the other picks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fairness, "_FORGET_ABOVE", 1 << 30)
        self.exact = FairQueue(lead=5)
        monkeypatch.setattr(fairness, "_FORGET_ABOVE", 1)
        self.forgetful = FairQueue(lead=5)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_requests = 0

    def push(self, tenant: str, priority: int) -> None:
        self.num_requests += 1
        request = waiting(self.num_requests, tenant, priority=priority)
        self.waiting.append(request)
        for queue in (self.exact, self.forgetful):
            queue.push(request)

    def take(self, num_input: int) -> None:
        request = self.exact.pick(lambda r: False)
        if request is not None:
            self.waiting.remove(request)
            self.running.append(request)
            request.num_input_charged = num_input
            for queue in (self.exact, self.forgetful):
                take(queue, request)
                queue.charge(request, num_input=num_input)

    def cancel(self, i: int) -> None:
        if self.waiting:
            request = self.waiting.pop(i % len(self.waiting))
            for queue in (self.exact, self.forgetful):
                queue.remove(request)

    def end(self, i: int, num_output: int, *, fails: bool) -> None:
        if self.running:
            request = self.running.pop(i % len(self.running))
            for queue in (self.exact, self.forgetful):
                if not fails:
                    queue.charge(request, num_output=num_output)
                queue.leave(request)
                if fails:
                    queue.refund(request, num_input=request.num_input_charged)

    def counters(self) -> list[tuple[float, float]]:
        """Of the waiting tenants: exact, and of the queue that forgets."""
        return [(self.exact.counter(r.tenant), self.forgetful.counter(r.tenant)) for r in self.waiting]


ACTS = st.sampled_from(["push", "push", "take", "end", "cancel"])
NUMBERS = st.integers(1, 60)
TENANTS = st.sampled_from("abcdefgh")
PRIORITIES = st.sampled_from([0, 0, 1])


@pytest.mark.parametrize("refunds", [False, True])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_tenant_that_was_forgotten_wins_nothing_by_coming_back(refunds: bool, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        twin = Twin(monkeypatch)
        draw = data.draw
        for _ in range(draw(NUMBERS)):
            match draw(ACTS):
                case "push":
                    twin.push(draw(TENANTS), draw(PRIORITIES))
                case "take":
                    twin.take(draw(NUMBERS))
                case "end":
                    twin.end(draw(NUMBERS), draw(NUMBERS), fails=refunds and draw(st.booleans()))
                case "cancel":
                    twin.cancel(draw(NUMBERS))
            for exact, forgetful in twin.counters():
                assert forgetful >= exact if refunds else forgetful == exact


def test_nobody_is_forgotten_who_may_be_next_when_a_better_priority_has_gone() -> None:
    """A tenant with a large counter has the best priority; one with a small counter waits until it has gone."""
    queue = FairQueue()
    for i, (tenant, served) in enumerate({"idle": 150, "rich": 900, "low": 100, "high": 1000}.items()):
        queue.charge(waiting(i, tenant), num_input=served)
    high = waiting(10, "high", priority=-1)
    queue.push(waiting(9, "low"))
    queue.push(high)
    queue._forget()
    queue.remove(high)
    queue.push(waiting(12, "idle"))
    assert queue.counter("idle") == 150


def test_who_was_forgotten_wins_nothing_where_the_smallest_counter_falls() -> None:
    queue = queue_of(first := waiting(0, "a"), waiting(1, "a"))
    take(queue, first)
    queue.charge(first, num_input=100)
    queue.charge(waiting(2, "idle"), num_input=80)
    queue._forget()
    queue.leave(first)
    queue.refund(first, num_input=100)
    queue.push(waiting(3, "idle"))
    assert (queue.counter("a"), queue.counter("idle")) == (0, 80)


def test_a_refund_gives_back_the_charge_and_no_credit_for_idleness() -> None:
    def charged(*more: Request) -> tuple[FairQueue, Request]:
        """A request of "a" has been charged 100 and one of "b" 60; one of "b" waits, and the requests in `more`."""
        queue = queue_of(first := waiting(0, "a"), waiting(1, "b"), waiting(2, "b"), *more)
        for num_input in (100, 60):
            queue.leave(serve_next(queue, num_input))
        return queue, first

    queue, _ = charged(waiting(3, "a"))
    assert [r.tenant for r in drain(queue)] == ["b", "a"]
    queue, failed = charged(waiting(3, "a"))
    queue.refund(failed, num_input=100)
    assert queue.counter("a") == 0
    assert [r.tenant for r in drain(queue)] == ["a", "b"]

    queue, failed = charged()
    queue.push(waiting(3, "a"))  # it had nothing to ask for until "b" was at 60
    queue.refund(failed, num_input=100)
    assert queue.counter("a") == queue.counter("b") == 60


def test_a_token_of_an_adapter_weighs_what_it_reads() -> None:
    assert token_weight(0, 1000) == 1
    assert token_weight(50, 1000) == 1.05
    sim = Simulation(max_num_seqs=1, token_weight=lambda r: 3.0 if r.adapter is not None else 1.0)
    for _ in range(40):
        sim.add(2, 4, adapter("heavy"))
        sim.add(2, 4, tenant="light")
    sim.run(until=lambda: len(sim.started) >= 40)
    num_light = sum(r.tenant == "light" for r in sim.started)
    assert num_light == 30  # three for each of the others


def test_cached_prompts_and_recomputation_are_free() -> None:
    sim = Simulation(max_num_seqs=1)
    for tenant in ("first", "again"):
        request = sim.add(tenant=tenant)
        request.spec = replace(request.spec, prompt_ids=tuple(range(21)))
    sim.run()
    fair = sim.scheduler.waiting.fair
    assert fair.counter("first") == 21 + 4 * 2
    assert fair.counter("again") == 1 + 4 * 2  # 20 of the 21 tokens fill blocks of four

    tight = Simulation(num_blocks=6, max_num_seqs=2, enable_prefix_caching=False)
    tight.fill_up()
    for _ in range(2):
        tight.add(4, 12, tenant="t")
    tight.run()
    assert tight.scheduler.num_preemptions > 0
    assert tight.scheduler.waiting.fair.counter("t") == 2 * (4 + 12 * 2)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_backlogged_tenants_are_served_within_the_bound(data: st.DataObject) -> None:
    """With any requests, preemption, chunked prompts and preferred adapters."""
    draw = data.draw
    sizes = st.tuples(st.integers(1, 12), st.integers(1, 10), st.integers(1, 10))
    tenants = {name: draw(st.lists(sizes, min_size=1, max_size=4)) for name in "abc"[: draw(st.integers(2, 3))]}
    budget = draw(st.integers(4, 24))
    sim = Simulation(
        num_blocks=draw(st.integers(12, 30)),
        max_num_seqs=draw(st.integers(1, 4)),
        max_num_batched_tokens=budget,
        enable_prefix_caching=False,
    )
    refs = [adapter(f"x{i}", 2) for i in range(4)]
    for warm in refs:  # on the host from now on: who waits for the store does not wait for service
        sim.add(adapter=warm, tenant="warm")
    sim.run()
    sim.most_output = sim.most_prompt = 0
    bound = Bound(sim, list(tenants), lead=budget)
    queued: dict[str, int] = dict.fromkeys(tenants, 0)
    for _ in range(150):
        for name, kinds in tenants.items():  # each always has more waiting than could start in one step
            while sum(r.tenant == name for r in sim.scheduler.waiting) < 5:
                num_prompt, max_tokens, ends = kinds[queued[name] % len(kinds)]
                ref = refs[(queued[name] // 2) % 4] if name != "a" else None
                sim.add(num_prompt, max_tokens, ref, tenant=name, ends=min(ends, max_tokens))
                queued[name] += 1
        sim.step()
        bound.watch()
    bound.check()


def test_prompts_of_3_and_of_100000_tokens_share_within_the_bound_of_one_step() -> None:
    """Tenants with long prompts, with short ones and with both wait all the time, beside one of worse priority. While
    there are places, the length of a prompt is not in the bound.
    """
    budget, num_long = 256, 100_000
    sim = Simulation(
        checks=False,
        num_blocks=1 << 18,
        max_num_seqs=200,
        max_num_batched_tokens=budget,
        enable_prefix_caching=False,
        step_s=0.005,
        token_s=0.0001,
        pair_s=1e-9,
        itl_slo_s=0.05,
    )
    kinds = {"long": [num_long], "short": [3], "mixed": [num_long, *[3] * 40, 500]}
    bound = Bound(sim, list(kinds), lead=0)
    waiting: dict[str, list[Request]] = {name: [] for name in kinds}
    low = sim.add(10, 1, tenant="low", priority=1)
    num_added = 0
    for _ in range(250):
        for name, sizes in kinds.items():
            waiting[name] = [r for r in waiting[name] if r.state is RequestState.WAITING]
            while len(waiting[name]) < (2 if name == "long" else 90):
                waiting[name].append(sim.add(sizes[num_added % len(sizes)], 2, tenant=name))
                num_added += 1
        sim.step()
        assert len(sim.scheduler.running) < 200
        bound.watch()
    sim.most_prompt = budget
    bound.check()
    assert bound.of_counters < 2 * budget + 2 * 200 * 2
    assert min(sim.served[name] for name in kinds) > 15_000
    assert low.state is RequestState.WAITING


@pytest.mark.parametrize("num_floods", [1, 3])
def test_who_asks_for_little_waits_for_one_request_of_each_other_tenant(num_floods: int) -> None:
    """A tenant with one request at a time beside floods: each starts after at most one request of every flood. Without
    fairness it would wait for the whole queue.
    """
    sim = Simulation(max_num_seqs=4, max_num_batched_tokens=32, step_s=1.0, checks=False)
    for _ in range(300):
        for flood in range(num_floods):
            sim.add(4, 8, tenant=f"flood-{flood}")
    for _ in range(20):
        asked_at, num_started = sim.now, len(sim.started)
        request = sim.add(4, 2, tenant="little")
        sim.run(until=lambda r=request: r in sim.outcomes)  # type: ignore[misc]
        assert sim.started.index(request) - num_started <= num_floods
        assert sim.first_token_at[request] - asked_at <= 8 * (num_floods + 1)
    assert len(sim.scheduler.waiting) > 100


def test_a_flood_of_long_answers_does_not_keep_all_places() -> None:
    sim = Simulation(max_num_seqs=4, num_blocks=1 << 12)
    loud = [sim.add(4, 600, tenant="loud") for _ in range(8)]
    sim.run(until=lambda: len(sim.scheduler.running) == 4)
    others = [sim.add(4, 20, tenant="other") for _ in range(3)]
    sim.run(until=lambda: all(r in sim.first_token_at for r in others[:2]), max_steps=6)
    assert others[2] not in sim.first_token_at, "two places each"
    assert sim.scheduler.num_preemptions == 2
    sim.run(until=lambda: others[2] in sim.outcomes, max_steps=50)
    sim.run()
    assert [len(r.output_ids) for r in (*loud, *others)] == [600] * 8 + [20] * 3
    assert set(sim.outcomes.values()) == {None}


@pytest.mark.parametrize("tenant", ["batches", "other"])
def test_lines_of_batches_give_place_to_people(tenant: str) -> None:
    """Also to those of their own tenant, one a step; and their places in a full queue."""
    sim = Simulation(max_num_seqs=3, max_queued=2)
    lines = []
    for _ in range(3):
        lines.append(sim.add(4, 300, tenant="batches", priority=BATCH_PRIORITY))
        sim.step()
    waiting = [sim.add(4, 300, tenant="batches", priority=BATCH_PRIORITY) for _ in range(2)]
    people = [sim.add(4, 10, tenant=tenant) for _ in range(2)]
    sim.run(until=lambda: all(r in sim.first_token_at for r in people), max_steps=6)
    assert sim.scheduler.num_preemptions == 2
    assert all(isinstance(sim.outcomes[line], Overloaded) for line in waiting)
    sim.run()
    assert [len(r.output_ids) for r in lines] == [300] * 3


@pytest.mark.parametrize(("tenant", "priority"), [("loud", 0), ("other", 1)])
def test_nobody_gives_place_to_the_own_tenant_nor_for_what_is_less_urgent(tenant: str, priority: int) -> None:
    sim = Simulation(max_num_seqs=2)
    for _ in range(2):
        sim.add(4, 50, tenant="loud")
    sim.step()
    late = sim.add(4, 4, tenant=tenant, priority=priority)
    for _ in range(10):
        sim.step()
    assert late not in sim.first_token_at
    assert not sim.scheduler.num_preemptions
