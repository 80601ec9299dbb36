"""Quantised forms of a base: rounded to nearest, written as others read them, and told apart from the base."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loray.bases.checkpoint import read_tensors, tensor_infos
from loray.bases.quantization import RoundedTo
from loray.bases.quantized import dequantized, is_quantized, rounded
from loray.bases.registry import BaseModel, add_base, get_base, list_bases, verify_base
from loray.bases.rounding import QloraBase, add_rounded, form_trained_on, is_rounded, rounding_errors
from loray.bases.weights import WeightSource
from loray.errors import BaseMismatch, ConflictError, SpecError, UnsupportedError
from loray.spec import DType, QuantizationSpec
from loray.train.model import BaseWeights, model_config, read_quantized, without_weights
from loray_kernels import QuantizedWeight
from tests.fixtures.tiny import write_checkpoint
from tests.fixtures.training import recipe

NF4 = QuantizationSpec()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def base(tmp_path: Path, home: Path) -> BaseModel:
    return add_base(str(write_checkpoint(tmp_path / "tiny", "Qwen2ForCausalLM", dtype=torch.bfloat16)), home=home)


def pairs(base: BaseModel, form: BaseModel) -> list[tuple[Tensor, QuantizedWeight]]:
    """The linear weights, in fp64, and what became of them."""
    found, weights = dict(WeightSource(form.path, form.config)), dict(read_tensors(base.path))
    assert [*found] == [*weights]
    linear = [name for name, t in weights.items() if is_rounded(name, t.shape)]
    assert len(linear) == 7 * base.config.num_layers
    assert all(torch.equal(cast(Tensor, found[n]), t) for n, t in weights.items() if n not in linear)
    return [(weights[name].double(), cast(QuantizedWeight, found[name])) for name in linear]


@pytest.mark.parametrize(("to", "most"), [("int8", 127), ("fp8", 448)])
def test_rows_are_rounded_to_the_nearest_value(base: BaseModel, home: Path, to: RoundedTo, most: int) -> None:
    form = add_rounded(base, to, home=home)
    assert (form.name, form.of, form.config.quantization and form.config.quantization.kind) == (
        f"tiny-{to}",
        base.fingerprint,
        to,
    )
    for w_OI, weight in pairs(base, form):
        scale_O1 = w_OI.abs().amax(dim=1, keepdim=True) / most
        torch.testing.assert_close(weight.scale_OG.double(), scale_O1, rtol=1e-6, atol=0)
        error_OI = (weight.dequantized(slice(None), torch.float32).double() - w_OI).abs()
        if to == "int8":
            assert (error_OI <= 0.5001 * scale_O1).all()
        else:  # three bits behind the first, and steps of 2⁻⁹ where numbers are no longer normal
            assert (error_OI <= torch.maximum(w_OI.abs() * 2.0**-4, scale_O1 * 2.0**-10) * 1.0001).all()


def test_groups_have_a_scale_of_least_error(base: BaseModel, home: Path) -> None:
    form = add_rounded(base, "int4", home=home)
    for w_OI, weight in pairs(base, form):
        assert (weight.group, weight.zero_OG) == (64, None)
        w_OGg = w_OI.unflatten(1, (-1, 64))
        plain_OG1 = w_OGg.abs().amax(dim=2, keepdim=True) / 7
        plain = ((w_OGg / plain_OG1).round() * plain_OG1 - w_OGg).square().sum()
        found_OI = weight.dequantized(slice(None), torch.float32).double()
        assert (found_OI - w_OI).square().sum() < plain
        step_OG1 = weight.scale_OG.double().unsqueeze(-1)
        inside = (w_OGg / step_OG1 >= -8) & (w_OGg / step_OG1 <= 7)  # what is not cut off
        assert ((found_OI.unflatten(1, (-1, 64)) - w_OGg).abs() <= 0.5001 * step_OG1.abs())[inside].all()


def test_errors_are_told_by_layer(base: BaseModel, home: Path) -> None:
    forms = [add_rounded(base, to, home=home) for to in ("int8", "int4")]
    (first, second), coarse = rounding_errors(base, forms[0]), rounding_errors(base, forms[1])
    assert (first.layer, second.layer) == (0, 1)
    found = [(w, q.dequantized(slice(None), torch.float32).double()) for w, q in pairs(base, forms[0])][:7]
    expected = sum(float((r - w).square().sum()) for w, r in found) / sum(float(w.square().sum()) for w, _ in found)
    assert first.error == pytest.approx(expected**0.5, rel=1e-9)
    assert first.error <= first.worst < 0.02 < coarse[0].error < 0.2
    assert first.worst_module.rpartition(".")[2].endswith("_proj")


def test_rounding_again_verifies_and_an_interruption_leaves_nothing(base: BaseModel, home: Path) -> None:
    def stop(stage: str, share: float) -> None:
        if stage == "rounding to int8" and share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_rounded(base, "int8", home=home, progress=stop)
    assert [path.name for path in (home / "bases").iterdir()] == ["tiny"]
    form = add_rounded(base, "int8", home=home)
    inode = (form.path / "model.safetensors").stat().st_ino
    assert add_rounded(base, "int8", home=home, name="tiny-int8") == form == get_base(home, "tiny-int8")
    assert (form.path / "model.safetensors").stat().st_ino == inode
    verify_base(form)
    (form.path / "model.safetensors").write_bytes(b"")

    def remove(stage: str, share: float) -> None:
        if stage == "fingerprinting":  # as another process that makes it anew
            shutil.rmtree(form.path, ignore_errors=True)

    assert add_rounded(base, "int8", home=home, progress=remove) == form
    with pytest.raises(ConflictError, match="tiny-int8"):
        add_rounded(base, "int4", home=home, name="tiny-int8")
    with pytest.raises(SpecError, match=r"tiny-int8 is quantised already \(int8 \(compressed-tensors\)\)"):
        add_rounded(form, "int4", home=home)


def test_widths_without_groups_are_named(tmp_path: Path, home: Path) -> None:
    folder = write_checkpoint(tmp_path / "odd", intermediate_size=80, num_hidden_layers=1)
    odd = add_base(str(folder), home=home)
    with pytest.raises(UnsupportedError, match=r"modules of 64, 80 inputs, which no group of 128, 64, 32 divides"):
        add_rounded(odd, "int4", home=home)


def test_a_checkpoint_says_whose_form_it_is(base: BaseModel, home: Path, tmp_path: Path) -> None:
    form = add_rounded(base, "int8", home=home)
    elsewhere = tmp_path / "elsewhere"
    assert add_base(str(form.path), home=elsewhere, name="copy").of == base.fingerprint  # as its record says
    (form.path / "loray-base.json").unlink()
    bare = add_base(str(form.path), home=elsewhere, name="bare")
    assert bare.of is None
    whole = add_base(str(base.path), home=elsewhere)
    related = add_base(str(form.path), home=elsewhere, name="bare", of=whole)
    assert (related.fingerprint, related.of) == (bare.fingerprint, base.fingerprint)
    (bare.path / "model.safetensors").write_bytes(b"")
    assert add_base(str(form.path), home=elsewhere, name="bare") == related  # made anew
    with pytest.raises(SpecError, match="tiny is not quantised, so it is no quantised form of tiny"):
        add_base(str(base.path), home=elsewhere, of=get_base(elsewhere, "tiny"))
    with pytest.raises(SpecError, match="not of bare, which is quantised itself"):
        add_base(str(form.path), home=elsewhere, name="third", of=related)
    other = add_base(str(write_checkpoint(tmp_path / "other", num_hidden_layers=3)), home=elsewhere)
    with pytest.raises(BaseMismatch, match="their configurations differ"):
        add_base(str(form.path), home=elsewhere, name="third", of=other)


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is missing")
@pytest.mark.parametrize("to", ["int8", "fp8", "int4"])
def test_compressed_tensors_reads_what_was_written(base: BaseModel, home: Path, to: RoundedTo) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    form = add_rounded(base, to, home=home)
    fields = json.loads((form.path / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(fields)
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    source, stored = WeightSource(form.path, form.config), dict(read_tensors(form.path))
    for info in tensor_infos(base.path):
        if is_rounded(info.name, info.shape):
            module = info.name.removesuffix("weight")
            parts = {name.removeprefix(module): t for name, t in stored.items() if name.startswith(module)}
            theirs = compressor.decompress(parts, scheme)["weight"]
            torch.testing.assert_close(source.dense(info.name).to(theirs.dtype), theirs, rtol=1e-2, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("fields", [{}, {"bnb_4bit_use_double_quant": False}, {"bnb_4bit_quant_type": "fp4"}])
def test_qlora_s_base_has_its_weights_to_the_last_bit(
    base: BaseModel, home: Path, fields: dict[str, Any], dtype: DType
) -> None:
    spec, read_in = QuantizationSpec(**fields), getattr(torch, dtype)
    form = add_rounded(base, QloraBase(spec, dtype), home=home)
    source = WeightSource(form.path, form.config)
    for name, tensor in read_tensors(base.path):
        if is_rounded(name, tensor.shape):
            found = source.read(name)
            assert isinstance(found, Tensor)
            assert torch.equal(found, rounded(tensor.to(read_in), spec))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_stay_as_qlora_leaves_them(architecture: str, home: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "moe", architecture, dtype=torch.bfloat16)
    base, trained_by = add_base(str(folder), home=home), recipe("lora", dtype="bfloat16", quantization={})
    form = BaseWeights(form_trained_on(base, trained_by, home), "bfloat16")
    model = without_weights(model_config(base, None), dtype="bfloat16", attention="sdpa")
    read_quantized(model, BaseWeights(base, "bfloat16"), NF4)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            computed_with = dequantized(module) if is_quantized(parameter) else parameter
            assert torch.equal(form.read(f"{path}.{name}"), computed_with)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
def test_a_recipe_s_form_is_made_once(base: BaseModel, home: Path) -> None:
    plain = recipe("lora", dtype="bfloat16")
    assert form_trained_on(base, plain, home) == base
    form = form_trained_on(base, recipe("lora", dtype="bfloat16", quantization={}), home)
    assert (form.name, form.of) == ("tiny-nf4", base.fingerprint)
    assert form_trained_on(base, recipe("lora", dtype="bfloat16", quantization={}), home) == form
    single = {"bnb_4bit_use_double_quant": False}
    other = form_trained_on(base, recipe("lora", dtype="float32", quantization=single), home)
    assert other.name == "tiny-nf4-single-float32"
    assert len({b.fingerprint for b in list_bases(home)}) == 3
