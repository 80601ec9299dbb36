"""An adapter as GGUF-LoRA, which llama.cpp and what is built on it load beside the base's GGUF (`--lora`).

llama.cpp adds alpha / rank · B A x to a linear module. Shapes as in `adapters.weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loray.adapters.forms.convert import as_lora
from loray.adapters.weights import AdapterWeights
from loray.bases.config import ModelConfig
from loray.bases.gguf import LAYER_NAMES, PERMUTED, permuted
from loray.errors import UnsupportedError

_MODULES = {name.rpartition(".")[2]: called for called, name in LAYER_NAMES.items()}
_ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_PERMUTED_IN = "llama"


def write_gguf(weights: AdapterWeights, base: ModelConfig, path: Path) -> None:
    """Write the adapter in fp32 to the new file `path`. VeRA becomes LoRA of its rank.

    Where modules have several ranks or scales, B has the scale in it and alpha is 0, which llama.cpp takes as a scale
    of 1. Raises UnsupportedError for an adapter that changes more than linear modules.
    """
    import numpy as np
    from gguf import GGUFType, GGUFWriter, Keys

    _check_linear(weights)
    architecture = _ARCHITECTURES[base.architecture]
    modules = {
        key: as_lora(module, weights.pair, base.module_shape(key.module)[1]) for key, module in weights.modules.items()
    }
    alphas = {(module.a_RI.shape[0], module.scale) for module in modules.values()}
    is_one = len(alphas) == 1
    alpha = next(rank * scale for rank, scale in alphas) if is_one else 0.0
    writer = GGUFWriter(path, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for key, module in sorted(modules.items()):
        b_OR = module.b_OR.float() if is_one else module.scale * module.b_OR.float()
        if architecture == _PERMUTED_IN and key.module in PERMUTED:
            b_OR = permuted(b_OR, base.head_dim)
        name = f"blk.{key.layer}.{_MODULES[key.module]}.weight"
        for part, tensor in (("lora_a", module.a_RI.float()), ("lora_b", b_OR)):
            writer.add_tensor(f"{name}.{part}", np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_linear(weights: AdapterWeights) -> None:
    more = {
        "norms": bool(weights.norms),
        "the input embedding": weights.embedding is not None,
        "RoPE": weights.rope is not None,
        "the magnitudes of outputs (DoRA)": weights.has_magnitudes,
    }
    changed = [what for what, is_changed in more.items() if is_changed]
    if changed:
        raise UnsupportedError(
            f"GGUF-LoRA holds linear modules alone, and this adapter also changes {', '.join(changed)}: take it merged"
        )
