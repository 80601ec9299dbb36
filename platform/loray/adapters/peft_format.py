"""PEFT's on-disk format, `adapter_config.json` and `adapter_model.safetensors`: written, and read as AdapterWeights.

Does not import PEFT. An option with which loray would compute something else than PEFT is refused by name, not ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open

from loray.adapters.checks.files import MAX_CONFIG_BYTES, PAIR_NAMES, check_config, read_header
from loray.adapters.checks.patterns import ModulePatterns
from loray.adapters.checks.shapes import check_shapes
from loray.adapters.pairs import PairKey
from loray.adapters.weights import AdapterWeights, EmbeddingRows, LoraWeights, ModuleKey, ProjectionPair, VeraWeights
from loray.bases.config import ModelConfig
from loray.errors import BaseMismatch, IntegrityError, UnsupportedError, shown
from loray.spec import LINEAR_MODULES

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT puts it before the names of a transformers model's parameters
ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"  # after the embedding's path, where only changed rows are stored

_LINEAR = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<module>" + "|".join(LINEAR_MODULES) + r")\.(?P<part>.+)"
)
_NORM = re.compile(
    r"model\.(?P<path>norm|layers\.\d+\.(?:input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm))\.weight"
)
# Options that change what PEFT computes, with the values for which they change nothing.
_INERT: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "ensure_weight_tying": (False, None),
}
_MAGNITUDE = "lora_magnitude_vector"
# With these initialisations PEFT changes the base's weights when it loads the adapter.
_REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterFiles(NamedTuple):
    """The contents of a folder in PEFT's format. Names of tensors are PEFT's, with `PREFIX`."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `config` and `tensors` to `folder`, which may exist. Names of tensors are PEFT's, with `PREFIX`.

    Equal arguments give equal bytes.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises UnsupportedError for an option that loray does not compute."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UnsupportedError(f"{folder} has no {CONFIG_FILE}: it is not a PEFT adapter")
    return parse_config(folder, path.read_bytes())


def parse_config(folder: Path, data: bytes) -> dict[str, Any]:
    """As `read_config`, from the file's bytes. Errors name `folder`."""
    path = folder / CONFIG_FILE
    if len(data) > MAX_CONFIG_BYTES:
        raise UnsupportedError(f"{path} has {len(data):,} bytes; at most {MAX_CONFIG_BYTES:,} are read")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise IntegrityError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise IntegrityError(f"{path} must hold an object, not {type(config).__name__}")
    kind = config.get("peft_type")
    if kind not in ("LORA", "VERA"):
        raise UnsupportedError(f"{folder}: peft_type {shown(kind)} is not supported; LORA and VERA are")
    for option, inert in _INERT.items():
        if config.get(option) not in inert and option in config:
            raise UnsupportedError(f"{folder}: {option}={shown(config[option])} is not supported")
    check_config(config, source=str(path))
    init = str(config.get("init_lora_weights", ""))
    if init.startswith(_REWRITING_INITS):
        raise UnsupportedError(
            f"{folder}: init_lora_weights={shown(init)} changes the base's weights; save it as a plain LoRA first "
            "(PEFT: path_initial_model_for_weight_conversion)"
        )
    return dict(config)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `adapter_model.safetensors` by their PEFT name without `PREFIX`."""
    path = weights_path(folder)
    read_header(path)
    try:
        with safe_open(str(path), framework="pt") as f:
            return without_prefix({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise IntegrityError(f"{path} is damaged: {e}") from e


def weights_path(folder: Path) -> Path:
    """`adapter_model.safetensors`. Raises UnsupportedError where there is none."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        hint = " (adapter_model.bin is a pickle and is never read: convert it)" if list(folder.glob("*.bin")) else ""
        raise UnsupportedError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    return path


def without_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """`tensors` by their names without `PREFIX`."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def read_adapter(folder: Path, base: ModelConfig) -> AdapterWeights:
    """The adapter in `folder` for a base of this configuration, in the stored dtypes.

    RoPE and context length are None: the manifest has them, not PEFT's files.

    Raises UnsupportedError for what loray does not compute, BaseMismatch where shapes do not fit the base, and
    IntegrityError where the file is damaged or tensors are missing.
    """
    return parse_adapter(folder, read_config(folder), read_tensors(folder), base)


def make_pair(drawn: PairKey, stored: Mapping[str, Tensor]) -> ProjectionPair:
    """VeRA's pair: the tensors A and B that are `stored`, else the one that is drawn."""
    from loray.adapters.projections import draw_pair, pair_digest

    if not stored:
        return draw_pair(*drawn)
    return ProjectionPair(stored["A"], stored["B"], pair_digest(stored["A"], stored["B"]))


def parse_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: ModelConfig,
    pair_of: Callable[[PairKey, Mapping[str, Tensor]], ProjectionPair] = make_pair,
) -> AdapterWeights:
    """As `read_adapter`, from configuration and tensors that are in memory. Errors name `folder`.

    Reads only the shapes of tensors; `pair_of` reads the values of a stored VeRA pair.
    """
    norms: dict[str, Tensor] = {}
    embedding: EmbeddingRows | None = None
    parts: dict[ModuleKey, dict[str, Tensor]] = {}
    pair_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _LINEAR.fullmatch(name):
            key = ModuleKey(int(match["layer"]), match["module"])
            parts.setdefault(key, {})[match["part"].removesuffix(".weight")] = tensor
        elif match := _NORM.fullmatch(name):
            norms[match["path"]] = tensor
        elif name.startswith("model.embed_tokens.") and embedding is not None:
            raise UnsupportedError(f"{folder}: the embedding is stored twice, whole and as rows")
        elif name == "model.embed_tokens.weight":
            embedding = EmbeddingRows(token_ids=None, rows_VD=tensor)
        elif name.startswith("model.embed_tokens.") and name.endswith("trainable_tokens_delta"):
            embedding = EmbeddingRows(token_ids=_token_indices(folder, config, base), rows_VD=tensor)
        elif name in PAIR_NAMES:
            pair_tensors[name[-1]] = tensor
        else:
            raise UnsupportedError(f"{folder}: tensor {name!r} belongs to nothing that loray adapts")
    if not parts and not norms and embedding is None:
        raise IntegrityError(f"{folder}: {WEIGHTS_FILE} holds no adapter tensors")
    pair: ProjectionPair | None = None
    modules: Mapping[ModuleKey, LoraWeights | VeraWeights]
    if config["peft_type"] == "LORA":
        ranks = ModulePatterns("rank_pattern", config.get("rank_pattern"), source=str(folder))
        alphas = ModulePatterns("alpha_pattern", config.get("alpha_pattern"), source=str(folder))
        modules = {key: _lora(folder, config, key, p, ranks, alphas) for key, p in parts.items()}
    else:
        modules = {key: _vera(folder, config, key, p) for key, p in parts.items()}
        if not parts:
            raise IntegrityError(f"{folder}: a VeRA adapter without a module")
        pair = pair_of(_checked_pair(folder, config, base, parts.keys(), pair_tensors), pair_tensors)
    weights = AdapterWeights(modules=modules, pair=pair, norms=norms, embedding=embedding)
    check_shapes(weights, base, source=str(folder))
    return weights


def _lora(
    folder: Path,
    config: Mapping[str, Any],
    key: ModuleKey,
    parts: Mapping[str, Tensor],
    ranks: ModulePatterns,
    alphas: ModulePatterns,
) -> LoraWeights:
    expected = {"lora_A", "lora_B", *([_MAGNITUDE] if config.get("use_dora") else [])}
    if set(parts) != expected:
        raise UnsupportedError(
            f"{folder}: layer {key.layer} {key.module} has {sorted(parts)}, not {' and '.join(sorted(expected))}"
        )
    a_RI, b_OR = parts["lora_A"], parts["lora_B"]
    rank, path = a_RI.shape[0], f"model.{key.path}"
    _check_rank(folder, key, rank, ranks.value(path, config["r"]))
    alpha = alphas.value(path, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraWeights(a_RI, b_OR, scale, parts.get(_MAGNITUDE))


def _vera(folder: Path, config: Mapping[str, Any], key: ModuleKey, parts: Mapping[str, Tensor]) -> VeraWeights:
    if set(parts) != {"vera_lambda_b", "vera_lambda_d"}:
        raise UnsupportedError(
            f"{folder}: layer {key.layer} {key.module} has {sorted(parts)}, not vera_lambda_b and _d"
        )
    _check_rank(folder, key, parts["vera_lambda_d"].shape[0], config["r"])
    return VeraWeights(d_R=parts["vera_lambda_d"], b_O=parts["vera_lambda_b"])


def _check_rank(folder: Path, key: ModuleKey, rank: int, configured: float) -> None:
    """Before VeRA's pair is drawn with that rank."""
    if rank != configured:
        raise IntegrityError(
            f"{folder}: layer {key.layer} {key.module} has rank {rank}, {CONFIG_FILE} says {configured:g}; "
            "save the adapter again"
        )


def _checked_pair(
    folder: Path, config: Mapping[str, Any], base: ModelConfig, keys: Iterable[ModuleKey], stored: Mapping[str, Tensor]
) -> PairKey:
    """The pair that is drawn where none is stored. Raises where one is, and does not fit."""
    shapes = [base.module_shape(key.module) for key in keys]
    max_out, max_in = max(s[0] for s in shapes), max(s[1] for s in shapes)
    drawn = PairKey(config.get("projection_prng_key", 0), config["r"], max_in, max_out)
    if not stored:
        return drawn
    if set(stored) != {"A", "B"}:
        raise IntegrityError(f"{folder}: only vera_{next(iter(stored))} is stored; both or neither must be")
    a_RI, b_OR = stored["A"], stored["B"]
    if len(a_RI.shape) != 2 or len(b_OR.shape) != 2 or a_RI.shape[0] != config["r"]:
        raise IntegrityError(f"{folder}: the stored pair is not of rank {config['r']}, as {CONFIG_FILE} says")
    if a_RI.shape[1] < max_in or b_OR.shape[0] < max_out or a_RI.shape[0] != b_OR.shape[1]:
        raise BaseMismatch(
            f"{folder}: the stored pair {tuple(a_RI.shape)}, {tuple(b_OR.shape)} is too small for this base"
        )
    return drawn


def _token_indices(folder: Path, config: Mapping[str, Any], base: ModelConfig) -> tuple[int, ...]:
    if base.tie_word_embeddings:
        raise UnsupportedError(
            f"{folder}: trainable_token_indices on a base with tied embeddings also changes the output head in PEFT; "
            "publish the embedding as modules_to_save"
        )
    raw = config.get("trainable_token_indices")
    ids = next(iter(raw.values())) if isinstance(raw, dict) and len(raw) == 1 else raw
    if not isinstance(ids, list) or any(type(i) is not int for i in ids) or len(set(ids)) != len(ids):
        raise IntegrityError(
            f"{folder}: trainable_token_indices is {shown(raw)}, not a list of different tokens, but rows are stored"
        )
    if any(not 0 <= i < base.vocab_size for i in ids):
        raise BaseMismatch(f"{folder}: trainable_token_indices go beyond this base's {base.vocab_size} tokens")
    return tuple(ids)
