"""Bases with experts: logits against transformers + PEFT, of adapters on attention and LoRA on experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, MissConfig, RoadConfig, VeraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from loray.adapters.convert import merge_adapter
from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from loray.bases.checkpoint import SINGLE_FILE, check_tensors
from loray.bases.registry import BaseModel, add_base
from loray.bases.rounding import add_rounded
from loray.errors import BaseMismatch, IntegrityError, UnsupportedError
from loray.spec import RopeParameters
from loray.train.model import load_model
from tests.fixtures.engines import Spy, for_each, make_engine, prompts, request, run
from tests.fixtures.forked_workers import ForkedWorkers
from tests.fixtures.parity import Case, check_mixed_batch
from tests.fixtures.peft_adapters import ALL, ATTENTION, LINEAR_ROPE, NORMS, Oracle, make_adapter, make_adapters

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralForCausalLM", {}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "gpt-oss": ("GptOssForCausalLM", {}),
    "shares of all": ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}),
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ON_ATTENTION: dict[str, tuple[Any, RopeParameters | None]] = {
    "r4": (LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), None),
    "r16": (LoraConfig(r=16, target_modules=ATTENTION), None),
    "dora": (LoraConfig(r=8, lora_alpha=8, use_dora=True, target_modules=ATTENTION), None),
    "vera": (VeraConfig(r=16, target_modules=ATTENTION), None),
    "miss": (MissConfig(r=16, target_modules=ATTENTION), None),
    "longlora": (LoraConfig(r=8, target_modules=ATTENTION, modules_to_save=["embed_tokens", *NORMS]), LINEAR_ROPE),
    "ia3": (IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]), None),
    "road": (RoadConfig(variant="road_1", group_size=32, target_modules=ATTENTION), None),
}
ON_EXPERTS: dict[str, tuple[Any, RopeParameters | None]] = {
    "experts": (LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], target_parameters=BOTH), None),
    "all": (LoraConfig(r=8, use_rslora=True, target_modules=ATTENTION, target_parameters=BOTH), None),
    "down": (LoraConfig(r=3, lora_alpha=8, target_modules=["k_proj"], target_parameters=BOTH[1:]), None),
    "one layer": (LoraConfig(r=6, target_modules=["v_proj"], target_parameters=[f"layers.1.{BOTH[0]}"]), None),
}


@pytest.fixture(scope="module", params=BASES)
def case(
    request: pytest.FixtureRequest, tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    architecture, fields = BASES[request.param]
    base = tiny_base(architecture, **fields)
    adapters = make_adapters(base, tmp_path_factory.mktemp("adapters"), ON_ATTENTION | ON_EXPERTS)
    return base, adapters, Oracle(base, adapters)


@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunked"])
def test_mixed_batch_gives_the_logits_of_peft(case: Case, budget: int) -> None:
    check_mixed_batch(case, budget)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_whatever_is_beside_it(case: Case, dtype: str) -> None:
    base, adapters, _ = case
    ids, found = prompts(5), []
    for neighbours, budget in (([], 512), (adapters[:3], 512), (adapters[-4:-1], 40)):
        engine = make_engine(base, adapters, dtype=dtype, max_num_batched_tokens=budget)
        spy = Spy(engine)
        asked = {"base": None, "r16": adapters[1], "last": adapters[-1]}
        rows = [request(name, ids[4], adapter, max_tokens=4) for name, adapter in asked.items()]
        run(engine, [*(request(str(i), ids[i], a) for i, a in enumerate(neighbours)), *rows])
        found.append({name: torch.stack(spy.logits[name]) for name in asked})
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])
        assert torch.equal(found[0][name], found[2][name])


def test_an_adapter_of_a_dense_base_is_refused(case: Case, tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base, _, _ = case
    dense = make_adapter(tiny_base(), tmp_path / "dense", LoraConfig(r=4, target_modules=ALL), seed=1)
    with pytest.raises(BaseMismatch, match=r"down_proj.*adapts an MLP, and this base has experts in its place"):
        read_adapter(dense.folder, base.config)


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_ranks_give_what_one_gives(tiny_base: Callable[..., BaseModel], tmp_path: Path, architecture: str) -> None:
    base = tiny_base(architecture, num_attention_heads=4, num_key_value_heads=2)
    configs = ON_ATTENTION | ON_EXPERTS
    adapters = make_adapters(base, tmp_path, {k: configs[k] for k in ("r16", "dora", "longlora", "ia3", "all", "down")})
    requests = for_each([None, *adapters, None], max_tokens=4)
    one = make_engine(base, adapters, num_threads=1)
    alone = Spy(one)
    expected = run(one, requests, together=True)
    engine = make_engine(base, adapters, workers=ForkedWorkers, tensor_parallel_size=2, num_threads=1)
    try:
        together = Spy(engine)
        assert run(engine, requests) == expected
    finally:
        engine.close()
    for i, logits in alone.logits.items():
        torch.testing.assert_close(torch.stack(together.logits[i]), torch.stack(logits), atol=1e-4, rtol=1e-4)


def test_files_with_tensors_of_each_expert_are_read(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    """As they were made while models had a module for each."""
    base, r, e = tiny_base("MixtralForCausalLM"), 2, 6
    config = LoraConfig(r=r, lora_alpha=6, target_modules=["q_proj"], target_parameters=BOTH[1:])
    fused = make_adapter(base, tmp_path / "fused", config, seed=3)
    tensors, other = load_file(fused.folder / WEIGHTS_FILE), {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            other[name] = tensor
            continue
        at = name.replace("mlp.experts", "block_sparse_moe.experts.{}.w2")
        parts = tensor.view(e, r, -1) if "lora_A" in name else tensor.view(-1, r, e).permute(2, 0, 1)
        other |= {at.format(i): part.contiguous() for i, part in enumerate(parts)}
    (tmp_path / "old").mkdir()
    save_file(other, tmp_path / "old" / WEIGHTS_FILE)
    fields = json.loads((fused.folder / CONFIG_FILE).read_text()) | {"target_parameters": None}
    (tmp_path / "old" / CONFIG_FILE).write_text(json.dumps(fields | {"target_modules": ["q_proj", "w2"]}))
    patterns = {"r": 7, "rank_pattern": {r".*\.down_proj": r, "q_proj": r}}  # as PEFT writes it of old files
    (fused.folder / CONFIG_FILE).write_text(json.dumps(fields | {"target_parameters": BOTH[1:]} | patterns))
    old = replace(fused, folder=tmp_path / "old", ref=replace(fused.ref, digest="b" * 64, name="old"))
    engine = make_engine(base, [fused, old])
    spy, ids = Spy(engine), prompts(2)[1]
    run(engine, [request("fused", ids, fused), request("old", ids, old), request("base", ids)])
    assert torch.equal(torch.stack(spy.logits["old"]), torch.stack(spy.logits["fused"]))
    assert not torch.equal(torch.stack(spy.logits["old"]), torch.stack(spy.logits["base"]))

    del other["base_model.model.model.layers.1.block_sparse_moe.experts.4.w2.lora_A.weight"]
    save_file(other, tmp_path / "old" / WEIGHTS_FILE)
    with pytest.raises(IntegrityError, match=r"layer 1 lacks mlp.experts.4.down_proj.lora_A.weight"):
        read_adapter(tmp_path / "old", base.config)


def test_other_parameters_are_refused(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = tiny_base("Qwen3MoeForCausalLM")
    router = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    adapter = make_adapter(base, tmp_path / "router", router, seed=1)
    with pytest.raises(UnsupportedError, match=r"mlp\.gate.* belongs to nothing that loray adapts|target_parameters"):
        read_adapter(adapter.folder, base.config)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_merged_checkpoint_computes_the_same(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, architecture: str
) -> None:
    base = tiny_base(architecture)
    adapter = make_adapter(base, tmp_path / "all", ON_EXPERTS["all"][0], seed=5, std=0.1)
    merge_adapter(base, adapter.load(base), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = prompts(3)[2]
    with torch.no_grad():
        got = merged(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(got, Oracle(base, [adapter]).logits(ids, adapter), atol=1e-4, rtol=1e-4)
    check_tensors(tmp_path / "merged", base.config)


def test_experts_in_mxfp4_are_read_as_bf16(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    """Two values a byte, and an exponent for 32: the base in bf16 with the same values gives the same bits."""
    plain = tiny_base("GptOssForCausalLM")
    generator = torch.Generator().manual_seed(0)
    stored, dense = {}, {}
    for name, tensor in load_file(plain.path / SINGLE_FILE).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = dense[name] = tensor.bfloat16()
            continue
        experts, width, out = tensor.shape
        blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 126, (experts, out, width // 32), dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    bases = []
    for name, tensors in (("mxfp4", stored), ("dense", dense)):
        shutil.copytree(plain.path, tmp_path / name)
        save_file(tensors, tmp_path / name / SINGLE_FILE, metadata={"format": "pt"})
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"dtype": "bfloat16"}
        if name == "mxfp4":
            config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        bases.append(add_base(str(tmp_path / name), home=tmp_path / "home", name=name))
    ids, logits = prompts(3)[2], []
    for base in bases:
        engine = make_engine(base, dtype="bfloat16")
        spy = Spy(engine)
        run(engine, [request("r", ids)])
        logits.append(torch.stack(spy.logits["r"]))
    assert torch.equal(logits[0], logits[1])
    trained = load_model(bases[0], dtype="bfloat16").model.layers[1].mlp.experts
    assert torch.equal(trained.gate_up_proj, dense["model.layers.1.mlp.experts.gate_up_proj"])


def test_lora_of_gpt_oss_experts_is_not_merged(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = tiny_base("GptOssForCausalLM")
    adapter = make_adapter(base, tmp_path / "experts", ON_EXPERTS["experts"][0], seed=1)
    with pytest.raises(UnsupportedError, match="LoRA of the experts of GptOssForCausalLM is not merged"):
        merge_adapter(base, adapter.load(base), tmp_path / "merged")


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_rounded_to_int8_are_served(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, architecture: str
) -> None:
    """Near the dequantised model, whose activations are not rounded; the same in any company, with LoRA on experts."""
    plain = tiny_base(architecture)
    form = add_rounded(plain, "int8", home=tmp_path)
    adapter = make_adapter(plain, tmp_path / "all", ON_EXPERTS["all"][0], seed=5)
    ids, logits = prompts(3)[2], []
    for beside in ([], [request("other", prompts(2)[1], adapter)]):
        engine = make_engine(form, [adapter])
        spy = Spy(engine)
        run(engine, [*beside, request("base", ids, max_tokens=1), request("all", ids, adapter, max_tokens=1)])
        logits.append(torch.cat([spy.logits["base"][0], spy.logits["all"][0]]))
    assert torch.equal(logits[0], logits[1])
    with torch.no_grad():
        expected = load_model(form, dtype="float32")(input_ids=torch.tensor([ids])).logits[0, -1]
    got = logits[0][: len(expected)]
    assert torch.cosine_similarity(got, expected, dim=0) > 0.99
