"""VeRA as LoRA, and adapters merged into their base: the same logits, and nothing of the adapter lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM

from loray.adapters.convert import merge_adapter, save_lora, to_lora, write_gguf
from loray.adapters.manifest import ManifestDetails, describe
from loray.adapters.peft_format import read_adapter
from loray.bases import checkpoint
from loray.bases.gguf import unpermuted
from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.errors import ConflictError, UnsupportedError
from loray.methods.attach import load_weights
from loray.methods.weights import AdapterWeights, LoraWeights, ModuleKey
from loray.publishing import Destination, publish
from loray.publishing.convert import convert_to_lora
from loray.recipes.resolve import resolve
from loray.spec import LINEAR_MODULES, RopeParameters
from loray.store import AdapterStore, open_store
from loray.train.checkpoint import save_adapter
from loray.train.model import build_model
from tests.fixtures.adapters import ADAPTERS, BaseFactory, in_peft, logits, recipe, saved, trained


@pytest.mark.filterwarnings("ignore:.*(vera_A|tie_word_embeddings).*")
@pytest.mark.parametrize("name", ["vera", "vera with its pair", "long vera", "miss"])
def test_as_lora_in_peft(tiny_base: BaseFactory, tmp_path: Path, name: str) -> None:
    base, spec = tiny_base(std=0.1), recipe(ADAPTERS[name])
    model = saved(base, spec, tmp_path / "vera")
    lora = to_lora(read_adapter(tmp_path / "vera", base.config), base.config)
    save_lora(lora, tmp_path / "lora", base_name=base.name)
    torch.testing.assert_close(logits(in_peft(base, model, tmp_path / "lora")), logits(model), atol=1e-4, rtol=1e-4)
    again = read_adapter(tmp_path / "lora", base.config)
    assert again.pair is None
    assert again.modules.keys() == lora.modules.keys()


def test_alora_stays_an_adapter(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base, spec = tiny_base(), recipe(ADAPTERS["alora"])
    save_adapter(trained(base, spec), spec.adapter, tmp_path / "adapter")
    weights = read_adapter(tmp_path / "adapter", base.config)
    with pytest.raises(UnsupportedError, match="active from its invocation on alone"):
        merge_adapter(base, weights, tmp_path / "merged")
    with pytest.raises(UnsupportedError, match="active from its invocation on alone"):
        write_gguf(weights, base.config, tmp_path / "adapter.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_lora_is_lora_already(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base, spec = tiny_base(), recipe(ADAPTERS["lora"])
    save_adapter(trained(base, spec), spec.adapter, tmp_path)
    with pytest.raises(UnsupportedError, match="is stored as LoRA already"):
        to_lora(read_adapter(tmp_path, base.config), base.config)


def merged(base: BaseModel, model: Any, spec: Any, folder: Path, **options: Any) -> Path:
    save_adapter(model, spec.adapter, folder / "adapter")
    weights = read_adapter(folder / "adapter", base.config)
    if spec.rope_scaling is not None:
        rope = resolve(spec, base.config).rope
        weights = replace(weights, rope=rope, context_length=spec.rope_scaling.context_length(512))
    merge_adapter(base, weights, folder / "merged", **options)
    return folder / "merged"


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "alora"])
@pytest.mark.parametrize(("architecture", "tied"), [("LlamaForCausalLM", True), ("Qwen3ForCausalLM", False)])
def test_a_merged_checkpoint_is_an_ordinary_one(
    tiny_base: BaseFactory, tmp_path: Path, architecture: str, tied: bool, name: str
) -> None:
    base, spec = tiny_base(architecture, tie_word_embeddings=tied, std=0.1), recipe(ADAPTERS[name])
    model = trained(base, spec)
    folder = merged(base, model, spec, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)
    added = add_base(str(folder), home=tmp_path / "home", name="merged")
    scaling = spec.rope_scaling
    assert added.config.tie_word_embeddings == (tied and not spec.adapter.train_embeddings)
    if scaling is not None:
        assert added.config.rope == RopeParameters(**model.config.rope_parameters) != base.config.rope
        assert added.config.max_position_embeddings == scaling.context_length(512)
    else:
        assert added.config.rope == base.config.rope


@pytest.mark.filterwarnings("ignore:.*(vera_A|tie_word_embeddings).*")
@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *(("Gemma3ForCausalLM", method) for method in ("lora", "vera", "road", "longlora")),
        *(("Gemma2ForCausalLM", method) for method in ("lora", "dora", "miss")),
        *(("Phi3ForCausalLM", method) for method in ("lora", "dora", "vera", "miss", "road", "longlora")),  # joined
    ],
)
def test_an_adapter_of_a_family_is_published_continued_merged_and_made_lora(
    tiny_base: BaseFactory, tmp_path: Path, architecture: str, method: str
) -> None:
    """PEFT loads it, and a model of the same recipe its weights; both, and the merged checkpoint, give its logits."""
    base, size = tiny_base(architecture), {"group_size": 16} if method == "road" else {"rank": 16}
    fields: dict[str, Any] = {"adapter": {"method": method, **size, "target_modules": list(LINEAR_MODULES)}}
    if method == "longlora":
        scaling = {"type": "ntk", "factor": 2, "original_context": 20}
        fields |= {"rope_scaling": scaling, "attention": {"type": "dense"}}
    spec = recipe(fields)
    model = trained(base, spec)
    folder = merged(base, model, spec, tmp_path)
    expected = logits(model)
    torch.testing.assert_close(logits(in_peft(base, model, tmp_path / "adapter")), expected, atol=1e-4, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
    weights = read_adapter(tmp_path / "adapter", base.config)
    again = build_model(base, spec).eval()
    load_weights(again, weights)
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    if method != "longlora":  # whose RoPE a manifest has
        modules = describe(tmp_path / "adapter", base).target_modules
        fused = ("o_proj", "down_proj", "qkv_proj", "gate_up_proj")
        assert modules == (fused if base.config.has_fused_modules else LINEAR_MODULES)
    if base.config.has_fused_modules and method == "lora":
        with pytest.raises(UnsupportedError, match="GGUF-LoRA of Phi3ForCausalLM is not written"):
            write_gguf(weights, base.config, tmp_path / "adapter.gguf")
    if method in ("vera", "miss"):
        save_lora(to_lora(weights, base.config), tmp_path / "lora", base_name=base.name)
        torch.testing.assert_close(logits(in_peft(base, model, tmp_path / "lora")), expected, atol=1e-4, rtol=1e-4)


def test_a_merge_of_changed_rows_alone(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base, spec = tiny_base(tie_word_embeddings=False, std=0.1), recipe(ADAPTERS["longlora"])
    model = trained(base, spec, num_rows=200)
    plain = AutoModelForCausalLM.from_pretrained(merged(base, model, spec, tmp_path), dtype=torch.float32).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)


def test_dtype_and_shards(tiny_base: BaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.bases.weights._SHARD_BYTES", 100_000)
    base, spec = tiny_base(std=0.1), recipe(ADAPTERS["lora"])
    model = trained(base, spec)
    folder = merged(base, model, spec, tmp_path, dtype=torch.bfloat16)
    assert len(checkpoint.weight_files(folder)) > 2
    assert {info.dtype for info in checkpoint.tensor_infos(folder)} == {"BF16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=0.2, rtol=0.1)
    with pytest.raises(ConflictError, match="not empty"):
        merged(base, model, spec, tmp_path)


def test_a_converted_adapter_keeps_its_context(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base, spec = tiny_base(std=0.1), recipe(ADAPTERS["long vera"])
    model = saved(base, spec, tmp_path / "vera")
    store = AdapterStore(open_store(f"file://{tmp_path}/store"))
    catalog = Catalog(f"sqlite:///{tmp_path}/catalog.db")
    rope = RopeParameters(**model.config.rope_parameters)
    details = ManifestDetails(recipe=spec, rope_parameters=rope, context_length=40)
    vera = publish(tmp_path / "vera", base, Destination("long", store, catalog), details)
    lora = convert_to_lora(vera.ref, base, Destination("long-lora", store, catalog))
    catalog.close()
    before, after = vera.manifest, lora.manifest
    assert (before.method, after.method, after.derived_from) == ("vera", "longlora", vera.digest)
    for field in ("rope_parameters", "context_length", "original_context_length"):
        assert getattr(after, field) == getattr(before, field) is not None, field
    assert after.original_context_length == 20


def test_merged_it_computes_the_same(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base("Qwen2ForCausalLM", std=0.1)
    spec = recipe(ADAPTERS["dora"])
    model = trained(base, spec)
    save_adapter(model, spec.adapter, tmp_path / "adapter")
    merge_adapter(base, read_adapter(tmp_path / "adapter", base.config), tmp_path / "merged")
    with pytest.raises(UnsupportedError, match="magnitudes of outputs"):
        write_gguf(read_adapter(tmp_path / "adapter", base.config), base.config, tmp_path / "adapter.gguf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


GGUF_NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NAMES: Mapping[str, str] = dict(zip(LINEAR_MODULES, GGUF_NAMES, strict=True))


def stored(base: BaseModel, name: str, folder: Path) -> AdapterWeights:
    spec = recipe(ADAPTERS[name])
    saved(base, spec, folder)
    return read_adapter(folder, base.config)


def added(path: Path) -> dict[str, Tensor]:
    """Module → what llama.cpp adds to its weight, in GGUF's order of rows."""
    reader = GGUFReader(str(path))
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    found = {}
    for name in (n.removesuffix(".lora_a") for n in tensors if n.endswith(".lora_a")):
        a_RI, b_OR = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found[name] = (alpha / len(a_RI) if alpha else 1.0) * (b_OR @ a_RI)
    return found


def text(path: Path, key: str) -> str:
    return bytes(GGUFReader(str(path)).fields[key].parts[-1]).decode()


@pytest.mark.parametrize("name", ["lora", "rslora", "vera"])
@pytest.mark.parametrize(
    ("architecture", "called"),
    [("LlamaForCausalLM", "llama"), ("Qwen2ForCausalLM", "qwen2"), ("Qwen3ForCausalLM", "qwen3")],
)
def test_llama_cpp_adds_what_peft_adds(
    tiny_base: BaseFactory, tmp_path: Path, architecture: str, called: str, name: str
) -> None:
    base = tiny_base(architecture, std=0.1)
    weights = stored(base, name, tmp_path / "adapter")
    write_gguf(weights, base.config, tmp_path / "tone.gguf")
    assert [text(tmp_path / "tone.gguf", f"{key}.type") for key in ("general", "adapter")] == ["adapter", "lora"]
    assert text(tmp_path / "tone.gguf", "general.architecture") == called
    found = added(tmp_path / "tone.gguf")
    assert len(found) == len(weights.modules)
    for key, module in weights.modules.items():
        lora = module.as_lora(weights.pair, base.config.module_shape(key.module)[1])
        delta_OI = found[f"blk.{key.layer}.{NAMES[key.module]}.weight"]
        if called == "llama" and key.module in ("q_proj", "k_proj"):
            delta_OI = unpermuted(delta_OI, base.config.head_dim)  # as smollm2's GGUF is read
        torch.testing.assert_close(delta_OI, lora.scale * (lora.b_OR.float() @ lora.a_RI.float()))


def test_several_ranks(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base()
    out, width = base.config.module_shape("v_proj")
    modules = {
        ModuleKey(layer, "v_proj"): LoraWeights(torch.ones(rank, width), torch.ones(out, rank), scale)
        for layer, rank, scale in ((0, 2, 0.5), (1, 3, 2.0))
    }
    write_gguf(AdapterWeights(modules), base.config, tmp_path / "x.gguf")
    assert {name: float(delta.mean()) for name, delta in added(tmp_path / "x.gguf").items()} == {
        "blk.0.attn_v.weight": 1.0,
        "blk.1.attn_v.weight": 6.0,
    }


def test_what_gguf_cannot_hold(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base()
    weights = stored(base, "longlora", tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="also changes norms, the input embedding: take it merged"):
        write_gguf(weights, base.config, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
