"""The engine with the CUDA C++ kernels, compiled for the CPU: adapters placed while steps run, recorded decode steps.

What needs a GPU is simulated: a copy on another stream is one that is delayed until it is waited for; a graph is a tape
of launches, see `tape`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.model.decode_batch import DecodeBatch
from loray.spec import RopeParameters
from loray_kernels import Parts
from loray_kernels.cuda import graphs
from loray_kernels.cuda.tables import SPLIT
from loray_kernels.kv import DirectWriter
from tests.fixtures.engines import Spy, fill_up, make_engine, request, run
from tests.fixtures.peft_adapters import TestAdapter
from tests.kernels.cuda.ranks import use_shim_ranks
from tests.kernels.cuda.shim_ops import ShimOps, use_shim_ops
from tests.kernels.cuda.steps import decode_steps_of, served, use_reference

SAMPLING: list[dict[str, Any]] = [  # all but the first are for the chooser
    {},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 2},
    {"temperature": 1.0, "seed": 5, "top_k": 20, "top_p": 0.9},
    {"min_tokens": 3, "logit_bias": {7: 2.0}, "bad_words": ((8,),)},
]


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    """Few steps are recorded before the start: each takes a tenth of a second."""
    monkeypatch.setattr(graphs, "SIZES", (16,))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE, Parts.LORA, graphs.KINDS[-1]))
    return use_shim_ops(monkeypatch)


@pytest.fixture(scope="session")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base("Qwen3ForCausalLM")


@pytest.fixture(scope="session")
def adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[TestAdapter]:
    from peft import LoraConfig

    from tests.fixtures.peft_adapters import make_adapter

    folder = tmp_path_factory.mktemp("adapters")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return [make_adapter(base, folder / str(i), config, seed=i) for i in range(2)]


def logits_of(engine: Engine, *requests: Any) -> dict[str, Tensor]:
    spy = Spy(engine)
    run(engine, requests)
    return {name: torch.stack(rows) for name, rows in spy.logits.items()}


@pytest.mark.parametrize(("sizes", "replayed"), [((1, 2, 4, 8), [8, 8, 4, 4, 2, 1]), ((2, 16), [16, 16, 16, 16, 2, 2])])
def test_decode_steps_of_the_base_are_replayed_and_give_what_they_would_have_given(
    base: BaseModel, ops: ShimOps, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], replayed: list[int]
) -> None:
    """Five requests that end one after the other, with contexts on both sides of a block's end."""
    monkeypatch.setattr(graphs, "SIZES", sizes)
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE,))
    requests = [request(str(i), range(3, 9 + 7 * i), max_tokens=3 + i) for i in range(5)]
    recorded = make_engine(base)
    ops.captures_steps = False
    eager = make_engine(base)
    expected, got = logits_of(eager, *requests), logits_of(recorded, *requests)
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, atol=1e-5, rtol=1e-5)
    assert ops.replayed == replayed


def test_steps_with_a_prompt_are_not(base: BaseModel, adapters: list[TestAdapter], ops: ShimOps) -> None:
    engine = make_engine(base, adapters, max_num_batched_tokens=32)
    run(engine, [request("warm", range(3, 9), adapters[0], max_tokens=1)])
    run(engine, [request("short", range(9, 15), max_tokens=3), request("long", range(9, 69), max_tokens=1)])
    assert ops.replayed == []
    assert ops.uploaders[0].num_late > 0


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


@pytest.fixture(scope="session")
def mixed(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TestAdapter]:
    """LoRA of several ranks, on different modules and layers; DoRA, VeRA of two pairs, LongLoRA."""
    from peft import LoraConfig, VeraConfig

    from tests.fixtures.peft_adapters import NORMS, make_adapter

    folder, attention = tmp_path_factory.mktemp("mixed"), ["q_proj", "k_proj", "v_proj", "o_proj"]
    configs = {
        "r2": LoraConfig(r=2, target_modules=attention),
        "r7": LoraConfig(r=7, target_modules=[*attention, "gate_proj", "up_proj", "down_proj"]),
        "r70": LoraConfig(r=70, target_modules=["k_proj", "down_proj"]),
        "pattern": LoraConfig(r=3, target_modules=["q_proj", "o_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5}),
        "one layer": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
        "dora": LoraConfig(r=4, target_modules=[*attention, "up_proj", "down_proj"], use_dora=True),
        "vera": VeraConfig(r=24, target_modules=["q_proj", "v_proj"], save_projection=False),
        "vera too": VeraConfig(r=24, target_modules=["q_proj", "v_proj"], save_projection=False),
        "vera of one layer": VeraConfig(
            r=21, target_modules=["q_proj"], layers_to_transform=[1], save_projection=False, projection_prng_key=3
        ),
        "rope": LoraConfig(r=3, target_modules=["q_proj"]),
        "longlora": LoraConfig(r=3, target_modules=attention, modules_to_save=["embed_tokens", *NORMS, "q_norm"]),
    }
    rope = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2.0)
    return {
        name: make_adapter(
            base,
            folder / name.replace(" ", "-"),
            config,
            seed=i,
            std=0.12,
            rope=rope if name in ("rope", "longlora") else None,
            num_token_rows=80,
        )
        for i, (name, config) in enumerate(configs.items())
    }


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
        pytest.param(["r2", "r7", "r70", "pattern", "one layer"], 280 << 10, marks=pytest.mark.slow),
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
    own = [*(mixed[name] for name in names), None]
    requests = [
        request(
            str(i), range(3 + i, 12 + i + 5 * (i % 7)), own[i % len(own)], max_tokens=3 + 2 * (i % 5), **SAMPLING[i % 4]
        )
        for i in range(18)
    ] + [request(f"more {i}", range(3 + i, 12 + i), mixed["r7"], max_tokens=6) for i in range(6)]
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
    requests = [
        request(
            str(i),
            range(3 + i, 12 + i + 5 * (i % 7)),
            [*own, None][i % 8],
            max_tokens=3 + 2 * (i % 5),
            **SAMPLING[i % 4],
        )
        for i in range(8)
    ] + [request(f"more {i}", range(3 + i, 12 + i), mixed["r2"], max_tokens=5) for i in range(2)]
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
    assert engine.pool._clear_run(engine.pool.allocator.num_free)
    assert any(a.extents != places[a.ref.name] for a in engine.pool.residents)
    descriptors = engine.pool.descriptors
    assert descriptors is not None
    for adapter in engine.pool.residents:
        assert adapter.descriptor is not None
        start, size = adapter.descriptor.start, adapter.descriptor.size
        written = descriptors._allocator.table.words[start : start + size]
        assert written.tolist() == [word for part in cast(Any, descriptors._words(adapter)) for word in part]
