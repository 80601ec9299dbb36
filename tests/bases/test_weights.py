"""Quantised checkpoints are read as they were packed; what is not read is refused by name."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loray.bases.registry import add_base, checked_config, read_config
from loray.bases.weights import WeightSource, unfused
from loray.errors import IntegrityError, UnsupportedError
from loray.spec import LINEAR_MODULES
from loray.train.model import load_model
from loray_kernels import QuantizedWeight
from tests.fixtures import quantized as q
from tests.fixtures.tiny import write_checkpoint

GROUPS = {"strategy": "group", "group_size": q.GROUP}
PACKED = q.compressed_tensors("pack-quantized", num_bits=4, **GROUPS)
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": q.GROUP, "desc_act": False, "sym": False}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# (config.json's quantization_config, how a weight is packed, whether it stays quantised)
LAYOUTS: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "int8 by rows": (q.compressed_tensors("int-quantized"), q.int8_rows, True),
    "int8 asymmetric": (q.compressed_tensors("int-quantized", symmetric=False), q.int8_asymmetric, True),
    "int8 by activation order": (
        q.compressed_tensors("int-quantized", strategy="group", group_size=q.GROUP, actorder="group"),
        q.int8_mixed,
        False,
    ),
    "fp8": (q.compressed_tensors("float-quantized", type="float", strategy="tensor"), q.fp8_whole, True),
    "fp8 in blocks": (
        q.compressed_tensors("float-quantized", type="float", strategy="block", block_structure=[48, 48]),
        q.fp8_blocks,
        False,
    ),
    "fp8 in blocks, as published": (
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        partial(q.fp8_blocks, block=32, scale_name="weight_scale_inv"),
        True,
    ),
    "W4A16": (PACKED, q.int4_packed, True),
    "W4A16 asymmetric": (PACKED, partial(q.int4_packed, symmetric=False), True),
    "W4A16 by activation order": (PACKED, partial(q.int4_packed, mixed=True), False),
    "GPTQ": (GPTQ, q.gptq, True),
    "GPTQ v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, partial(q.gptq, version=2), True),
    "GPTQ 8 bits": (GPTQ | {"bits": 8}, partial(q.gptq, bits=8), True),
    "GPTQ desc_act": (GPTQ | {"desc_act": True}, partial(q.gptq, act_order=True), False),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": q.GROUP, "version": "gemm"}, q.awq, True),
    "NF4": (BITSANDBYTES, q.nf4, False),
    "NF4 single": (BITSANDBYTES | {"bnb_4bit_use_double_quant": False}, partial(q.nf4, double=False), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_that_were_packed(layout: str, tmp_path: Path) -> None:
    config, make, stays = LAYOUTS[layout]
    folder = write_checkpoint(tmp_path / "tiny", "Qwen2ForCausalLM", num_hidden_layers=1)
    dense = q.store(folder, config, make)
    base = add_base(str(folder), home=tmp_path / "home")
    source = WeightSource(base.path, base.config)
    found = dict(source)
    assert [*found] == sorted(dense)
    for name, expected in dense.items():
        is_linear = name.endswith(tuple(f".{module}.weight" for module in LINEAR_MODULES))
        assert isinstance(found[name], QuantizedWeight) == (is_linear and stays)
        assert name in source
        assert torch.equal(source.dense(name), expected)
        assert torch.equal(source.dense_rows(name, 3, 7), expected[3:7])
    model = load_model(base, dtype="float32")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], dense[name].float()) for name in parameters)


def test_symmetric_zeros_are_not_kept(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    q.store(folder, GPTQ | {"sym": True}, q.gptq)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name] = torch.full_like(tensors[name], 0x77777777)  # 7 is 8 in GPTQ's first format
    save_file(tensors, path)
    weight = WeightSource(folder, read_config(folder)).read("model.layers.0.mlp.up_proj.weight")
    assert isinstance(weight, QuantizedWeight)
    assert weight.zero_OG is None
    assert (weight.group, weight.shape) == (q.GROUP, (128, 64))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "hqq"},
            "quantized by hqq, which is not read; loray reads compressed-tensors, fp8, gptq",
        ),
        ({"quant_method": "fp8"}, "fp8 with blocks of None"),
        (q.compressed_tensors("marlin-24"), "the format marlin-24 is not read"),
        (q.compressed_tensors("nvfp4-pack-quantized", num_bits=4, type="float"), "nvfp4-pack-quantized"),
        (q.compressed_tensors("pack-quantized", num_bits=2), "group_0 with 2-bit int weights is not read"),
        (q.compressed_tensors("int-quantized", strategy="tensor_group"), "the strategy tensor_group"),
        (q.compressed_tensors("int-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
        (q.compressed_tensors("int-quantized") | {"transform_config": {"R1": {}}}, "rotated weights"),
        (GPTQ | {"bits": 3}, "GPTQ with 3 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (GPTQ | {"dynamic": {"-:lm_head": {}}}, "bits by module"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ's version gemv"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"LLM\.int8\(\)"),
    ],
)
def test_other_ways_are_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    edited = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(edited))
    with pytest.raises(UnsupportedError, match=message):
        add_base(str(folder), home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_biases_of_zeros_are_of_no_account(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    q.store(folder, GPTQ, q.gptq)
    path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.bias"
    whole = load_file(path)
    save_file(whole | {name: torch.zeros(128)}, path)
    checked_config(folder)
    save_file(whole | {name: torch.arange(128.0)}, path)
    with pytest.raises(UnsupportedError, match=rf"tensor {name} is no part of LlamaForCausalLM"):
        checked_config(folder)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.ones(1)], ids=["scalar", "vector"])
def test_scales_of_a_quantised_kv_cache_are_left_out(scale: torch.Tensor, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    path, plain = folder / "model.safetensors", read_config(folder)
    name = "model.layers.0.self_attn.k_scale"
    save_file(load_file(path) | {name: scale}, path)
    assert checked_config(folder) == plain
    assert dict(unfused(WeightSource(folder, plain), plain))[name] == scale


def test_missing_and_misshapen_parts_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    q.store(folder, PACKED, q.int4_packed)
    path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj"
    whole = load_file(path)
    save_file({key: t for key, t in whole.items() if key != f"{name}.weight_shape"}, path)
    with pytest.raises(IntegrityError, match=rf"{name} is incomplete: the tensor {name}\.weight_shape is missing"):
        checked_config(folder)
    save_file(whole | {f"{name}.weight_scale": torch.ones(3, 2)}, path)
    with pytest.raises(IntegrityError, match=rf"{name}.weight is not stored as .* scales of shape \(3, 2\)"):
        WeightSource(folder, read_config(folder)).read(f"{name}.weight")
    others = {key: t for key, t in whole.items() if name not in key}
    in_16_bits = {f"{name}.weight": torch.ones(128, 64).bfloat16(), f"{name}.weight_scale": torch.ones(128, 1)}
    save_file(others | in_16_bits, path)
    with pytest.raises(IntegrityError, match=rf"{name} is damaged: its weight is BF16, not I8"):
        checked_config(folder)
    save_file(whole, path)
    edited = json.loads((folder / "config.json").read_text())
    del edited["quantization_config"]
    (folder / "config.json").write_text(json.dumps(edited))
    with pytest.raises(IntegrityError, match="is missing"):
        checked_config(folder)


def test_quantization_is_a_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    plain = add_base(str(folder), home=tmp_path / "home", name="plain")
    q.store(folder, GPTQ, q.gptq)
    first = add_base(str(folder), home=tmp_path / "home", name="first")
    edited = json.loads((folder / "config.json").read_text())
    edited["quantization_config"]["checkpoint_format"] = "gptq_v2"  # the same bytes mean other weights
    (folder / "config.json").write_text(json.dumps(edited))
    second = add_base(str(folder), home=tmp_path / "home", name="second")
    assert len({plain.fingerprint, first.fingerprint, second.fingerprint}) == 3
    assert first.config.matrix_bytes(2) < plain.config.matrix_bytes(2)
