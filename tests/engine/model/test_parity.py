"""The decoder against transformers + PEFT, in fp32: every architecture, every kind of adapter, alone and mixed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig

from loray.bases.registry import BaseModel
from loray.spec import RopeParameters
from tests.engine.adapters import NORMS, Oracle, TestAdapter, make_adapter
from tests.engine.harness import Spy, make_engine, request, run

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROPES = {
    "linear": RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2.0),
    "yarn": RopeParameters(rope_type="yarn", rope_theta=10000.0, factor=2.0, original_max_position_embeddings=256),
}


def strong_adapters(base: BaseModel, folder: Path) -> list[TestAdapter]:
    """LoRA of several ranks, module subsets and layers, DoRA, rsLoRA, VeRA of two pairs, LongLoRA of two RoPEs."""
    configs: list[tuple[str, Any, RopeParameters | None]] = [
        ("lora-r4", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), None),
        ("lora-r16", LoraConfig(r=16, lora_alpha=16, target_modules=ALL), None),
        ("dora", LoraConfig(r=8, lora_alpha=8, use_dora=True, target_modules=ALL), None),
        ("rslora", LoraConfig(r=8, lora_alpha=8, use_rslora=True, target_modules=["o_proj", "down_proj"]), None),
        (
            "patterns",
            LoraConfig(r=4, target_modules=ALL, rank_pattern={"q_proj": 7}, alpha_pattern={"up_proj": 3}),
            None,
        ),
        (
            "dora-rs",
            LoraConfig(r=4, use_rslora=True, use_dora=True, target_modules=["v_proj", "o_proj", "up_proj"]),
            None,
        ),
        ("layer-1", LoraConfig(r=8, target_modules=ALL[1:6], layers_to_transform=[1]), None),
        ("vera-a", VeraConfig(r=32, target_modules=["q_proj", "v_proj"], save_projection=False), None),
        ("vera-b", VeraConfig(r=32, target_modules=["q_proj", "v_proj"], save_projection=False), None),
        ("vera-all", VeraConfig(r=16, target_modules=ALL, projection_prng_key=5), None),
        (
            "longlora",
            LoraConfig(r=8, target_modules=ALL[:4], modules_to_save=["embed_tokens", *NORMS]),
            ROPES["linear"],
        ),
        ("longlora-yarn", LoraConfig(r=4, target_modules=ALL[:4], modules_to_save=["norm"]), ROPES["yarn"]),
    ]
    return [
        make_adapter(base, folder / name, config, seed=i, rope=rope, std=0.12)
        for i, (name, config, rope) in enumerate(configs)
    ]


@pytest.fixture(
    scope="module", params=["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def case(
    request: pytest.FixtureRequest, tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[BaseModel, list[TestAdapter], Oracle]:
    base = tiny_base(request.param, tie_word_embeddings=request.param == "LlamaForCausalLM")
    adapters = strong_adapters(base, tmp_path_factory.mktemp("adapters"))
    return base, adapters, Oracle(base, adapters)


Case = tuple[BaseModel, list[TestAdapter], Oracle]


def prompts(n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (5 + 7 * i,), generator=generator).tolist() for i in range(n)]


@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunked"])
def test_mixed_batch_gives_the_logits_of_peft(case: Case, budget: int) -> None:
    base, adapters, oracle = case
    models = [None, *adapters, None]
    engine = make_engine(base, adapters, max_num_batched_tokens=budget, max_num_seqs=min(budget, 32))
    spy = Spy(engine)
    ids = prompts(len(models))
    out = run(engine, [request(str(i), p, a) for i, (p, a) in enumerate(zip(ids, models, strict=True))], together=True)
    assert engine.stats().max_adapters_in_step >= (8 if budget == 512 else 1)
    for i, adapter in enumerate(models):
        whole = ids[i] + out[str(i)]
        expected = oracle.logits(whole[:-1], adapter)[len(ids[i]) - 1 :]
        got = torch.stack(spy.logits[str(i)])
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert got.argmax(-1).tolist() == out[str(i)]


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
    models = [None, *adapters]
    ids = prompts(len(models))
    requests = [request(str(i), p, a, max_tokens=24) for i, (p, a) in enumerate(zip(ids, models, strict=True))]
    alone, engine = {}, make_engine(base, adapters)
    for r in requests:
        alone |= run(engine, [r])
    for order in itertools.islice(itertools.permutations(requests), 0, 720 * 7, 720 * 3):
        assert run(make_engine(base, adapters), list(order)) == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbours_adapters_leave_a_base_row_bit_equal(case: Case, dtype: str) -> None:
    base, adapters, _ = case
    ids = prompts(4)
    logits = []
    for neighbours in ([None] * 3, adapters[1:4], adapters[5:8]):
        engine = make_engine(base, adapters, dtype=dtype)
        for adapter in adapters:  # all resident, so that the steps have the same shape
            run(engine, [request("warm", ids[0], adapter, max_tokens=1)])
        spy = Spy(engine)
        params = {"max_tokens": 4}
        run(
            engine,
            [request("base", ids[3], **params)]
            + [request(str(i), ids[i], a, **params) for i, a in enumerate(neighbours)],
        )
        logits.append(torch.stack(spy.logits["base"]))  # of prefill and of decode
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
