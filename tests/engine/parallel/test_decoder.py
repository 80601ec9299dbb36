"""Tensor parallel: several ranks give the same results as one, send what the base alone sends, and end together."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from jsonschema import Draft202012Validator
from peft import IA3Config, LoraConfig, MissConfig, RoadConfig, VeraConfig

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.engine.engine import Engine
from loray.engine.memory.blocks import Geometry
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.shard import shard_adapter
from loray.engine.parallel.worker import LocalWorkers, WorkerArgs
from loray.engine.pool.packed import Packer
from loray.engine.pool.pool import Pool
from loray.errors import EngineError, RankLost, SpecError, UnsupportedError
from loray.methods.road import RoadWeights
from loray.methods.weights import AdapterWeights, ModuleKey
from loray.spec import Constraint, RopeParameters
from loray_kernels import KvLayout
from tests.engine.parallel.stranger import attack
from tests.fixtures.engines import Spy, for_each, make_engine, prompts, request, run
from tests.fixtures.forked_workers import ForkedWorkers
from tests.fixtures.guesses import Told
from tests.fixtures.parity import configs_for
from tests.fixtures.peft_adapters import ALL, ATTENTION, LINEAR_ROPE, NORMS, TestAdapter, make_adapter, make_adapters
from tests.fixtures.tiny import byte_tokenizer

# (ranks, architecture, tied): biases of q, k, v; norms of heads, and a vocabulary that the ranks do not divide; norms
# of results, soft caps and a window; q, k and v that checkpoints and adapters have as one
WORLDS = {
    "TP=2": (2, "Qwen2ForCausalLM", {"tie_word_embeddings": False}),
    "TP=4": (4, "Qwen3ForCausalLM", {"tie_word_embeddings": True, "vocab_size": 322}),
    "TP=2, Gemma 2": (2, "Gemma2ForCausalLM", {}),
    "TP=2, Phi 3": (2, "Phi3ForCausalLM", {}),
}
# Several ranks, subsets of modules and layers, a pair shared by modules of all widths.
ADAPTERS: dict[str, tuple[Any, RopeParameters | None]] = {
    "r16": (LoraConfig(r=16, target_modules=ALL), None),
    "alora": (  # its prompt is the third of `prompts`
        LoraConfig(r=6, target_modules=ALL, task_type="CAUSAL_LM", alora_invocation_tokens=prompts(3)[2][10:12]),
        None,
    ),
    "r6": (LoraConfig(r=6, target_modules=ALL), None),
    "patterns": (
        LoraConfig(r=4, target_modules=ALL[1:6], rank_pattern={"k_proj": 7}, layers_to_transform=[1]),
        None,
    ),
    "dora": (LoraConfig(r=6, use_dora=True, target_modules=ALL), None),
    "vera": (VeraConfig(r=16, target_modules=ALL, projection_prng_key=5), None),
    "vera-qv": (VeraConfig(r=32, target_modules=["q_proj", "v_proj"]), None),
    "miss": (MissConfig(r=9, target_modules=ALL), None),  # divides no rank's part of an input
    "longlora": (LoraConfig(r=8, target_modules=ALL[:4], modules_to_save=["embed_tokens", *NORMS]), LINEAR_ROPE),
    "ia3": (IA3Config(target_modules=ALL, feedforward_modules=["down_proj"]), None),
    "road": (RoadConfig(variant="road_4", group_size=8, target_modules=ALL), None),
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """One engine over several ranks, started once; `one` makes engines of one rank on the same base."""

    base: BaseModel
    adapters: list[TestAdapter]
    engine: Engine

    def one(self, **spec: object) -> Engine:
        return make_engine(self.base, self.adapters, num_threads=1, **spec)

    @property
    def communicator(self) -> Communicator:
        communicator = self.engine._model._communicator  # type: ignore[attr-defined]
        assert isinstance(communicator, Communicator)
        return communicator


@pytest.fixture(scope="module", params=WORLDS)
def world(
    request: pytest.FixtureRequest, tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    size, architecture, config = WORLDS[request.param]
    base = tiny_base(architecture, num_attention_heads=8, num_key_value_heads=4, **config)
    adapters = make_adapters(base, tmp_path_factory.mktemp("adapters"), configs_for(base, ADAPTERS))
    # Small, so that adapters leave and come back, and gaps are closed. An adapter is not much smaller on more ranks.
    spec: dict[str, Any] = {"tensor_parallel_size": size, "num_threads": 1, "pool_bytes": 12 * size << 14}
    engine = make_engine(base, adapters, workers=ForkedWorkers, **spec)
    yield World(base, adapters, engine)
    engine.close()


def test_ranks_give_what_one_gives(world: World) -> None:
    requests = for_each([None, *world.adapters, None], max_tokens=4)
    one = world.one()
    alone, together = Spy(one), Spy(world.engine)
    expected = run(one, requests, together=True)
    assert run(world.engine, requests) == expected
    assert one.stats().max_adapters_in_step == len(world.adapters)
    for i, logits in alone.logits.items():
        torch.testing.assert_close(torch.stack(together.logits[i]), torch.stack(logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("world", ["TP=2", "TP=2, Gemma 2"], indirect=True)
def test_ranks_compute_what_is_guessed(world: World) -> None:
    requests = for_each([None, *world.adapters], max_tokens=8)
    expected = run(world.one(), requests, together=True)
    Told(world.engine, expected)
    before = world.engine.stats()
    try:
        assert run(world.engine, requests) == expected
    finally:
        world.engine.scheduler.speculation = None
    assert world.engine.stats().num_accepted_tokens > before.num_accepted_tokens


def test_more_than_two_ranks_guess_nothing(world: World) -> None:
    """Where they add up a token's values in an order of its own, it would have other bits among guesses."""
    assert world.engine._model.is_batch_invariant == (world.communicator.shard.world_size == 2)


@pytest.mark.parametrize("world", ["TP=4"], indirect=True)
def test_ranks_hold_an_answer_to_its_constraint(world: World) -> None:
    schema = {"type": "array", "items": {"enum": ["a", 1, None]}, "maxItems": 4}
    constraint = Constraint.from_schema(schema, whitespace="")
    params: dict[str, Any] = {"temperature": 1.0, "seed": 2}
    requests = [
        request("held", range(9), world.adapters[0], structured=constraint, max_tokens=60, **params),
        request("free", range(9), max_tokens=20, **params),
    ]
    expected = run(world.one(), requests)
    assert run(world.engine, requests) == expected
    *answer, end = expected["held"]
    assert end == 258
    Draft202012Validator(schema).validate(json.loads(byte_tokenizer().decode(answer)))


@pytest.mark.parametrize("world", ["TP=2"], indirect=True)
def test_a_full_pool_is_the_same_on_every_rank(world: World) -> None:
    """Adapters are evicted and placed again, requests preempted; `run` compares the ranks' pools after each step."""
    ids = prompts(4)
    requests = [request(str(i), ids[i % 4], a, max_tokens=20) for i, a in enumerate(world.adapters)]
    engine, expected = world.engine, run(world.one(), requests)
    before = engine.stats().num_evictions
    assert run(engine, requests) == expected
    assert engine.stats().num_evictions > before
    engine.check_integrity()
    assert run(engine, requests) == expected


class CountedGroup:
    """A process group; `calls` has its collectives: name, shape and dtype of what the rank gives."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.calls: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            (given,) = arguments[0] if name == "allreduce" else arguments[1]
            self.calls.append((name, tuple(given.shape), given.dtype))
            return getattr(self._group, name)(*arguments)

        return call


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_adapters_bring_no_collectives_of_their_own(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """A layer sums the results of o and of down, in the base's dtype, and the head's logits are gathered. In the last
    layer all but q, k and v is computed for a prompt's last token alone.
    """
    config, group = world.base.config, CountedGroup(world.communicator._data)
    monkeypatch.setattr(world.communicator, "_data", group)
    adapter = next((a for a in world.adapters if a.ref.name == name), None)
    num_tokens, others = 19, config.num_layers - 1
    ids = [1 + [None, *ADAPTERS].index(name)] * num_tokens  # no prefix that is known
    run(world.engine, [request("one", ids, adapter, max_tokens=2)])
    logits = ("gather", (1, -(-config.vocab_size // world.communicator.shard.world_size)), torch.float32)
    expected = []
    for layers in ([num_tokens] * others + [1], [1] * config.num_layers):  # the prompt's step, and one that decodes
        expected += [("allreduce", (rows, config.hidden_size), torch.float32) for rows in layers for _ in range(2)]
        expected.append(logits)
    assert group.calls == expected


def test_a_rank_has_all_of_what_it_multiplies(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    """A of column-parallel modules and B of row-parallel ones are whole on every rank; all else is split. That is what
    the pool's extents hold.
    """
    base, size, r = tiny_base(), 2, 6
    adapter = make_adapter(base, tmp_path / "r6", LoraConfig(r=r, target_modules=ALL), seed=1)
    layout = KvLayout(base.config.num_layers, 16, base.config.num_kv_heads, base.config.head_dim)
    pools = [
        Pool(layout._replace(num_kv_heads=layout.num_kv_heads // n), 99, dtype=torch.float32, device=CPU)
        for n in (1, size)
    ]
    packer = Packer(pools[0].geometry, torch.float32, torch.zeros(1, 8))
    packed = packer.pack(adapter.load(base))
    sharded = shard_adapter(packed, pools[0].geometry, pools[1].geometry, size)
    ((_, matrices),) = sharded.shape.groups
    expected = {}
    for module in ALL:
        outputs, inputs = base.config.module_shape(module)
        row_parallel = module in ("o_proj", "down_proj")
        expected[module, "lora_a"] = (r, inputs // size if row_parallel else inputs)
        expected[module, "lora_b"] = (r, outputs if row_parallel else outputs // size)
    assert {(m.module, m.role): (m.rows, m.width) for m in matrices} == expected
    elements = base.config.num_layers * sum(rows * width for rows, width in expected.values())
    assert sharded.nbytes == size * elements * 4
    resident = pools[1].place(adapter.ref, sharded)
    assert resident is not None
    assert sum(e.rows * e.width for e in resident.extents) * base.config.num_layers == elements


def test_ranks_have_their_heads_of_keys_and_values_in_int8(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    """An element between two whole numbers may be rounded either way, so a few logits are further off."""
    base = tiny_base("Qwen3ForCausalLM", num_attention_heads=8, num_key_value_heads=4)
    adapters = make_adapters(base, tmp_path, {"r6": ADAPTERS["r6"]})
    requests = for_each([None, *adapters], max_tokens=8)
    spec: dict[str, Any] = {"num_threads": 1, "kv_cache_dtype": "int8"}
    one = make_engine(base, adapters, **spec)
    two = make_engine(base, adapters, workers=ForkedWorkers, tensor_parallel_size=2, **spec)
    try:
        assert two.pool.geometry.num_tokens == one.pool.geometry.num_tokens
        alone, together = Spy(one), Spy(two)
        assert run(two, requests) == run(one, requests)
    finally:
        two.close()
    for i, logits in alone.logits.items():
        error = (torch.stack(together.logits[i]) - torch.stack(logits)).abs().amax(1)
        assert error.median() < 1e-4
        assert error.max() < 1e-2


def test_pairs_on_two_ranks_are_refused() -> None:
    module = RoadWeights(torch.zeros(16), torch.ones(16), "road_1", 32)
    whole, local = (Geometry(9, 2, 16, 2 * 16 * heads * 16) for heads in (2, 1))
    packer = Packer(whole, torch.float32, torch.zeros(1, 8))
    of_o, of_k = (packer.pack(AdapterWeights({ModuleKey(0, name): module})) for name in ("o_proj", "k_proj"))
    shard_adapter(of_o, whole, local, 2)  # whose outputs are whole on each rank
    with pytest.raises(UnsupportedError, match="groups of 32, which does not divide the 32 outputs of k_proj over 2"):
        shard_adapter(of_k, whole, local, 2)


def test_heads_that_do_not_divide_are_refused(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base()
    with pytest.raises(SpecError, match=r"does not divide the base's 4 attention heads; take one of \[1, 2\]"):
        make_engine(base, tensor_parallel_size=3)


def test_a_dead_rank_ends_the_engine(tiny_base: Callable[..., BaseModel]) -> None:
    engine = make_engine(tiny_base(), tensor_parallel_size=2, num_threads=1, dtype="bfloat16")
    stream = AsyncEngine(engine)
    stream.start()

    async def generate() -> None:
        params = {"max_tokens": 400}
        deltas = stream.generate(request("r", prompts(1)[0], **params))
        killed = False
        async for _ in deltas:
            if not killed:
                killed = True
                workers = engine._workers
                assert isinstance(workers, LocalWorkers)
                workers._processes[0].kill()

    try:
        stream.check_health()
        with pytest.raises(RankLost, match="rank"):
            asyncio.run(generate())
        with pytest.raises(EngineError):
            stream.check_health()
    finally:
        stream.stop()


@pytest.mark.slow
def test_three_ranks_of_smollm2(smollm2: BaseModel, tmp_path: Path) -> None:
    """9 heads and 3 of keys and values; ranks 8 and 64, VeRA."""
    configs: dict[str, tuple[Any, None]] = {
        "r8": (LoraConfig(r=8, target_modules=ALL), None),
        "r64": (LoraConfig(r=64, target_modules=ATTENTION), None),
        "vera": (VeraConfig(r=64, target_modules=ATTENTION), None),
    }
    adapters = make_adapters(smollm2, tmp_path, configs, seed=1, std=0.05)
    requests = for_each([*adapters, None], max_tokens=4)
    logits, tokens = [], []
    for size in (1, 3):
        engine = make_engine(smollm2, adapters, tensor_parallel_size=size, num_threads=1, pool_bytes=256 << 20)
        spy = Spy(engine)
        tokens.append(run(engine, requests))
        logits.append({i: torch.stack(rows) for i, rows in spy.logits.items()})
        engine.close()
    assert tokens[0] == tokens[1]
    for i, expected in logits[0].items():
        torch.testing.assert_close(logits[1][i], expected, atol=1e-3, rtol=0)


LOOPBACK = "127.0.0.1"


def own_address() -> str:
    """This machine's for others; loopback where it has no network."""
    found = [a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), LOOPBACK)


def test_a_stranger_runs_nothing_takes_no_place_and_the_engine_starts(
    tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base, marker = tiny_base(), tmp_path / "ran"
    context = multiprocessing.get_context("forkserver")
    connection, told = context.Pipe()
    strangers: list[BaseProcess] = []

    class Attacked(ForkedWorkers):
        """The other ranks start when the stranger has tried the meeting."""

        def __init__(self, args: Sequence[WorkerArgs], base: BaseModel) -> None:
            meeting = args[0].host, args[0].port, os.getpid(), str(marker)
            strangers.append(context.Process(target=attack, args=(*meeting, told)))
            strangers[0].start()
            assert connection.recv() == "tried"
            super().__init__(args, base)

        own_address = staticmethod(own_address)

    asked = [request("r", prompts(1)[0], max_tokens=4)]
    try:
        engine = make_engine(base, workers=Attacked, tensor_parallel_size=2, num_threads=1)
        try:
            assert run(engine, asked) == run(make_engine(base, num_threads=1), asked)
        finally:
            engine.close()
    finally:
        connection.send("end")
        strangers[0].join(60)
    assert connection.recv() >= 3, "the meeting, and two groups of rank 0"
    assert strangers[0].exitcode == 0
    assert not marker.exists()
