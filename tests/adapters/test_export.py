"""Saved adapters: PEFT loads them as they are and computes what the training model did; so does our own reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from loray.adapters.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_adapter,
)
from loray.bases.registry import BaseModel
from loray.methods.attach import load_weights
from loray.methods.weights import VeraWeights
from loray.spec import TrainSpec
from loray.train.checkpoint import save_adapter
from loray.train.model import build_model, dense

BaseFactory = Callable[..., BaseModel]
IDS = torch.arange(40)[None] * 5
LONG: dict[str, Any] = {
    "rope_scaling": {"type": "linear", "factor": 2, "original_context": 20},
    "attention": {"type": "s2", "group_size": 10},
}
YARN = {"type": "yarn", "factor": 4, "original_context": 20}
Q_O_DOWN = ["q_proj", "o_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora", "rank": 4, "target_modules": Q_O_DOWN}},
    "rslora": {"adapter": {"method": "lora", "rank": 9, "alpha": 4.5, "use_rslora": True, "dropout": 0.1}},
    "dora": {"adapter": {"method": "dora", "rank": 4, "alpha": 6, "target_modules": ["q_proj", "o_proj", "up_proj"]}},
    "longlora": {"adapter": {"method": "longlora", "rank": 4}} | LONG,
    "longlora, yarn": {"adapter": {"method": "longlora"}} | LONG | {"rope_scaling": YARN},
    "longlora, norms only": {"adapter": {"method": "longlora", "train_embeddings": False}} | LONG,
    "longlora, embeddings only": {"adapter": {"method": "longlora", "train_norms": False}} | LONG,
    "longlora, not scaled": {"adapter": {"method": "longlora"}},
    "vera": {
        "adapter": {"method": "vera", "rank": 24, "projection_prng_key": 3, "target_modules": ["q_proj", "up_proj"]}
    },
    "vera with its pair": {"adapter": {"method": "vera", "rank": 24, "save_projection": True}},
    "long vera": {"adapter": {"method": "vera", "rank": 24, "train_embeddings": True, "train_norms": True}} | LONG,
}


def recipe(fields: dict[str, Any], dtype: str = "float32") -> TrainSpec:
    return TrainSpec.model_validate(
        fields
        | {
            "name": "test",
            "data": {"train": "none.jsonl"},
            "batch": {"rows": 1},
            "optimizer": {"learning_rate": 1e-3},
            "max_steps": 1,
            "dtype": dtype,
        }
    )


def trained(base: BaseModel, spec: TrainSpec, *, num_rows: int | None = None) -> Any:
    """As if trained: strong noise on everything that is, of the embedding on `num_rows` rows only where it is given."""
    model = build_model(base, spec)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                noise = 0.2 * torch.randn(p.shape, generator=generator)
                if "embed" in name and num_rows is not None:
                    noise[: p.shape[0] - num_rows] = 0
                p.add_(noise.to(p.dtype))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad(), dense(model):
        result: Tensor = model(input_ids=IDS).logits
    return result


def in_peft(base: BaseModel, like: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The published folder on a fresh base under the adapter's RoPE parameters, which the manifest holds."""
    config = AutoConfig.from_pretrained(base.path)
    config.rope_parameters = like.config.rope_parameters
    plain = AutoModelForCausalLM.from_pretrained(base.path, config=config, dtype=dtype)
    return PeftModel.from_pretrained(plain, folder).eval()


@pytest.mark.filterwarnings("ignore:.*(vera_A|tie_word_embeddings).*")
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize(("architecture", "tied"), [("LlamaForCausalLM", True), ("Qwen3ForCausalLM", False)])
def test_peft_computes_the_training_models_logits(
    tiny_base: BaseFactory, tmp_path: Path, architecture: str, tied: bool, adapter: dict[str, Any]
) -> None:
    base = tiny_base(architecture, tie_word_embeddings=tied, std=0.1)
    spec = recipe(adapter)
    model = trained(base, spec)
    save_adapter(model, spec.adapter, tmp_path)
    expected = logits(model)
    torch.testing.assert_close(logits(in_peft(base, model, tmp_path)), expected, atol=1e-5, rtol=1e-5)
    untrained = build_model(base, spec).eval()
    assert (logits(untrained) - expected).abs().max() > 0.1
    load_weights(untrained, read_adapter(tmp_path, base.config))
    assert torch.equal(logits(untrained), expected)
    values = dict(model.named_parameters())
    assert all(torch.equal(p, values[n]) for n, p in untrained.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_rows_where_the_head_is_not_tied(tiny_base: BaseFactory, tmp_path: Path, tied: bool) -> None:
    base = tiny_base(tie_word_embeddings=tied, std=0.1)
    spec = recipe(ADAPTERS["longlora"])
    model = trained(base, spec, num_rows=150)
    save_adapter(model, spec.adapter, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert ("embed_tokens" in config["modules_to_save"]) == tied
    assert config["trainable_token_indices"] == (None if tied else list(range(170, 320)))
    embedding = read_adapter(tmp_path, base.config).embedding
    assert embedding is not None
    assert embedding.rows_VD.shape == ((320 if tied else 150), 64)
    torch.testing.assert_close(logits(in_peft(base, model, tmp_path)), logits(model), atol=1e-5, rtol=1e-5)
    again = build_model(base, spec).eval()
    load_weights(again, read_adapter(tmp_path, base.config))
    assert torch.equal(logits(again), logits(model))


def test_an_embedding_that_did_not_move_is_saved_dense(tiny_base: BaseFactory, tmp_path: Path) -> None:
    spec = recipe(ADAPTERS["longlora"])
    base = tiny_base(tie_word_embeddings=False)
    save_adapter(build_model(base, spec), spec.adapter, tmp_path)
    embedding = read_adapter(tmp_path, base.config).embedding
    assert embedding is not None
    assert embedding.token_ids is None


@pytest.mark.parametrize("name", ["lora", "longlora", "vera"])
def test_our_reader_has_the_same_tensors(tiny_base: BaseFactory, tmp_path: Path, name: str) -> None:
    base = tiny_base("Qwen3ForCausalLM")
    spec = recipe(ADAPTERS[name])
    model = trained(base, spec)
    save_adapter(model, spec.adapter, tmp_path)
    weights = read_adapter(tmp_path, base.config)
    assert len(weights.modules) == 2 * len(spec.adapter.target_modules)
    for key, module in weights.modules.items():
        block = model.model.layers[key.layer]
        layer = getattr(block.mlp if key.module in ("up_proj", "down_proj") else block.self_attn, key.module)
        if isinstance(module, VeraWeights):
            assert torch.equal(module.b_O, layer.vera_lambda_b)
            assert torch.equal(module.d_R, layer.vera_lambda_d)
        else:
            assert torch.equal(module.a_RI, layer.lora_A["default"].weight)
            assert torch.equal(module.b_OR, layer.lora_B["default"].weight)
            assert module.scale == layer.scaling["default"]
    assert len(weights.norms) == (9 if name == "longlora" else 0)


@pytest.mark.parametrize("name", ["lora", "longlora", "vera"])
def test_bf16_is_published_bit_for_bit(tiny_base: BaseFactory, tmp_path: Path, name: str) -> None:
    base = tiny_base(dtype=torch.bfloat16, std=0.1)
    spec = recipe(ADAPTERS[name], "bfloat16")
    model = trained(base, spec)
    save_adapter(model, spec.adapter, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.bfloat16}
    again = build_model(base, spec).eval()
    load_weights(again, read_adapter(tmp_path, base.config))
    assert torch.equal(logits(again), logits(model))
    in_pefts = logits(in_peft(base, model, tmp_path, torch.bfloat16))
    assert (in_pefts - logits(model)).norm() / logits(model).norm() < 0.05


def test_the_same_adapter_gives_the_same_bytes_and_no_local_path(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base()
    spec = recipe(ADAPTERS["longlora"])
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_adapter(trained(base, spec), spec.adapter, folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    text = (tmp_path / "a" / CONFIG_FILE).read_text()
    assert json.loads(text)["base_model_name_or_path"] == base.name
    assert str(base.path) not in text
