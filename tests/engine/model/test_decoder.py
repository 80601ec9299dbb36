"""The decoder: its logits against transformers + PEFT, alone and mixed; what it computes, loads and compiles."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import IA3Config, LoraConfig, MissConfig, RoadConfig, VeraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from loray.adapters.peft_format import WEIGHTS_FILE
from loray.bases.checkpoint import read_tensors
from loray.bases.config import LayerSpec
from loray.bases.registry import BaseModel
from loray.engine import build
from loray.engine.model import decoder
from loray.engine.model.batch import Batch, logits_part
from loray.engine.model.decoder import Decoder, compile_adapters
from loray.engine.pool.pool import Pool, input_shapes
from loray.errors import IntegrityError
from loray.spec import GenerateRequest, RopeParameters
from loray_kernels import Ops, Weight, backend
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.reference import ReferenceOps
from tests.fixtures.engines import Spy, empty, for_each, make_engine, prompts, request, run
from tests.fixtures.parity import Case, check_mixed_batch
from tests.fixtures.peft_adapters import (
    ALL,
    ATTENTION,
    LINEAR_ROPE,
    NORMS,
    Oracle,
    TestAdapter,
    hf_model,
    make_adapter,
    make_adapters,
)


@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunked"])
def test_mixed_batch_gives_the_logits_of_peft(case: Case, budget: int) -> None:
    check_mixed_batch(case, budget)


def test_every_adapter_moves_the_argmax(case: Case) -> None:
    """Otherwise a wrong adapter would pass the tests above."""
    base, adapters, _ = case
    engine = make_engine(base, adapters)
    ids = prompts(5)[-1]
    out = run(engine, [request("base", ids), *(request(a.ref.name, ids, a) for a in adapters)])
    same = [name for name, tokens in out.items() if name != "base" and tokens == out["base"]]
    assert not same


def test_order_and_company_do_not_matter(case: Case) -> None:
    base, adapters, _ = case
    requests = for_each([None, *adapters], max_tokens=12)
    alone, engine = {}, make_engine(base, adapters)
    for r in requests:
        alone |= run(engine, [r])
    for order in (requests, requests[::-1]):
        empty(engine)
        assert run(engine, order) == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbours_adapters_leave_a_base_row_bit_equal(case: Case, dtype: str) -> None:
    base, adapters, _ = case
    ids = prompts(4)
    logits, engine = [], make_engine(base, adapters, dtype=dtype)
    for adapter in adapters:  # all resident, so that the steps have the same shape
        run(engine, [request("warm", ids[0], adapter, max_tokens=1)])
    for neighbours in ([None] * 3, adapters[1:4], adapters[5:8]):
        engine.scheduler.prefix_cache.evict(1 << 20)
        spy = Spy(engine)
        near = [request(str(i), ids[i], a, max_tokens=4) for i, a in enumerate(neighbours)]
        run(engine, [request("base", ids[3], max_tokens=4), *near])
        logits.append(torch.stack(spy.logits["base"]))  # of prefill and of decode
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


# The real base, ten strong adapters of every method and the base in one batch. Our fp32 logits must be within 1e-4 of
# PEFT's in fp64, from which PEFT's own in fp32 are up to 8e-5 away.
NUM_TOKENS = 18  # past a block, whatever the prompt
TIE = 1e-4
REAL_ROPE = RopeParameters(rope_type="linear", rope_theta=100000.0, factor=2.0)
REAL_CONFIGS: dict[str, tuple[Any, RopeParameters | None]] = {
    "lora-8": (LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION), None),
    "lora-16": (LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"]), None),
    "lora-32": (LoraConfig(r=32, lora_alpha=16, target_modules=["v_proj", "o_proj"]), None),
    "lora-64": (LoraConfig(r=64, lora_alpha=16, target_modules=ALL), None),
    "rslora-16": (LoraConfig(r=16, lora_alpha=4, use_rslora=True, target_modules=["o_proj", "down_proj"]), None),
    "vera-256": (VeraConfig(r=256, target_modules=ATTENTION, save_projection=False), None),
    "vera-256b": (VeraConfig(r=256, target_modules=ATTENTION, save_projection=False), None),
    "vera-all": (VeraConfig(r=128, target_modules=ALL, save_projection=False), None),
    "miss-32": (MissConfig(r=32, target_modules=ATTENTION), None),
    "longlora": (LoraConfig(r=8, target_modules=ATTENTION, modules_to_save=["embed_tokens", *NORMS]), REAL_ROPE),
}
ALONE = [0, *(1 + list(REAL_CONFIGS).index(name) for name in ("lora-64", "vera-256", "longlora"))]  # one of each method
PROMPTS = [
    "The three largest oceans are",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived",
    "Question: what is 12 times 7?\nAnswer:",
]


class Real:
    """`mixed`, `logits`: tokens and logits of one batch of all requests, by request. `oracle`: in fp64."""

    def __init__(self, base: BaseModel, folder: Path) -> None:
        options: dict[str, Any] = {"std": 0.05, "num_token_rows": 5000, "extras_std": 0.02}
        self.base, self.adapters = base, make_adapters(base, folder, REAL_CONFIGS, seed=40, **options)
        self.models = [None, *self.adapters]
        tokenizer = AutoTokenizer.from_pretrained(base.path)
        self.prompts = [tokenizer(PROMPTS[i % len(PROMPTS)])["input_ids"] for i in range(len(self.models))]
        self.prompts[-1] *= 12  # the LongLoRA adapter gets a long prompt, for more than one step
        assert len(self.prompts[-1]) > 64
        # The pool is for all adapters and requests.
        self.engine = make_engine(base, self.adapters, pool_bytes=384 << 20, max_num_batched_tokens=64)
        spy = Spy(self.engine)
        self.mixed = run(self.engine, self.requests(range(len(self.models))), together=True)
        assert self.engine.stats().max_adapters_in_step >= 8
        self.logits = {name: torch.stack(rows) for name, rows in spy.logits.items()}
        self.oracle = Oracle(base, self.adapters, torch.float64)

    def requests(self, order: Sequence[int], num_tokens: int = NUM_TOKENS) -> list[GenerateRequest]:
        return [request(str(i), self.prompts[i], self.models[i], max_tokens=num_tokens) for i in order]


@pytest.fixture(scope="module")
def real(smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    real = Real(smollm2, tmp_path_factory.mktemp("adapters"))
    yield real
    real.engine.close()
    vars(real).clear()  # gigabytes, which whatever holds the fixture would keep
    hf_model.cache_clear()


@pytest.mark.parametrize("i", range(len(REAL_CONFIGS) + 1), ids=["base", *REAL_CONFIGS])
def test_logits_in_the_mixed_batch_are_pefts(real: Real, i: int) -> None:
    whole = real.prompts[i] + real.mixed[str(i)]
    answers = slice(len(real.prompts[i]) - 1, None)
    expected = real.oracle.logits(whole[:-1], real.models[i])[answers]
    error = float((real.logits[str(i)].double() - expected).abs().max())
    print(f"from fp64: {error:.1e}")
    assert error < 1e-4
    ties = _ties(expected)
    different = (expected.argmax(-1) != torch.tensor(real.mixed[str(i)])).nonzero().flatten().tolist()
    assert set(different) <= ties, f"tokens differ at {different}, ties are at {sorted(ties)}"


def test_tokens_do_not_depend_on_order_or_company(real: Real) -> None:
    n = len(real.prompts)
    order = [(7 * i + 3) % n for i in range(n)]
    empty(real.engine)
    shuffled = run(real.engine, real.requests(order), together=True)
    empty(real.engine)
    alone: dict[str, list[int]] = {}
    for i in ALONE:
        alone |= run(real.engine, real.requests([i], NUM_TOKENS // 2))
    with_ties = {i: ties for i in range(n) if (ties := _ties(real.logits[str(i)]))}
    for other in (shuffled, alone):
        for i, tokens in other.items():
            first = next((k for k, token in enumerate(tokens) if token != real.mixed[i][k]), None)
            assert first is None or first in with_ties.get(int(i), ())
    print(f"ties: {with_ties}")
    assert len(with_ties) <= 1  # the others are compared to their end, whatever the machine's rounding
    assert len({tuple(t[: NUM_TOKENS // 2]) for t in real.mixed.values()}) == n


def _ties(logits: torch.Tensor) -> set[int]:
    top = logits.topk(2, dim=-1).values
    return set((top[:, 0] - top[:, 1] < TIE).nonzero().flatten().tolist())


SOME_MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]
DTYPE_CONFIGS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraConfig(r=8, lora_alpha=16, target_modules=SOME_MODULES), None),
    "dora": (LoraConfig(r=8, lora_alpha=16, target_modules=SOME_MODULES, use_dora=True), None),
    "ia3": (IA3Config(target_modules=SOME_MODULES, feedforward_modules=["down_proj"]), None),
    "road": (RoadConfig(group_size=16, target_modules=SOME_MODULES), None),
    "vera": (VeraConfig(r=16, target_modules=["q_proj", "v_proj"], save_projection=False), None),
    "miss": (MissConfig(r=16, target_modules=SOME_MODULES), None),
    "longlora": (LoraConfig(r=8, target_modules=SOME_MODULES, modules_to_save=["embed_tokens", *NORMS]), LINEAR_ROPE),
}
# Products in bfloat16 (8 bits) of a model of few layers: roundings of the layers add up to some units in the last place
# of the largest logit.
_ROUNDINGS = 16 * 2.0**-8


def rounded(adapter: TestAdapter, folder: Path) -> TestAdapter:
    """The adapter as it is published where the base is in bfloat16."""
    shutil.copytree(adapter.folder, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    return replace(adapter, folder=folder, ref=replace(adapter.ref, digest="f" * 64))


@pytest.mark.parametrize("method", list(DTYPE_CONFIGS))
def test_an_adapter_in_float32_and_in_bfloat16_is_served_alike(
    method: str, tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base, (config, rope) = tiny_base(), DTYPE_CONFIGS[method]
    trained = make_adapter(base, tmp_path / "trained", config, seed=1, rope=rope, std=0.05)
    published = rounded(trained, tmp_path / "published")
    logits = {}
    for dtype in ("bfloat16", "float32"):
        engine = make_engine(base, [trained, published], dtype=dtype)
        spy = Spy(engine)
        tokens = run(
            engine, [request("a", range(3, 40), trained), request("b", range(3, 40), published)], together=True
        )
        logits[dtype] = {name: torch.stack(rows) for name, rows in spy.logits.items()}
        engine.close()
        if dtype == "bfloat16" and method not in ("dora", "ia3", "road"):  # the pool holds the bits that publication
            # wrote; scales are computed from them, less one
            assert tokens["a"] == tokens["b"]
            assert logits[dtype]["a"].equal(logits[dtype]["b"])
    expected_V = Oracle(base, [trained], torch.float64).logits(range(3, 40), trained)[-1].double()
    scale = expected_V.abs().max()
    for dtype, found in logits.items():
        for name in found:
            error = (found[name][0].double() - expected_V).abs().max()
            is_exact = dtype == "float32" and name == "a"
            assert error <= (1e-4 if is_exact else _ROUNDINGS * scale), (dtype, name, float(error), float(scale))


class Parts:
    """The parts of the last layer that were computed; each step's logits are compared with those of the whole batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Batch, Batch]] = []
        self._whole = False
        forward = Decoder._forward
        monkeypatch.setattr(decoder, "logits_part", self._part)

        def both(model: Decoder, batch: Batch, pool: Pool, *on_tokens: Callable[[Tensor], None]) -> Tensor:
            self._whole = True
            expected_RV = forward(model, batch, pool, lambda logits_RV: None).clone()
            self._whole = False
            got_RV = forward(model, batch, pool, *on_tokens)
            assert torch.equal(got_RV, expected_RV)
            return got_RV

        monkeypatch.setattr(Decoder, "_forward", both)

    def _part(self, batch: Batch) -> Batch | None:
        part = None if self._whole else logits_part(batch)
        if part is not None:
            self.seen.append((batch, part))
        return part


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_layer_for_the_tokens_with_logits_gives_the_bits_of_all_of_it(
    any_base: BaseModel, any_adapters: list[TestAdapter], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    own = any_adapters
    engine = make_engine(any_base, own, dtype=dtype, max_num_batched_tokens=24, max_num_seqs=12)
    parts = Parts(monkeypatch)
    models = [None, *own, own[0], None]
    run(engine, [request(str(i), range(3, 12 + 4 * i), a, max_tokens=3) for i, a in enumerate(models)])
    run(engine, [request("long", range(100, 160), own[0], max_tokens=1)])
    engine.close()
    kept = [part.token_ids_T.shape[0] for _, part in parts.seen]
    assert max(kept) > 1
    assert {len(part.adapters.spans) for _, part in parts.seen} >= {0, 1}
    # In the middle of a prompt no logits are needed.
    assert any(not part.last for _, part in parts.seen)


def test_all_tokens_are_kept_where_most_have_logits_or_a_prompt_is_scored(
    tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_base(), max_num_batched_tokens=64)
    parts = Parts(monkeypatch)
    run(engine, [request("scored", range(20), max_tokens=1, prompt_logprobs=0)])
    run(engine, [request("short", range(1, 2), max_tokens=5)])
    assert not parts.seen
    run(engine, [request("whole", range(30, 50), max_tokens=1)])
    engine.close()
    [(batch, part)] = parts.seen
    assert batch.last == (19,)
    assert part.positions_T.tolist() == [19]


@pytest.mark.parametrize("ops", ["auto", "reference"])
def test_a_layer_that_scales_attention_otherwise(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ops: str
) -> None:
    """By twice as much, which its queries could be instead."""
    monkeypatch.setattr(build, "backend", lambda name, device: backend(ops))
    base = tiny_base()
    layers = (LayerSpec(), LayerSpec(attention_scale=2 * base.config.attention_scale(1)))
    shutil.copytree(base.path, tmp_path / "doubled")
    tensors = load_file(base.path / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 2
    save_file(tensors, tmp_path / "doubled/model.safetensors", {"format": "pt"})
    logits = []
    scaling = replace(base, config=replace(base.config, layers=layers))
    for other in (base, replace(base, path=tmp_path / "doubled"), scaling):
        engine = make_engine(other)
        spy = Spy(engine)
        run(engine, [request("a", range(3, 40))])
        logits.append(torch.stack(spy.logits["a"]))
        engine.close()
    plain, doubled, scaled = logits
    assert doubled.equal(scaled)
    assert not doubled.equal(plain)


@pytest.fixture(scope="module")
def deep(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base("Qwen3ForCausalLM", num_hidden_layers=4)


def size_of_a_layer(path: Path) -> int:
    return sum(t.nbytes for name, t in read_tensors(path) if name.startswith("model.layers.0."))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_more_than_a_layer_is_there_twice(deep: BaseModel, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    ops: Ops = ReferenceOps() if device == "meta" else backend("auto")
    taken: list[tuple[weakref.ref[Tensor], int]] = []
    most, take = 0, decoder._take

    def counted(name: str, tensor: Weight, *arguments: Any) -> Weight:
        nonlocal most
        got = take(name, tensor, *arguments)
        assert isinstance(got, Tensor)
        if got.dim() > 1 and ".layers." in name:
            taken.append((weakref.ref(got), got.nbytes))
        most = max(most, sum(size for ref, size in taken if ref() is not None))
        return got

    monkeypatch.setattr(decoder, "_take", counted)
    made = Decoder(
        deep.config, read_tensors(deep.path), ops, dtype=torch.bfloat16, device=torch.device(device)
    )  # in another dtype than the checkpoint's
    assert made.embedding_VD.device.type == device
    assert len(taken) == 7 * 4
    assert all(ref() is None for ref, _ in taken)
    assert 0 < most <= size_of_a_layer(deep.path) / 2


def test_tensors_may_come_in_any_order_and_those_that_are_not_read_are_not_taken(deep: BaseModel) -> None:
    tensors = [*read_tensors(deep.path), ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8))]
    made = [
        Decoder(deep.config, order, ReferenceOps(), dtype=torch.float32, device=torch.device("cpu"))
        for order in (tensors, reversed(tensors))
    ]
    for one, other in zip(*(m._layers for m in made), strict=True):
        assert torch.equal(one.weights.qkv.data, other.weights.qkv.data)
        assert torch.equal(one.weights.down.data, other.weights.down.data)


def test_a_checkpoint_without_a_tensor_is_refused(deep: BaseModel) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    tensors = [(n, t) for n, t in read_tensors(deep.path) if n != name]
    with pytest.raises(IntegrityError, match=rf"lacks the tensor '{name}'; add the base again"):
        Decoder(deep.config, tensors, ReferenceOps(), dtype=torch.float32, device=torch.device("cpu"))


CAPACITY = 512


class Tiles:
    """Notes which launches there were instead of making them."""

    def __init__(self) -> None:
        self.launches: set[tuple[Any, ...]] = set()

    def shrink(self, x_TI: Any, pool: Any, items: Any, table: Any, h_TR: Any) -> None:
        self.launches.add(("shrink", x_TI.shape[1], table.max_rows))

    def expand(self, outputs: Any, h_TR: Any, pool: Any, items: Any, table: Any) -> None:
        self.launches.add(("expand", sum(y.shape[1] for y in outputs)))

    def dense_shrink(self, x_TI: Any, a_RI: Any, h_TR: Any) -> None:
        self.launches.add(("dense shrink", x_TI.shape[1]))

    def vera_expand(self, y_TO: Any, z_TR: Any, *others: Any) -> None:
        self.launches.add(("vera expand", y_TO.shape[1], z_TR.stride(0) % 16 == 0))


def no_gather(*arguments: Any) -> None:
    raise AssertionError("a gather is launched, which needs no compilation")


def test_each_kernel_of_each_input_is_taken_once(tiny_base: Callable[..., BaseModel]) -> None:
    config = tiny_base("Qwen3ForCausalLM").config
    pool, tiles = torch.full((4096,), 0.5), Tiles()
    compile_adapters(CudaOps(no_gather, cast(Any, tiles)), pool, input_shapes(config, CAPACITY))
    hidden, heads, middle = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    inputs = [(hidden, 3, qkv, heads), (heads, 1, hidden, hidden), (hidden, 2, 2 * middle, middle)]
    inputs.append((middle, 1, hidden, hidden))
    expected: set[tuple[Any, ...]] = set()
    for width, num_modules, out, first in inputs:
        expected |= {("shrink", width, rows // num_modules * num_modules) for rows in (16, 32, 64)}
        expected |= {("expand", out), ("dense shrink", width)}
        expected |= {("vera expand", first, aligned) for aligned in (True, False)}
    assert tiles.launches == expected


def test_the_pool_stays_as_it_is(tiny_base: Callable[..., BaseModel]) -> None:
    pool = torch.arange(4096.0)
    config = tiny_base("Qwen3ForCausalLM").config
    compile_adapters(ReferenceOps(), pool, input_shapes(config, CAPACITY))
    assert torch.equal(pool, torch.arange(4096.0))
