"""The pool: rows where the table says, also while they are written late; shared prefixes and runs in an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine import build
from loray.engine.engine import Engine
from loray.engine.pool.pool import Pool, ResidentAdapter
from loray.engine.request import TokenOutput
from loray.methods.weights import AdapterWeights, SharedProjection
from loray.spec import AdapterRef, GenerateRequest
from loray_kernels import Ops, PageCopy, PageWriter, backend
from loray_kernels.kv import DirectWriter
from tests.fixtures.engines import BLOCK_BYTES, Late, Spy, fill_up, ids, make_engine, outputs, request, run, submit
from tests.fixtures.packing import LAYOUT, check_rows, packer, weights
from tests.fixtures.peft_adapters import Adapters

Writer = Callable[[Tensor], PageWriter]


class LateWriter(Late):
    """A PageWriter that writes in `wait`."""

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self._direct = DirectWriter(pool)

    def write(self, rows_LE: Tensor, layer_offsets: Sequence[int], pieces: Sequence[PageCopy]) -> None:
        self.late.append(lambda: self._direct.write(rows_LE, layer_offsets, pieces))


@pytest.fixture(params=["direct", "late"])
def page_writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    """The page writer of every engine: one that writes at once, and one that delays every copy until it is waited for,
    as rows are written while steps run. Nothing reads or overwrites them before they are written.
    """
    if request.param == "direct":
        yield DirectWriter
        return
    writers: list[LateWriter] = []

    def page_writer(pool: Tensor) -> PageWriter:
        writers.append(LateWriter(pool))
        return writers[-1]

    def late_backend(name: str, device: object) -> Ops:
        ops = backend(name)
        ops.page_writer = page_writer  # type: ignore[method-assign]
        return ops

    monkeypatch.setattr(build, "backend", late_backend)
    yield page_writer
    assert any(writer.num_late for writer in writers)


def make_pool(page_writer: Writer, num_blocks: int = 40) -> Pool:
    return Pool(LAYOUT, num_blocks, dtype=torch.float32, device=torch.device("cpu"), page_writer=page_writer)


def place(pool: Pool, ref: AdapterRef, own: AdapterWeights) -> ResidentAdapter:
    resident = pool.place(ref, packer().pack(own))
    assert resident is not None
    return resident


def pair_of(pool: Pool, num_blocks: int) -> SharedProjection:
    """As many blocks for each of its matrices."""
    half = num_blocks * pool.geometry.block_size
    return SharedProjection(torch.rand(2, half // 2), torch.rand(half // 2, 2), "pair")


@pytest.mark.parametrize("ranks", [{0: 3, 1: 3, 2: 3, 3: 3}, {0: 2, 1: 5, 3: 2}])
def test_every_row_stands_where_the_table_says(ranks: dict[int, int], adapters: Adapters, page_writer: Writer) -> None:
    """Also in a pool with gaps, where an adapter's rows of one width are in several extents."""
    pool, ref = make_pool(page_writer), adapters["r2"].ref
    small = [place(pool, ref, weights({0: 1}, wide=w)) for w in (14, 6, 20, 6)]
    for resident in small[::2]:
        pool.remove(resident)
    own = weights(ranks)
    resident = place(pool, ref, own)
    pool.wait_for_rows()
    check_rows(pool, resident, own)


def test_rows_that_have_just_been_placed_make_way_for_a_pair(page_writer: Writer, adapters: Adapters) -> None:
    pool, ref = make_pool(page_writer, 12), adapters["r2"].ref
    lora = [weights(dict.fromkeys(range(4), 1), wide=20, narrow=20, seed=i) for i in range(3)]  # four blocks each
    residents = [place(pool, ref, w) for w in lora]
    for resident in residents[::2]:
        pool.remove(resident)
    place(pool, ref, AdapterWeights(modules={}, pair=pair_of(pool, 3)))
    pool.wait_for_rows()
    check_rows(pool, residents[1], lora[1])


def test_rows_of_an_adapter_that_has_gone_again_do_not_come_over_a_pair(
    page_writer: Writer, adapters: Adapters
) -> None:
    pool, ref = make_pool(page_writer, 4), adapters["r2"].ref
    pool.remove(place(pool, ref, weights(dict.fromkeys(range(4), 1), wide=20, narrow=20)))
    pair = pair_of(pool, 2)
    placed = place(pool, ref, AdapterWeights(modules={}, pair=pair)).pair
    pool.wait_for_rows()
    assert placed is not None
    assert torch.equal(placed.a_RI.data, pair.a_RI)
    assert torch.equal(placed.b_OR.data, pair.b_OR)


class Copies:
    """A page writer whose copies arrive when a test says so."""

    def __init__(self, pool: Tensor) -> None:
        self.direct, self.there, self.num_waits = DirectWriter(pool), 0, 0
        self._num = 0

    def write(self, *args: Any) -> None:
        self.direct.write(*args)

    def wait(self) -> None:
        self.num_waits += 1

    def arrival(self) -> Callable[[], bool]:
        self._num += 1
        own = self._num
        return lambda: self.there >= own


def test_a_step_waits_only_for_adapters_of_its_own_that_are_on_their_way(adapters: Adapters) -> None:
    made: list[Copies] = []

    def writer(pool: Tensor) -> PageWriter:
        made.append(Copies(pool))
        return made[-1]

    pool = make_pool(writer)
    (copies,) = made
    two = dict.fromkeys(range(4), 2)
    first, second, third = (place(pool, adapters["r2"].ref, weights(two, seed=i)) for i in range(3))
    copies.there = 1
    assert [pool.copy_is_done(a) for a in (first, second)] == [True, False]
    pool.wait_for([first])
    assert copies.num_waits == 0
    pool.remove(third)  # its blocks will be another's: they wait for its copy
    assert copies.num_waits == 1
    assert pool.copy_is_done(second)  # whatever is queued from now on sees it too
    pool.remove(first)
    pool.wait_for([second])
    assert copies.num_waits == 1


def all_of(engine: Engine, *requests: GenerateRequest) -> list[TokenOutput]:
    return list(outputs(engine, *requests))


def test_a_shared_system_prompt_is_computed_once(base: BaseModel) -> None:
    """Three blocks of sixteen tokens, and five tokens for each user."""
    system = ids(48)
    engine = make_engine(base)
    cached = [
        all_of(engine, request(str(i), system + ids(5, i), max_tokens=1))[0].num_cached_tokens for i in range(1, 5)
    ]
    assert cached == [0, 48, 48, 48]
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (4 * 53, 3 * 48)
    assert stats.step_tokens.sum == 53 + 3 * 5
    assert stats.num_prompt_tokens == 4 * 53
    assert (stats.blocks["cached"], stats.blocks["kv"]) == (3, 0)
    (whole,) = all_of(engine, request("whole", system, max_tokens=1))
    assert whole.num_cached_tokens == 32  # a token must be computed, so the third block is
    (answer,) = all_of(engine, request("next turn", ids(60, 9), max_tokens=1))
    assert answer.num_cached_tokens == 0


def test_what_was_answered_is_known_in_the_next_turn(base: BaseModel) -> None:
    engine = make_engine(base)
    first = ids(20)
    answer = run(engine, [request("first", first, max_tokens=30)])["first"]
    out = all_of(engine, request("second", first + answer + ids(10, 1), max_tokens=1))
    assert out[0].num_cached_tokens == 48  # of 20 + 29 tokens: the last one was never computed


def test_those_who_come_together_share_in_the_step_that_computes_it(base: BaseModel) -> None:
    requests = [request(str(i), ids(48) + ids(5, i), max_tokens=3) for i in range(4)]
    alone = [run(make_engine(base), [r])[r.request_id] for r in requests]
    engine = make_engine(base)
    for r in requests:
        engine.add(r)
    first = engine.step()
    engine.check_integrity()
    assert [out.num_cached_tokens for out in first] == [0, 48, 48, 48]
    assert engine.stats().blocks["kv"] == 3 + 4
    assert engine.stats().prefix_cache_hits == 3 * 48
    engine.add(request("late", ids(49), max_tokens=1))
    second = engine.step()
    assert {out.request_id: out.num_cached_tokens for out in second}["late"] == 48
    answers: dict[str, list[int | None]] = {}
    for out in [*first, *second, *outputs(engine)]:
        answers.setdefault(out.request_id, []).append(out.token_id)
    assert [answers[r.request_id] for r in requests] == alone


def test_a_prompt_in_chunks_takes_what_others_have_computed_of_it_meanwhile(base: BaseModel) -> None:
    """Two tenants are served by turns, so both prompts have begun before one has been computed."""
    prompt = ids(160)
    engine = make_engine(base, max_num_batched_tokens=40, max_num_seqs=4)
    both = [replace(request(name, prompt + ids(5, i), max_tokens=2), tenant=name) for i, name in enumerate("ab")]
    cached = {out.request_id: out.num_cached_tokens for out in outputs(engine, *both)}
    assert engine.stats().step_tokens.sum < 160 + 2 * 48
    assert sum(cached.values()) == engine.stats().prefix_cache_hits >= 128
    assert engine.stats().num_prompt_tokens == 2 * 165


def test_adapters_and_their_versions_share_nothing(base: BaseModel, adapters: Adapters) -> None:
    v1 = adapters["r2"]
    v2 = replace(v1, ref=replace(v1.ref, digest="2" * 64, version=2))
    renamed = replace(v1, ref=replace(v1.ref, name="another"))
    engine = make_engine(base, [*adapters.values(), v2])
    for i, adapter in enumerate([None, *adapters.values(), v2]):
        all_of(engine, request(str(i), ids(40), adapter, max_tokens=2))
    assert engine.stats().prefix_cache_hits == 0
    assert all_of(engine, request("same bytes", ids(40), renamed, max_tokens=1))[0].num_cached_tokens == 32


@pytest.mark.parametrize("num_blocks", [400, 21], ids=["roomy", "tight"])
@pytest.mark.usefixtures("page_writer")
def test_logits_are_the_same_bits_with_and_without_cached_prefixes(
    base: BaseModel, adapters: Adapters, num_blocks: int
) -> None:
    models = [None, adapters["r5"], adapters["longlora"], adapters["vera-a"]]
    requests = [request(str(i), ids(35, i % 4) + ids(3 + i, i), models[i % 4], max_tokens=14) for i in range(12)]
    logits = []
    for caching in (False, True):
        engine = make_engine(
            base,
            list(adapters.values()),
            pool_bytes=num_blocks * BLOCK_BYTES,
            max_num_batched_tokens=40,
            enable_prefix_caching=caching,
        )
        fill_up(engine)
        spy = Spy(engine)
        run(engine, requests[:4])
        run(engine, requests[4:])
        logits.append(spy.logits)
        assert (engine.stats().prefix_cache_hits > 0) == caching
        assert (engine.stats().num_preemptions > 0) == (num_blocks == 21)
    for name, expected in logits[0].items():
        assert torch.equal(torch.stack(logits[1][name]), torch.stack(expected))


def test_prefixes_go_before_idle_adapters_and_those_before_running_requests(
    base: BaseModel, adapters: Adapters
) -> None:
    engine = make_engine(base, list(adapters.values()), pool_bytes=12 * BLOCK_BYTES)
    engine.scheduler.prefix_cache._token_seconds = lambda: 0.0  # else what was measured decides
    run(engine, [request("idle", ids(4), adapters["r8"], max_tokens=1)])  # four blocks of rows
    run(engine, [request("cached", ids(60), max_tokens=1)])  # three full blocks
    assert engine.stats().blocks == {"free": 5, "kv": 0, "cached": 3, "layered": 4, "flat": 0, "run": 0}
    run(engine, [request("seven", ids(112, 1), max_tokens=1)])
    assert engine.stats().blocks["cached"] == 1 + 7
    assert engine.stats().num_evictions == 0
    run(engine, [request("nine", ids(144, 2), max_tokens=1)])
    assert engine.stats().num_evictions == 1
    assert engine.stats().num_preemptions == 0


def generating(engine: Engine, *requests: GenerateRequest) -> None:
    """Step until all requests have a token; their adapters are loaded before the first step."""
    waited = {r.request_id for r in requests}
    submit(engine, requests)
    while waited:
        waited -= {o.request_id for o in engine.step()}


@pytest.mark.usefixtures("page_writer")
def test_a_pair_comes_in_though_no_stretch_of_blocks_is_free(base: BaseModel, adapters: Adapters) -> None:
    """Rows and KV of running requests are moved, and no request is preempted."""
    stay = [request(f"kv {i}", ids(17, i), max_tokens=12) for i in range(6)]
    stay.append(request("rows", ids(17, 9), adapters["longlora"], max_tokens=12))
    come = request("pair", ids(17, 10), adapters["vera-c"], max_tokens=12)
    undisturbed = make_engine(base, list(adapters.values()))
    expected = Spy(undisturbed)
    run(undisturbed, [*stay, come])
    engine = make_engine(base, list(adapters.values()), pool_bytes=24 * BLOCK_BYTES, enable_prefix_caching=False)
    spy = Spy(engine)
    gone = [request(f"gone {i}", ids(17, 20 + i), max_tokens=12) for i in range(3)]
    generating(engine, stay[0], gone[0], stay[1], stay[6], gone[1], *stay[2:4], gone[2], *stay[4:6])
    for r in gone:
        engine.cancel(r.request_id)
    assert engine.pool.allocator.num_free == 7
    assert engine.pool.allocator.allocate_run(4) is None
    run(engine, [come])
    assert engine.stats().num_preemptions == 0
    for r in (*stay, come):
        assert torch.equal(torch.stack(spy.logits[r.request_id]), torch.stack(expected.logits[r.request_id]))
