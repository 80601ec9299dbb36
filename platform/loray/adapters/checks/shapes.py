"""The shapes of an adapter's tensors against those of its base."""

from __future__ import annotations

from collections.abc import Iterator

from loray.adapters.weights import AdapterWeights, LoraWeights
from loray.bases.config import ModelConfig
from loray.errors import BaseMismatch


def check_shapes(weights: AdapterWeights, base: ModelConfig, *, source: str) -> None:
    """Raise BaseMismatch unless every tensor fits a base of this configuration."""
    for what, shape, expected in _shapes(weights, base):
        if shape != expected:
            raise BaseMismatch(
                f"{source}: {what} has shape {shape}, this base needs {expected}; the adapter is for another base model"
            )


def _shapes(w: AdapterWeights, base: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    for key, module in w.modules.items():
        out_width, in_width = base.module_shape(key.module)
        label = f"layer {key.layer} {key.module}"
        if key.layer >= base.num_layers:
            raise BaseMismatch(
                f"{label}: this base has {base.num_layers} layers; the adapter is for another base model"
            )
        if isinstance(module, LoraWeights):
            rank = module.a_RI.shape[0]
            yield f"{label} lora_A", tuple(module.a_RI.shape), (rank, in_width)
            yield f"{label} lora_B", tuple(module.b_OR.shape), (out_width, rank)
            if module.magnitude_O is not None:
                yield f"{label} lora_magnitude_vector", tuple(module.magnitude_O.shape), (out_width,)
        else:
            assert w.pair is not None
            yield f"{label} vera_lambda_d", tuple(module.d_R.shape), (w.pair.a_RI.shape[0],)
            yield f"{label} vera_lambda_b", tuple(module.b_O.shape), (out_width,)
    for path, norm in w.norms.items():
        if path.startswith("layers.") and int(path.split(".")[1]) >= base.num_layers:
            raise BaseMismatch(f"norm {path}: this base has {base.num_layers} layers; the adapter is for another base")
        if path.endswith(("q_norm", "k_norm")) and not base.qk_norm:
            raise BaseMismatch(f"norm {path}: this base has no norm there; the adapter is for another base")
        width = base.head_dim if path.endswith(("q_norm", "k_norm")) else base.hidden_size
        yield f"norm {path}", tuple(norm.shape), (width,)
    if w.embedding is not None:
        ids = w.embedding.token_ids
        rows = base.vocab_size if ids is None else len(ids)
        yield "embed_tokens", tuple(w.embedding.rows_VD.shape), (rows, base.hidden_size)
