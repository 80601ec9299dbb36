"""GGUF-LoRA: what llama.cpp would add to each linear module, read back from the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from loray.adapters.convert import as_lora, write_gguf
from loray.adapters.peft_format import read_adapter
from loray.bases import gguf as gguf_format
from loray.bases.registry import BaseModel
from loray.errors import UnsupportedError
from loray.methods.weights import AdapterWeights, LoraWeights, ModuleKey
from loray.train.checkpoint import save_adapter
from tests.adapters.test_export import ADAPTERS, recipe, trained

BaseFactory = Callable[..., BaseModel]
NAMES: Mapping[str, str] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def saved(base: BaseModel, name: str, folder: Path) -> AdapterWeights:
    spec = recipe(ADAPTERS[name])
    save_adapter(trained(base, spec), spec.adapter, folder)
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
    weights = saved(base, name, tmp_path / "adapter")
    write_gguf(weights, base.config, tmp_path / "tone.gguf")
    assert [text(tmp_path / "tone.gguf", f"{key}.type") for key in ("general", "adapter")] == ["adapter", "lora"]
    assert text(tmp_path / "tone.gguf", "general.architecture") == called
    found = added(tmp_path / "tone.gguf")
    assert len(found) == len(weights.modules)
    for key, module in weights.modules.items():
        lora = as_lora(module, weights.pair, base.config.module_shape(key.module)[1])
        delta_OI = found[f"blk.{key.layer}.{NAMES[key.module]}.weight"]
        if called == "llama" and key.module in ("q_proj", "k_proj"):
            delta_OI = unpermuted(delta_OI, base.config.head_dim)
        torch.testing.assert_close(delta_OI, lora.scale * (lora.b_OR.float() @ lora.a_RI.float()))


def test_rows_are_those_of_a_gguf_of_llama(tiny_base: BaseFactory, tmp_path: Path) -> None:
    """As `bases.smollm2` reads them, whose heads have 64 dimensions."""
    base = tiny_base(head_dim=64)
    out, width = base.config.module_shape("q_proj")
    b_OR = torch.arange(out * 2.0).reshape(out, 2)
    module = LoraWeights(torch.eye(2, width), b_OR, scale=1.0)
    write_gguf(AdapterWeights({ModuleKey(0, "q_proj"): module}), base.config, tmp_path / "x.gguf")
    (delta_OI,) = added(tmp_path / "x.gguf").values()
    torch.testing.assert_close(gguf_format.unpermuted(delta_OI, 64)[:, :2], b_OR)


def test_several_ranks(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base()
    width = base.config.module_shape("v_proj")[1]
    modules = {
        ModuleKey(0, "v_proj"): LoraWeights(
            torch.ones(2, width), torch.ones(base.config.module_shape("v_proj")[0], 2), 0.5
        ),
        ModuleKey(1, "v_proj"): LoraWeights(
            torch.ones(3, width), torch.ones(base.config.module_shape("v_proj")[0], 3), 2.0
        ),
    }
    write_gguf(AdapterWeights(modules), base.config, tmp_path / "x.gguf")
    assert {name: float(delta.mean()) for name, delta in added(tmp_path / "x.gguf").items()} == {
        "blk.0.attn_v.weight": 1.0,
        "blk.1.attn_v.weight": 6.0,
    }


def test_what_gguf_cannot_hold(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base()
    weights = saved(base, "longlora", tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="also changes norms, the input embedding: take it merged"):
        write_gguf(weights, base.config, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def unpermuted(delta_OI: Tensor, head_dim: int) -> Tensor:
    out, width = delta_OI.shape
    return delta_OI.reshape(out // head_dim, head_dim // 2, 2, width).transpose(1, 2).reshape(out, width)
