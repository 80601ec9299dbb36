"""Bases with experts: the decoder's logits against transformers + PEFT, adapters of every kind on attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, MissConfig, RoadConfig, VeraConfig

from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.errors import BaseMismatch
from loray.spec import RopeParameters
from tests.fixtures.engines import Spy, for_each, make_engine, prompts, request, run
from tests.fixtures.parity import Case, check_mixed_batch
from tests.fixtures.peft_adapters import ALL, ATTENTION, LINEAR_ROPE, NORMS, Oracle, make_adapter, make_adapters

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralForCausalLM", {}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "shares of all": ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}),
}
CONFIGS: dict[str, tuple[Any, RopeParameters | None]] = {
    "r4": (LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), None),
    "r16": (LoraConfig(r=16, target_modules=ATTENTION), None),
    "dora": (LoraConfig(r=8, lora_alpha=8, use_dora=True, target_modules=ATTENTION), None),
    "vera": (VeraConfig(r=16, target_modules=ATTENTION), None),
    "miss": (MissConfig(r=16, target_modules=ATTENTION), None),
    "longlora": (LoraConfig(r=8, target_modules=ATTENTION, modules_to_save=["embed_tokens", *NORMS]), LINEAR_ROPE),
    "ia3": (IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]), None),
    "road": (RoadConfig(variant="road_1", group_size=32, target_modules=ATTENTION), None),
}


@pytest.fixture(scope="module", params=BASES)
def case(
    request: pytest.FixtureRequest, tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    architecture, fields = BASES[request.param]
    base = tiny_base(architecture, **fields)
    adapters = make_adapters(base, tmp_path_factory.mktemp("adapters"), CONFIGS)
    return base, adapters, Oracle(base, adapters)


@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunked"])
def test_mixed_batch_gives_the_logits_of_peft(case: Case, budget: int) -> None:
    check_mixed_batch(case, budget)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_whatever_is_beside_it(case: Case, dtype: str) -> None:
    base, adapters, _ = case
    ids, found = prompts(5), []
    for neighbours, budget in (([], 512), (adapters[:3], 512), (adapters[4:8], 40)):
        engine = make_engine(base, adapters, dtype=dtype, max_num_batched_tokens=budget)
        spy = Spy(engine)
        asked = [request("base", ids[4], max_tokens=4), request("r16", ids[4], adapters[1], max_tokens=4)]
        run(engine, [*(request(str(i), ids[i], a) for i, a in enumerate(neighbours)), *asked])
        found.append({name: torch.stack(spy.logits[name]) for name in ("base", "r16")})
    for name in ("base", "r16"):
        assert torch.equal(found[0][name], found[1][name])
        assert torch.equal(found[0][name], found[2][name])


def test_an_adapter_of_a_dense_base_is_refused(case: Case, tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base, _, _ = case
    dense = make_adapter(tiny_base(), tmp_path / "dense", LoraConfig(r=4, target_modules=ALL), seed=1)
    with pytest.raises(BaseMismatch, match=r"down_proj.*adapts an MLP, and this base has experts in its place"):
        read_adapter(dense.folder, base.config)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_ranks_give_what_one_gives(tiny_base: Callable[..., BaseModel], tmp_path: Path, architecture: str) -> None:
    base = tiny_base(architecture, num_attention_heads=4, num_key_value_heads=2)
    adapters = make_adapters(base, tmp_path, {name: CONFIGS[name] for name in ("r16", "dora", "longlora")})
    requests = for_each([None, *adapters, None], max_tokens=4)
    one = make_engine(base, adapters, num_threads=1)
    alone = Spy(one)
    expected = run(one, requests, together=True)
    engine = make_engine(base, adapters, tensor_parallel_size=2, num_threads=1)
    try:
        together = Spy(engine)
        assert run(engine, requests) == expected
    finally:
        engine.close()
    for i, logits in alone.logits.items():
        torch.testing.assert_close(torch.stack(together.logits[i]), torch.stack(logits), atol=1e-4, rtol=1e-4)
