"""The engine with the CUDA C++ kernels, compiled for the CPU: adapters placed during steps, captured steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.model.batch import Batch
from loray.engine.model.decode_batch import DecodeBatch
from loray_kernels import DecodeStep, Parts, descriptors
from loray_kernels.cuda import graphs
from loray_kernels.cuda.tables import SPLIT
from loray_kernels.kv import DirectWriter
from tests.fixtures.engines import Spy, fill_up, make_engine, request, run, submit
from tests.fixtures.parity import CONFIGS, configs_for
from tests.fixtures.peft_adapters import Oracle, TestAdapter, make_adapter, make_adapters
from tests.fixtures.shim_ops import ShimOps
from tests.kernels.cuda.engines import decode_steps_of, mixture, served, use_reference, use_shim_ranks

SAMPLING: list[dict[str, Any]] = [  # all but the first are for the chooser
    {},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 2},
    {"temperature": 1.0, "seed": 5, "top_k": 20, "top_p": 0.9},
    {"min_tokens": 3, "logit_bias": {7: 2.0}, "bad_words": ((8,),)},
]


def logits_of(engine: Engine, *requests: Any) -> dict[str, Tensor]:
    spy = Spy(engine)
    run(engine, requests)
    return {name: torch.stack(rows) for name, rows in spy.logits.items()}


@pytest.mark.parametrize(
    ("sizes", "replayed", "kv_cache_dtype"),
    [
        ((1, 2, 4, 8), [8, 8, 4, 4, 2, 1], "auto"),
        ((2, 16), [16, 16, 16, 16, 2, 2], "auto"),
        ((2, 16), [16, 16, 16, 16, 2, 2], "int8"),
    ],
)
def test_decode_steps_of_the_base_are_replayed_and_give_what_they_would_have_given(
    base: BaseModel,
    ops: ShimOps,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, ...],
    replayed: list[int],
    kv_cache_dtype: str,
) -> None:
    """Five requests that end one after the other, with contexts on both sides of a block's end."""
    monkeypatch.setattr(graphs, "SIZES", sizes)
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE,))
    requests = [request(str(i), range(3, 9 + 7 * i), max_tokens=3 + i) for i in range(5)]
    recorded = make_engine(base, kv_cache_dtype=kv_cache_dtype)
    ops.captures_steps = False
    eager = make_engine(base, kv_cache_dtype=kv_cache_dtype)
    expected, got = logits_of(eager, *requests), logits_of(recorded, *requests)
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, atol=1e-5, rtol=1e-5)
    assert ops.replayed == replayed


@pytest.mark.parametrize(
    "architecture", ["MistralForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"]
)
def test_a_familys_replayed_steps_give_the_logits_of_peft(
    tiny_base: Callable[..., BaseModel],
    ops: ShimOps,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    tmp_path: Path,
) -> None:
    """Windows, soft caps, two RoPEs, norms of results, and parts of fused modules in the rows of a pair's B."""
    monkeypatch.setattr(graphs, "KINDS", (graphs.KINDS[-1],))
    base = tiny_base(architecture, **({"sliding_window": 24} if architecture == "MistralForCausalLM" else {}))
    names = ("lora-r16", "dora", "vera-all", "longlora", "ia3-outputs", "road-1")
    adapters = make_adapters(base, tmp_path, configs_for(base, {name: CONFIGS[name] for name in names}))
    engine, oracle, models = make_engine(base, adapters), Oracle(base, adapters), [None, *adapters]
    spy = Spy(engine)
    prompts = [[*range(3 * i, 20 + 5 * i)] for i in range(len(models))]
    jobs = [request(str(i), prompts[i], a, max_tokens=12) for i, a in enumerate(models)]
    tokens = run(engine, jobs, together=True)
    assert len(ops.replayed) >= 10
    for i, adapter in enumerate(models):
        expected = oracle.logits([*prompts[i], *tokens[str(i)]][:-1], adapter)[len(prompts[i]) - 1 :]
        torch.testing.assert_close(torch.stack(spy.logits[str(i)]), expected, atol=1e-4, rtol=1e-4)


def test_steps_with_a_prompt_are_not(base: BaseModel, adapters: list[TestAdapter], ops: ShimOps) -> None:
    engine = make_engine(base, adapters, max_num_batched_tokens=32)
    run(engine, [request("warm", range(3, 9), adapters[0], max_tokens=1)])
    run(engine, [request("short", range(9, 15), max_tokens=3), request("long", range(9, 69), max_tokens=1)])
    assert ops.replayed == []
    assert ops.uploaders[0].num_late > 0


def test_an_adapter_is_off_before_its_invocation_and_on_in_replayed_steps(
    base: BaseModel, ops: ShimOps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig

    invoked: dict[str, Any] = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [40, 41]}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **invoked)
    adapter = make_adapter(base, tmp_path / "adapter", config, seed=3, std=0.12)
    prompts = {"on": range(20, 50), "off": range(3, 30)}  # the second one has no invocation
    requests = [request(name, prompt, adapter, max_tokens=6) for name, prompt in prompts.items()]
    requests += [request(f"base {name}", prompt, max_tokens=6) for name, prompt in prompts.items()]
    got = run(make_engine(base, [adapter]), requests, together=True)
    assert ops.replayed
    assert (got["on"] == got["base on"], got["off"] == got["base off"]) == (False, True)
    use_reference(monkeypatch)
    assert got == run(make_engine(base, [adapter]), requests, together=True)


def test_rows_that_the_kernel_scatters_stand_where_copies_would_have_put_them(
    base: BaseModel, adapters: list[TestAdapter], ops: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(str(i), range(3, 9), adapter, max_tokens=4) for i, adapter in enumerate(adapters)]
    scattered = make_engine(base, adapters, graph_record_s=0)
    got = logits_of(scattered, *requests)
    monkeypatch.setattr(ops, "page_writer", DirectWriter)
    expected = logits_of(make_engine(base, adapters, graph_record_s=0), *requests)
    for name, want in expected.items():  # which of them share a step depends on when they have loaded
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-5)


def happened(engine: Engine, decode_steps: Sequence[DecodeBatch]) -> None:
    """What the engine's tests of recorded steps are about was there."""
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_evictions > 0
    assert stats.prefix_cache_hits > 0
    running = [{chunk.request.spec.request_id for chunk in batch.sampled} for batch in decode_steps]
    assert any(later - before for before, later in pairwise(running))
    assert any(before - later for before, later in pairwise(running))
    longest = [int(batch.step.positions.max()) for batch in decode_steps]
    assert max(longest) >= SPLIT > min(longest)


@pytest.mark.parametrize(
    ("names", "pool_bytes"),
    [
        pytest.param(["r2", "r7", "r70", "pattern", "one layer"], 270 << 10, marks=pytest.mark.slow),
        (["vera", "r2", "longlora", "vera too", "dora", "vera of one layer", "rope"], 305 << 10),
    ],
)
def test_steps_with_adapters_are_replayed_and_give_the_tokens_of_the_reference(
    base: BaseModel,
    mixed: dict[str, TestAdapter],
    ops: ShimOps,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    pool_bytes: int,
) -> None:
    """Requests join and leave; several share an adapter or use none, some have penalties, one has a context of two
    splits. The pool is so small that adapters and requests are evicted.
    """
    monkeypatch.setattr(graphs, "SIZES", (16,))
    own = [*(mixed[name] for name in names), None]
    requests = mixture(18, own, lambda i: 3 + 2 * (i % 5), SAMPLING)
    requests += [request(f"more {i}", range(3 + i, 12 + i), mixed["r7"], max_tokens=6) for i in range(6)]
    requests.insert(7, request("long", [3 + i % 90 for i in range(SPLIT - 4)], mixed["r2"], max_tokens=9))
    requests.insert(13, request("again", requests[7].prompt_ids, mixed["r2"], max_tokens=6))
    fields: dict[str, Any] = {"max_num_seqs": 12, "pool_bytes": pool_bytes}
    engine = make_engine(base, list(mixed.values()), **fields)
    fill_up(engine)
    decode_steps = decode_steps_of(engine, monkeypatch)
    got = served(engine, requests, joins=5)
    assert len(ops.replayed) == len(decode_steps) > 12
    happened(engine, decode_steps)
    use_reference(monkeypatch)
    other = make_engine(base, list(mixed.values()), **fields)
    fill_up(other)
    assert got == served(other, requests, joins=5)


@pytest.mark.parametrize("names", [("ia3", "dora", "r2"), ("road", "ia3", "r2")])
def test_steps_with_scales_of_outputs_are_replayed_too(
    base: BaseModel,
    mixed: dict[str, TestAdapter],
    ops: ShimOps,
    monkeypatch: pytest.MonkeyPatch,
    names: Sequence[str],
) -> None:
    adapters = [mixed[name] for name in names]
    requests = mixture(6, [*adapters, None], lambda i: 3 + 2 * (i % 5), SAMPLING)
    got = served(make_engine(base, adapters, max_num_seqs=6), requests, joins=3)
    assert len(ops.replayed) > 3
    use_reference(monkeypatch)
    assert got == served(make_engine(base, adapters, max_num_seqs=6), requests, joins=3)


def test_steps_are_replayed_on_every_rank_and_give_the_tokens_of_the_reference(
    base: BaseModel, mixed: dict[str, TestAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one rank. Requests join and leave; the pool is so small that adapters and requests are evicted, the same on
    both ranks, which is compared after each step.
    """
    monkeypatch.setattr(graphs, "SIZES", (8,))
    monkeypatch.setattr(graphs, "KINDS", (Parts.LORA, graphs.KINDS[-1]))
    ranks = use_shim_ranks(monkeypatch)
    own = [mixed[name] for name in ("vera", "r7", "longlora", "vera too", "dora", "vera of one layer", "pattern")]
    requests = mixture(8, [*own, None], lambda i: 3 + 2 * (i % 5), SAMPLING)
    requests += [request(f"more {i}", range(3 + i, 12 + i), mixed["r2"], max_tokens=5) for i in range(2)]
    fields: dict[str, Any] = {"max_num_seqs": 6, "pool_bytes": 200 << 10}
    engine = make_engine(base, list(mixed.values()), tensor_parallel_size=2, num_threads=1, **fields)
    try:
        decode_steps = decode_steps_of(engine, monkeypatch)
        got = served(engine, requests, joins=5)
    finally:
        engine.close()
    assert len(ranks) == 2
    for ops in ranks:
        assert len(ops.replayed) == len(decode_steps) > 6
    use_reference(monkeypatch)
    assert got == served(make_engine(base, list(mixed.values()), **fields), requests, joins=5)


def test_records_follow_rows_that_are_moved(base: BaseModel, mixed: dict[str, TestAdapter], ops: ShimOps) -> None:
    engine = make_engine(base, list(mixed.values()), graph_record_s=0)
    names = ["r70", "r7", "r2", "pattern", "one layer", "longlora", "dora"]
    for name in names:
        run(engine, [request(name, range(3, 9), mixed[name], max_tokens=1)])
    gone = next(a for a in engine.pool.residents if a.ref == mixed["r70"].ref)
    engine.pool.remove(gone)  # leaves gaps below the others
    places = {a.ref.name: a.extents for a in engine.pool.residents}
    moves = engine.pool.allocator.clear_run(engine.pool.allocator.num_free)
    assert moves is not None
    engine.pool.move(moves)
    assert any(a.extents != places[a.ref.name] for a in engine.pool.residents)
    descriptors = engine.pool.descriptors
    assert descriptors is not None
    for adapter in engine.pool.residents:
        assert adapter.descriptor is not None
        start, size = adapter.descriptor.start, adapter.descriptor.size
        written = descriptors._allocator.table.words[start : start + size]
        assert written.tolist() == [word for part in cast(Any, descriptors._words(adapter)) for word in part]


def test_requests_of_the_same_tokens_share_blocks_while_they_decode(
    base: BaseModel, adapters: list[TestAdapter], ops: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a block is full, the twin's is replaced, and soon taken by another request."""
    monkeypatch.setattr(graphs, "SIZES", (4,))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE, Parts.LORA))
    requests = [request(str(i), range(3, 13), [None, adapters[0]][i // 2], max_tokens=34) for i in range(4)]
    engine = make_engine(base, adapters)
    decode_steps = decode_steps_of(engine, monkeypatch)
    got = served(engine, requests, joins=4)
    assert len(ops.replayed) == len(decode_steps) > 30
    use_reference(monkeypatch)
    assert got == served(make_engine(base, adapters), requests, joins=4)


def test_what_is_recorded_for_adapters_with_more_serves_the_others(
    base: BaseModel, adapters: list[TestAdapter], ops: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "SIZES", (4,))
    requests = [request(str(i), range(3 + i, 13), [None, adapters[0]][i % 2], max_tokens=4 + 3 * i) for i in range(3)]
    engine = make_engine(base, adapters, graph_bytes=1)
    assert [shape.kind for shape in cast(Any, engine._model)._captures._captured] == [graphs.KINDS[-1]]
    decode_steps = decode_steps_of(engine, monkeypatch)
    got = served(engine, requests, joins=3)
    assert len(ops.replayed) == len(decode_steps) >= 8
    use_reference(monkeypatch)
    assert got == served(make_engine(base, adapters), requests, joins=3)


def test_after_a_step_without_memory_the_tables_are_sent_again(
    base: BaseModel, ops: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step in which new blocks would have been sent fails its longest request."""
    monkeypatch.setattr(graphs, "SIZES", (4,))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE,))
    requests = [request(str(i), range(3 + i, 15 + i), max_tokens=12) for i in range(2)]
    engine = make_engine(base)
    compute, failed = graphs.DecodeGraphs.__call__, list[int]()

    def without_memory(captured: graphs.DecodeGraphs, step: DecodeStep) -> Tensor:
        if step.places and step.positions.max() >= 16 and not failed:
            failed.append(len(step.token_ids))
            raise torch.OutOfMemoryError
        return compute(captured, step)

    monkeypatch.setattr(graphs.DecodeGraphs, "__call__", without_memory)
    submit(engine, requests)
    out: dict[str, list[int]] = {"0": [], "1": []}
    while engine.has_work:
        for token in engine.step():
            out[token.request_id].append(-1 if token.token_id is None else token.token_id)
    assert failed == [2]
    use_reference(monkeypatch)
    expected = run(make_engine(base), requests)
    gone = next(name for name, tokens in out.items() if tokens[-1] == -1)
    assert out[gone] == [*expected.pop(gone)[: len(out[gone]) - 1], -1]
    assert {name: out[name] for name in expected} == expected


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of rank 70 has too many for a record."""
    monkeypatch.setattr(descriptors, "MAX_ROWS", 64)


def noted(monkeypatch: pytest.MonkeyPatch, engine: Any) -> list[tuple[bool, set[str]]]:
    """Of steps from now on in which requests decode: whether it is captured, and whose it is."""
    launch, found = engine._model.forward, list[tuple[bool, set[str]]]()

    def forward(batch: Batch | DecodeBatch, *arguments: Any) -> Any:
        if all(chunk.num_tokens == 1 and chunk.request.output_ids for chunk in batch.chunks):
            found.append((isinstance(batch, DecodeBatch), {c.request.request_id for c in batch.chunks}))
        return launch(batch, *arguments)

    monkeypatch.setattr(engine._model, "forward", forward)
    return found


def requests_of(mixed: dict[str, TestAdapter]) -> list[Any]:
    own = [mixed["r2"], mixed["r70"], None, mixed["r7"], mixed["vera"]]
    return mixture(10, own, lambda i: 12 + i % 5, [{}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.3}])


def is_fair(steps: list[tuple[bool, set[str]]]) -> bool:
    """Rows without a descriptor are in no captured step, and no step of theirs has others; both come by turns."""
    apart = {"1", "6"}
    together = [(recorded, own) for recorded, own in steps if own & apart and own - apart]
    as_they_should = all(recorded != bool(own & apart) for recorded, own in steps)
    return not together and as_they_should and len({recorded for recorded, own in steps}) == 2


@pytest.mark.usefixtures("few_rows")
def test_an_adapter_without_a_record_leaves_the_others_in_recorded_steps(
    base: BaseModel, mixed: dict[str, TestAdapter], ops: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are the reference's, in a pool so small that requests are preempted."""
    requests, fields = requests_of(mixed), {"max_num_seqs": 6, "pool_bytes": 280 << 10}
    engine = make_engine(base, list(mixed.values()), **fields)
    fill_up(engine)
    steps = noted(monkeypatch, engine)
    got = served(engine, requests, joins=5)
    assert is_fair(steps)
    assert len(ops.replayed) == sum(recorded for recorded, _ in steps)
    use_reference(monkeypatch)
    other = make_engine(base, list(mixed.values()), **fields)
    fill_up(other)
    assert got == served(other, requests, joins=5)


@pytest.mark.usefixtures("few_rows")
def test_a_step_without_memory_fails_a_request_of_its_own(
    base: BaseModel, mixed: dict[str, TestAdapter], ops: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest request has a record, and goes on."""
    engine = make_engine(base, list(mixed.values()))
    forward, failed = engine._model._forward, list[Batch]()

    def without_memory(batch: Batch, *arguments: Any) -> Any:
        if not failed and batch.chunks and all(c.num_tokens == 1 and c.request.output_ids for c in batch.chunks):
            failed.append(batch)
            raise torch.OutOfMemoryError
        return forward(batch, *arguments)

    monkeypatch.setattr(engine._model, "_forward", without_memory)
    submit(engine, [request("0", range(3, 40), mixed["r2"]), request("1", range(3, 9), mixed["r70"])])
    errors, num_tokens = list[str](), 0
    while engine.has_work:
        for token in engine.step():
            errors += [token.request_id] if token.error is not None else []
            num_tokens += token.request_id == "0" and token.token_id is not None
    assert (errors, num_tokens) == (["1"], 8)


@pytest.mark.usefixtures("few_rows")
def test_so_it_is_on_every_rank(
    base: BaseModel, mixed: dict[str, TestAdapter], ops: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "KINDS", (graphs.KINDS[-1],))
    ranks = use_shim_ranks(monkeypatch)
    engine = make_engine(base, list(mixed.values()), tensor_parallel_size=2, num_threads=1, max_num_seqs=6)
    try:
        steps = noted(monkeypatch, engine)
        got = served(engine, requests_of(mixed), joins=5)
    finally:
        engine.close()
    assert is_fair(steps)
    for own in ranks:
        assert len(own.replayed) == sum(recorded for recorded, _ in steps)
    use_reference(monkeypatch)
    assert got == served(make_engine(base, list(mixed.values()), max_num_seqs=6), requests_of(mixed), joins=5)
