"""Keys and values in int8: logits are those of transformers + PEFT with a cache that rounds them, in whatever way the
engine runs a request, and a pool holds nearly twice as many tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig

from loray.bases.registry import BaseModel
from loray.engine.memory.limits import pool_geometry
from loray.engine.pool.pool import cut_pool
from loray.errors import SpecError
from loray.spec import ServeSpec
from tests.fixtures.engines import BLOCK_BYTES, Spy, empty, make_engine, request, run
from tests.fixtures.peft_adapters import ATTENTION, Oracle, make_adapters

INT8: dict[str, Any] = {"kv_cache_dtype": "int8"}
NUM_TOKENS = 20
# Windows, soft caps, norms of heads, sinks, experts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "a window": ("MistralForCausalLM", {"sliding_window": 24}),
    "Gemma 2": ("Gemma2ForCausalLM", {}),
    "Qwen 3": ("Qwen3ForCausalLM", {}),
    "gpt-oss": ("GptOssForCausalLM", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_cache_that_rounds(
    tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    """In chunks, with prefixes that are known, with adapters that change keys and values. An element between
    two whole numbers may be rounded either way, so a few logits are further off.
    """
    architecture, config = FAMILIES[family]
    base = tiny_base(architecture, **config)
    configs = {
        "lora": (LoraConfig(r=16, lora_alpha=32, target_modules=ATTENTION), None),
        "dora": (LoraConfig(r=3, lora_alpha=24, target_modules=["k_proj", "v_proj"], use_dora=True), None),
        "vera": (VeraConfig(r=32, target_modules=["q_proj", "v_proj"], save_projection=False), None),
        "ia3": (IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]), None),
    }
    adapters = make_adapters(base, tmp_path_factory.mktemp("adapters"), configs, std=0.05)
    oracle, rng, models = Oracle(base, adapters), random.Random(0), [None, *adapters]
    system = [rng.randrange(256) for _ in range(40)]
    jobs = {}
    for i in range(2 * len(models)):
        own = [rng.randrange(256) for _ in range(rng.randint(1, 30))]
        jobs[str(i)] = ([*system[: rng.choice((0, 16, 40))], *own], models[i % len(models)])
    engine = make_engine(
        base, adapters, max_model_len=128, pool_bytes=20 * BLOCK_BYTES, max_num_batched_tokens=24, **INT8
    )
    spy = Spy(engine)
    requests = [request(name, ids, adapter, max_tokens=NUM_TOKENS) for name, (ids, adapter) in jobs.items()]
    tokens = run(engine, requests, together=True)
    assert engine.stats().prefix_cache_hits > 0
    got, exact, expected = [], [], []
    for name, (ids, adapter) in jobs.items():
        whole = [*ids, *tokens[name]][:-1]
        got.append(torch.stack(spy.logits[name]))
        exact.append(oracle.logits(whole, adapter)[len(ids) - 1 :])
        expected.append(oracle.logits(whole, adapter, int8_kv=True)[len(ids) - 1 :])
    error, rounding = ((torch.cat(x) - torch.cat(expected)).abs().amax(1) for x in (got, exact))
    assert error.median() < 2e-5
    assert error.max() < rounding.max() / 8
    empty(engine)


def test_a_pool_holds_nearly_twice_as_many_tokens(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base()
    specs = [ServeSpec(dtype="bfloat16", pool_bytes=1 << 20), ServeSpec(dtype="bfloat16", pool_bytes=1 << 20, **INT8)]
    wide, narrow = (pool_geometry(spec, base.config).num_tokens for spec in specs)
    head_dim = base.config.head_dim
    assert narrow == pytest.approx(wide * 2 * head_dim / (head_dim + 4), rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_the_gateway_knows_the_layout(tiny_base: Callable[..., BaseModel], dtype: Any, kv_cache_dtype: Any) -> None:
    config = tiny_base().config
    spec = ServeSpec(dtype=dtype, pool_bytes=1 << 20, block_tokens=4, kv_cache_dtype=kv_cache_dtype)
    assert cut_pool(spec, config)[0].layer_share == pool_geometry(spec, config).layer_share


def test_fp8_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"fp8.*int8"):
        ServeSpec.parse({"kv_cache_dtype": "fp8_e4m3"}, source="serve.yaml")
