"""The tensors of a Hugging Face checkpoint and its fingerprint, from the headers of its safetensors files.

A safetensors file is 8 bytes with the length of the header, the header as JSON, then the bytes of the tensors, without
gaps. Only reading tensors needs torch. Hashing reads the bytes once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from loray.bases.config import ModelConfig
from loray.bases.quantization import StoredWeight, contents
from loray.errors import BaseMismatch, IntegrityError, UnsupportedError
from loray.files import canonical_json
from loray.spec import ATTENTION_MODULES, DTYPE_BYTES, MLP_MODULES, DType
from loray.telemetry import StageProgress

if TYPE_CHECKING:
    from torch import Tensor


# The format's codes → torch's names.
DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "BOOL": "bool",
}
DTYPE_CODES: Mapping[str, str] = {name: code for code, name in DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class TensorEntry(NamedTuple):
    """`dtype` is the format's code; the tensor's bytes are `file[start:stop]`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_end(beginning: bytes, *, source: str) -> int:
    """Find the position behind the header, from a file's first 8 bytes. Raises IntegrityError, which names `source`."""
    length = int.from_bytes(beginning[:8], "little")
    if len(beginning) < 8 or length > _MAX_HEADER_BYTES:
        raise IntegrityError(f"{source} is damaged: it is not a safetensors file")
    return 8 + length


def parse_header(beginning: bytes, *, source: str) -> dict[str, TensorEntry]:
    """Read the tensors by name, from the file's bytes up to `header_end` at least.

    Raises IntegrityError, which names `source`, where the header is damaged, or tensors overlap, leave gaps, or have
    another number of bytes than their shape and dtype need.
    """
    end = header_end(beginning, source=source)
    try:
        header = json.loads(beginning[8:end])
        header.pop("__metadata__", None)
        entries = {}
        for name, fields in header.items():
            start, stop = (end + int(offset) for offset in fields["data_offsets"])
            entries[name] = TensorEntry(str(fields["dtype"]), tuple(map(int, fields["shape"])), start, stop)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise IntegrityError(f"{source} is damaged: its header cannot be read ({type(e).__name__})") from e
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end or entry.stop < entry.start:
            raise IntegrityError(f"{source} is damaged: the bytes of tensor {name} are not behind those before it")
        if min(entry.shape, default=0) < 0:
            raise IntegrityError(f"{source} is damaged: tensor {name} has a negative size")
        item_bytes = DTYPE_BYTES.get(DTYPES.get(entry.dtype, ""))
        if item_bytes is not None and math.prod(entry.shape) * item_bytes != entry.stop - entry.start:
            raise IntegrityError(f"{source} is damaged: tensor {name} has the wrong number of bytes")
        end = entry.stop
    return entries


# -- a checkpoint of one file or several ------------------------------------------------------------------------------

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_CHUNK_BYTES = 8 << 20
_DTYPES = ("BF16", "F16", "F32")  # of weights that the decoder reads
# Old exporters store RoPE's frequencies, which are a function of the configuration. Scales of a quantised KV cache are
# of no use for one in 16 bits.
_UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.(rotary_emb\.inv_freq|[qkv]_scale)")


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint; its bytes are `file[start:stop]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of the checkpoint, sorted. Raises UnsupportedError where it has none."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as e:
            raise IntegrityError(f"{index} is not a valid index of shards: {e!r}") from e
        if any(Path(name).name != name for name in names):
            raise IntegrityError(f"{index} names files outside its folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise IntegrityError(f"{folder} is incomplete: {', '.join(missing)} missing")
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise UnsupportedError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when they are read; "
            "save the model with save_pretrained, which writes safetensors"
        )
    raise UnsupportedError(f"{folder} has no {SINGLE_FILE} nor {INDEX_FILE}: it is not a safetensors checkpoint")


def tensor_infos(folder: Path) -> list[TensorInfo]:
    """List all tensors of the checkpoint, sorted by name. Raises IntegrityError where a header is damaged."""
    infos: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for info in _tensors_in(file):
            if info.name in infos:
                raise IntegrityError(f"tensor {info.name} is both in {infos[info.name].file.name} and in {file.name}")
            infos[info.name] = info
    return [infos[name] for name in sorted(infos)]


def stored_dtype(folder: Path) -> DType:
    """Find the dtype of most of the bytes of the checkpoint's weights, of those that are not quantised."""
    nbytes: Counter[str] = Counter()
    for info in tensor_infos(folder):
        if info.dtype in _DTYPES and info.name.endswith(".weight"):
            nbytes[info.dtype] += info.stop - info.start
    (code, _), *_ = nbytes.most_common(1)
    return cast("DType", DTYPES[code])


_RENAMED = {"gate": "gate", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's
_OF_MIXTRAL = re.compile(r"\.block_sparse_moe\.(?P<expert>(?:experts\.\d+\.)?)(?P<module>gate|w[123])\.")
# gpt-oss's: of weights (E, I, O) and of biases (E, O) of all experts; gate_up_proj has the outputs of both by turns.
_OF_GPT_OSS = re.compile(r"(?P<path>.+\.experts)\.(?P<matrix>gate_up|down)_proj(?P<bias>(?:_bias)?)")
_MATRICES: Mapping[str, tuple[str, ...]] = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


_OF_MODEL = re.compile(r"(?:layers\.\d+|embed_tokens|norm)\.")


def in_model(name: str) -> str:
    """Name a tensor as a model with a head has it: embedding models are saved without one, and without `model.`."""
    return f"model.{name}" if _OF_MODEL.match(name) else name


def plain_name(name: str) -> str:
    """Name a stored tensor as the decoder does, which names experts as most families do: `mlp.experts.3.gate_proj`."""
    name = in_model(name.replace(".mlp.router.", ".mlp.gate."))
    return _OF_MIXTRAL.sub(lambda m: f".mlp.{m['expert']}{_RENAMED[m['module']]}.", name, count=1)


class ExpertPart(NamedTuple):
    """Where a tensor of all experts has one's: outputs `first`, `first + every` …"""

    expert: int
    first: int
    every: int


def expert_parts(name: str, shape: Sequence[int]) -> dict[str, ExpertPart]:
    """Find what a tensor of all experts has, by the decoder's names; nothing in any other, also a scalar."""
    if (match := _OF_GPT_OSS.fullmatch(name)) is None:
        return {}
    modules, kind = _MATRICES[match["matrix"]], "bias" if match["bias"] else "weight"
    return {
        f"{match['path']}.{expert}.{module}.{kind}": ExpertPart(expert, first, len(modules))
        for expert in range(shape[0])
        for first, module in enumerate(modules)
    }


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Read (name, tensor) over all shards, sorted by name, in the stored dtypes."""
    from safetensors import safe_open

    handles: dict[Path, Any] = {file: safe_open(str(file), framework="pt") for file in weight_files(folder)}
    for info in tensor_infos(folder):
        yield info.name, handles[info.file].get_tensor(info.name)


def canonical_config(config: ModelConfig) -> str:
    """Write a configuration as canonical JSON, without `eos_token_ids`: they do not change what the model computes."""
    return canonical_json({name: value for name, value in config.to_json().items() if name != "eos_token_ids"})


def fingerprint(folder: Path, config_json: str, progress: StageProgress | None = None) -> str:
    """Compute the SHA-256 over `config_json` and the name, dtype, shape and bytes of every tensor, sorted by name.

    It does not depend on how the checkpoint is cut into shards.
    """
    infos = tensor_infos(folder)
    total = sum(info.stop - info.start for info in infos) or 1
    digest = hashlib.sha256(config_json.encode())
    done = 0
    for info in infos:
        digest.update(f"\n{info.name} {info.dtype} {list(info.shape)}\n".encode())
        with info.file.open("rb") as f:
            f.seek(info.start)
            left = info.stop - info.start
            while left:
                chunk = f.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise IntegrityError(f"{info.file} ends before tensor {info.name}")
                digest.update(chunk)
                left -= len(chunk)
                done += len(chunk)
        if progress is not None:
            progress(done / total)
    return digest.hexdigest()


def check_tensors(folder: Path, config: ModelConfig) -> None:
    """Check that the checkpoint holds exactly the tensors of `config`.

    Raises IntegrityError for a missing tensor, BaseMismatch for a wrong shape, and UnsupportedError for a tensor that
    the decoder does not use or a dtype that it does not read.
    """
    expected = expected_shapes(config)
    plain, quantized = contents(config.quantization, tensor_infos(folder))
    held = dict(_unfused({**quantized, **plain}, config, folder))
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")  # some exporters write the tied copy, which the decoder does not read
        held.pop("lm_head.weight", None)
    for name, shape in expected.items():
        found = held.pop(name, None)
        if found is None:
            raise IntegrityError(f"{folder} is incomplete: tensor {name} is missing")
        if found.shape != shape:
            raise BaseMismatch(f"{folder}: {name} has shape {found.shape}, its config.json says {shape}")
        if isinstance(found, TensorInfo) and found.dtype not in _DTYPES:
            raise UnsupportedError(
                f"{folder}: {name} is {found.dtype}; only {', '.join(_DTYPES)} weights are supported, and quantised "
                "ones as quantization_config in config.json says"
            )
    rest = [
        name
        for name, found in held.items()
        if isinstance(found, StoredWeight) or not (_UNUSED.fullmatch(name) or _adds_zero(found))
    ]
    if rest:
        raise UnsupportedError(f"{folder}: tensor {rest[0]} is no part of {config.architecture}")


def _unfused(
    held: Mapping[str, TensorInfo | StoredWeight], config: ModelConfig, folder: Path
) -> Iterator[tuple[str, TensorInfo | StoredWeight]]:
    """Name what a checkpoint holds as `expected_shapes` does. Raises BaseMismatch where rows are too many or few."""
    for name, stored in held.items():
        parts = fused_parts(name, config)
        if parts and stored.shape[0] != (rows := max(own.stop for own in parts.values())):
            raise BaseMismatch(f"{folder}: {name} has {stored.shape[0]} rows, its config.json says {rows}")
        for part, own in parts.items():
            shape: Any = (own.stop - own.start, *stored.shape[1:])
            yield part, stored._replace(shape=shape)
        own_experts = expert_parts(name, stored.shape)
        for part, (_, _, every) in own_experts.items():
            shape = (stored.shape[-1] // every, *stored.shape[1:-1])
            yield part, stored._replace(shape=shape)
        if not parts and not own_experts:
            yield plain_name(name), stored


def fused_parts(name: str, config: ModelConfig) -> dict[str, slice]:
    """Find the tensors that a checkpoint has as rows of the tensor `name`; none where that is a module's own."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return {name.replace(module, part): rows for part, rows in config.fused.get(module, {}).items()}


def _adds_zero(info: TensorInfo) -> bool:
    """True of a bias of zeros, which old exporters of GPTQ give every module."""
    if not info.name.endswith("_proj.bias"):
        return False
    with info.file.open("rb") as f:
        f.seek(info.start)
        return not any(f.read(info.stop - info.start))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List the shape of every tensor by its `plain_name`, with `lm_head.weight` also where it is tied."""
    h = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, h),
        "model.norm.weight": (h,),
    }
    shapes["lm_head.weight"] = (config.vocab_size, h)
    for i, spec in enumerate(config.layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (h,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (h,)
        if spec.norms == "sandwich":
            shapes[f"{layer}.pre_feedforward_layernorm.weight"] = (h,)
            shapes[f"{layer}.post_feedforward_layernorm.weight"] = (h,)
        for module in ATTENTION_MODULES:
            shapes[f"{layer}.self_attn.{module}.weight"] = config.module_shape(module)
            if spec.qkv_bias and module != "o_proj":
                shapes[f"{layer}.self_attn.{module}.bias"] = config.module_shape(module)[:1]
        mlps = [f"{layer}.mlp"]
        if spec.o_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (h,)
        if spec.has_sinks:
            shapes[f"{layer}.self_attn.sinks"] = (config.num_heads,)
        has_biases = spec.experts is not None and spec.experts.bias
        if spec.experts is not None:
            shapes[f"{layer}.mlp.gate.weight"] = (spec.experts.num, h)
            if has_biases:
                shapes[f"{layer}.mlp.gate.bias"] = (spec.experts.num,)
            mlps = [f"{layer}.mlp.experts.{expert}" for expert in range(spec.experts.num)]
        for mlp in mlps:
            for module in MLP_MODULES:
                shapes[f"{mlp}.{module}.weight"] = config.module_shape(module)
                if has_biases:
                    shapes[f"{mlp}.{module}.bias"] = config.module_shape(module)[:1]
        if spec.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def _tensors_in(file: Path) -> list[TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as f:
        beginning = f.read(8)
        beginning += f.read(header_end(beginning, source=str(file)) - len(beginning))
    entries = parse_header(beginning, source=str(file))
    for name, entry in entries.items():
        if entry.stop > size:
            raise IntegrityError(f"{file} is damaged: it ends before tensor {name}")
    return [TensorInfo(name, e.dtype, e.shape, file, e.start, e.stop) for name, e in entries.items()]
