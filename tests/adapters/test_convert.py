"""VeRA as LoRA, and adapters merged into their base: the same logits, and nothing of the adapter lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loray.adapters.convert import merge_adapter, save_lora, vera_to_lora
from loray.adapters.manifest import ManifestDetails
from loray.adapters.peft_format import read_adapter
from loray.bases import checkpoint
from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.errors import ConflictError, UnsupportedError
from loray.publishing import Destination, publish
from loray.publishing.convert import convert_to_lora
from loray.spec import RopeParameters
from loray.store import AdapterStore, open_store
from loray.train.checkpoint import save_adapter
from tests.adapters.test_export import ADAPTERS, in_peft, logits, recipe, trained

BaseFactory = Callable[..., BaseModel]


@pytest.mark.filterwarnings("ignore:.*(vera_A|tie_word_embeddings).*")
@pytest.mark.parametrize("name", ["vera", "vera with its pair", "long vera"])
def test_vera_as_lora_in_peft(tiny_base: BaseFactory, tmp_path: Path, name: str) -> None:
    base, spec = tiny_base(std=0.1), recipe(ADAPTERS[name])
    model = trained(base, spec)
    save_adapter(model, spec.adapter, tmp_path / "vera")
    lora = vera_to_lora(read_adapter(tmp_path / "vera", base.config), base.config)
    save_lora(lora, tmp_path / "lora", base_name=base.name)
    torch.testing.assert_close(logits(in_peft(base, model, tmp_path / "lora")), logits(model), atol=1e-4, rtol=1e-4)
    again = read_adapter(tmp_path / "lora", base.config)
    assert again.pair is None
    assert again.modules.keys() == lora.modules.keys()


def test_only_vera_becomes_lora(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base, spec = tiny_base(), recipe(ADAPTERS["lora"])
    save_adapter(trained(base, spec), spec.adapter, tmp_path)
    with pytest.raises(UnsupportedError, match="not VeRA"):
        vera_to_lora(read_adapter(tmp_path, base.config), base.config)


def merged(base: BaseModel, model: Any, spec: Any, folder: Path, **options: Any) -> Path:
    save_adapter(model, spec.adapter, folder / "adapter")
    weights = read_adapter(folder / "adapter", base.config)
    if spec.rope_scaling is not None:
        rope = RopeParameters(**model.config.rope_parameters)
        weights = replace(weights, rope=rope, context_length=spec.rope_scaling.context_length(512))
    merge_adapter(base, weights, folder / "merged", **options)
    return folder / "merged"


@pytest.mark.parametrize("name", ADAPTERS)
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


def test_a_merge_of_changed_rows_alone(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base, spec = tiny_base(tie_word_embeddings=False, std=0.1), recipe(ADAPTERS["longlora"])
    model = trained(base, spec, num_rows=200)
    plain = AutoModelForCausalLM.from_pretrained(merged(base, model, spec, tmp_path), dtype=torch.float32).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)


def test_dtype_and_shards(tiny_base: BaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.adapters.convert._SHARD_BYTES", 100_000)
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
    model = trained(base, spec)
    save_adapter(model, spec.adapter, tmp_path / "vera")
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
