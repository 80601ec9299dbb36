"""How a checkpoint stores the weights of quantised linear modules: what `quantization_config` of its config.json says,
and the tensors that stand in place of a weight.

These layouts are read: compressed-tensors, which llm-compressor writes, AutoGPTQ's, AutoAWQ's, bitsandbytes' 4 bits,
blocks of float8 as DeepSeek and Qwen publish them, and MXFP4 of gpt-oss's experts.
The module's path and these suffixes name the tensors; O outputs, I inputs, G groups of inputs that share a scale, n
values in a word of 32 bits:

    compressed-tensors   weight (O, I), or weight_packed (O, I/n) with weight_shape (2); weight_scale (1), (O, 1),
                         (O, G) or, of square blocks, (O/block, I/block); weight_zero_point, weight_g_idx (I)
    fp8                  weight (O, I), weight_scale_inv (O/block, I/block)
    gptq, gptq_v2        qweight (I/n, O), qzeros (G, O/n), scales (G, O), g_idx (I)
    awq                  qweight (I, O/8), qzeros (G, O/8), scales (G, O)
    bitsandbytes         weight (O·I/2, 1), weight.absmax, weight.quant_map (16), weight.nested_absmax and
                         weight.nested_quant_map where scales are quantised too, weight.quant_state.bitsandbytes__TYPE
    mxfp4                of all experts (E, I, O): _blocks (E, O, G, 16), two values a byte; _scales (E, O, G)

A static scale of activations (`input_scale`) is not used: activations stay in 16 bits, or are scaled row by row.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from loray.errors import IntegrityError, UnsupportedError

if TYPE_CHECKING:
    from loray.bases.checkpoint import TensorInfo

Layout = Literal["compressed-tensors", "fp8", "gptq", "gptq_v2", "awq", "bitsandbytes", "mxfp4"]
WeightKind = Literal["int8", "fp8", "int4", "nf4", "fp4", "mxfp4"]
RoundedTo = Literal["int8", "fp8", "int4"]  # of a 16-bit base, see `bases.rounding`

_WORD = 32  # bits, of packed values
_BITS: Mapping[WeightKind, int] = {"int8": 8, "fp8": 8, "int4": 4, "nf4": 4, "fp4": 4, "mxfp4": 4}
_BITSANDBYTES_BLOCK = 64
_MXFP4_GROUP = 32
_GPU_INT4_GROUPS = (32, 64, 128, 256)  # of torch's product


@dataclass(frozen=True, slots=True)
class Quantization:
    """The storage of a checkpoint's quantised linear modules. It is a part of the base's fingerprint.

    group_size  inputs that share a scale, or the sides of a square block that does; None: all inputs of a row do
    """

    layout: Layout
    kind: WeightKind
    group_size: int | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Quantization | None:
        """Read the dictionary of a config.json; None where the checkpoint is not quantised. Raises UnsupportedError,
        which names it, for a way of quantising that is not read.
        """
        fields = hf.get("quantization_config")
        if not fields:
            return None
        method = fields.get("quant_method")
        parse = _PARSERS.get(method)
        if parse is None:
            raise UnsupportedError(
                f"the checkpoint is quantized by {method}, which is not read; loray reads {', '.join(_PARSERS)}: take "
                "one of those, or the 16-bit checkpoint"
            )
        return parse(fields)

    @property
    def bits(self) -> int:
        return _BITS[self.kind]

    @property
    def has_integers(self) -> bool:
        """Say whether its values are whole numbers; then engines round a tied output head to int8."""
        return self.kind in ("int8", "int4")

    def is_kept(self, *, on_gpu: bool) -> bool:
        """Say whether engines there keep such weights; else they dequantise them."""
        if not on_gpu:
            return self.has_integers
        if self.kind == "int4":
            return self.group_size in _GPU_INT4_GROUPS
        return self.kind in ("int8", "fp8") and self.group_size is None

    def activations(self, *, on_gpu: bool) -> Literal["int8", "fp8"] | None:
        """Give what engines there round activations to, row by row; None: they stay in 16 bits."""
        if not self.is_kept(on_gpu=on_gpu) or (on_gpu and self.kind == "int4"):
            return None
        return "fp8" if self.kind == "fp8" else "int8"

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f", groups of {self.group_size}"
        return f"{self.kind} ({self.layout}{groups})"

    def row_bytes(self, width: int) -> int:
        """Count the bytes of a row of `width` inputs, with scales in fp32, where engines keep it."""
        return width * self.bits // 8 + 4 * -(-width // (self.group_size or width))


# -- config.json ------------------------------------------------------------------------------------------------------


def _refuse_unless(is_read: bool, what: str, advice: str) -> None:
    if not is_read:
        raise UnsupportedError(f"quantization_config: {what} is not read; {advice}")


def _compressed_tensors(fields: Mapping[str, Any]) -> Quantization:
    advice = "fp8, int8 and 4-bit integer weights are, for example llm-compressor's FP8_DYNAMIC, W8A8 and W4A16"
    formats = {
        fields.get("format"),
        *(group.get("format") for group in (fields.get("config_groups") or {}).values()),
    } - {None}
    read = {"int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "dense"}
    _refuse_unless(formats <= read, f"the format {' and '.join(sorted(formats - read))}", advice)
    sparsity = (fields.get("sparsity_config") or {}).get("format", "dense")
    _refuse_unless(sparsity == "dense", f"sparsity ({sparsity})", "dense weights are")
    _refuse_unless(not fields.get("transform_config"), "transform_config (rotated weights)", advice)
    status = fields.get("quantization_status", "compressed")
    _refuse_unless(status == "compressed", f"quantization_status {status!r}", "save it compressed")
    kinds = {_compressed_group(name, group, advice) for name, group in (fields.get("config_groups") or {}).items()}
    _refuse_unless(len(kinds) == 1, f"a checkpoint with {len(kinds)} kinds of weights", "one kind is")
    kind, group_size = kinds.pop()
    return Quantization("compressed-tensors", kind, group_size)


def _compressed_group(name: str, group: Mapping[str, Any], advice: str) -> tuple[WeightKind, int | None]:
    weights = group.get("weights")
    _refuse_unless(weights is not None, f"{name}, which quantizes activations alone,", advice)
    assert weights is not None
    kinds: dict[Any, WeightKind] = {(8, "int"): "int8", (8, "float"): "fp8", (4, "int"): "int4"}
    found = weights.get("num_bits", 8), weights.get("type", "int")
    _refuse_unless(found in kinds, f"{name} with {found[0]}-bit {found[1]} weights", advice)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "block":
        sides = set(weights.get("block_structure") or ())
        _refuse_unless(len(sides) == 1, f"{name} with blocks of {weights.get('block_structure')}", "square blocks are")
        return kinds[found], int(sides.pop())
    _refuse_unless(strategy in (None, "tensor", "channel", "group"), f"{name} with the strategy {strategy}", advice)
    return kinds[found], int(size) if size and size > 0 else None


def _fp8(fields: Mapping[str, Any]) -> Quantization:
    sides = set(fields.get("weight_block_size") or ())
    _refuse_unless(len(sides) == 1, f"fp8 with blocks of {fields.get('weight_block_size')}", "square blocks are")
    return Quantization("fp8", "fp8", int(sides.pop()))


def _gptq(fields: Mapping[str, Any]) -> Quantization:
    bits, layout = fields.get("bits"), fields.get("checkpoint_format") or "gptq"
    kinds: dict[Any, WeightKind] = {4: "int4", 8: "int8"}
    _refuse_unless(bits in kinds, f"GPTQ with {bits} bits", "4 and 8 are")
    is_marlin = layout not in ("gptq", "gptq_v2") or fields.get("is_marlin_format")
    _refuse_unless(not is_marlin, "GPTQ repacked for a kernel (marlin)", "checkpoint_format gptq and gptq_v2 are")
    _refuse_unless(not fields.get("dynamic"), "GPTQ with bits by module (`dynamic`)", "one number of bits is")
    size = fields.get("group_size")
    layouts: dict[Any, Layout] = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
    return Quantization(layouts[layout], kinds[bits], int(size) if size and size > 0 else None)


def _awq(fields: Mapping[str, Any]) -> Quantization:
    bits = fields.get("bits", fields.get("w_bit"))
    version = str(fields.get("version") or fields.get("format") or "gemm").lower()
    _refuse_unless(bits == 4, f"AWQ with {bits} bits", "4 are")
    _refuse_unless(version == "gemm", f"AWQ's version {version}", "its version gemm is")
    size = fields.get("group_size", fields.get("q_group_size"))
    return Quantization("awq", "int4", int(size) if size and size > 0 else None)


def _bitsandbytes(fields: Mapping[str, Any]) -> Quantization:
    is_read = bool(fields.get("load_in_4bit")) and not fields.get("load_in_8bit")
    _refuse_unless(is_read, "bitsandbytes' LLM.int8()", "its 4 bits are (nf4, fp4)")
    kind = fields.get("bnb_4bit_quant_type", "fp4")
    _refuse_unless(kind in ("nf4", "fp4"), f"bitsandbytes' {kind}", "nf4 and fp4 are")
    return Quantization("bitsandbytes", kind, _BITSANDBYTES_BLOCK)


_PARSERS: Mapping[Any, Callable[[Mapping[str, Any]], Quantization]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": lambda fields: Quantization("mxfp4", "mxfp4", _MXFP4_GROUP),
}


# -- tensors ----------------------------------------------------------------------------------------------------------

STATE = "weight.quant_state.bitsandbytes__"
_PARTS: Mapping[Layout, tuple[str, ...]] = {
    "compressed-tensors": (
        *("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"),
        *("input_scale", "input_zero_point", "output_scale"),
    ),
    "fp8": ("weight", "weight_scale_inv", "input_scale"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "gptq_v2": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "bitsandbytes": (
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *(f"{STATE}nf4", f"{STATE}fp4"),
    ),
}
_MARKS: Mapping[Layout, str] = {  # of a module whose weight is quantised
    "compressed-tensors": "weight_scale",
    "fp8": "weight_scale_inv",
    "gptq": "qweight",
    "gptq_v2": "qweight",
    "awq": "qweight",
    "bitsandbytes": "weight.absmax",
}


class StoredWeight(NamedTuple):
    """`parts` stand in place of a weight of shape (O, I), by their suffixes."""

    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]


class Contents(NamedTuple):
    """A checkpoint holds these, by name: `plain` tensors are stored as they are, `quantized` weights in parts."""

    plain: Mapping[str, TensorInfo]
    quantized: Mapping[str, StoredWeight]


def contents(quantization: Quantization | None, tensors: Iterable[TensorInfo]) -> Contents:
    """Sort the tensors of a checkpoint. Its quantised weights are named as plain ones are,
    `model.layers.0.self_attn.q_proj.weight`.

    Raises IntegrityError where a part is missing or damaged.
    """
    infos = {info.name: info for info in tensors}
    quantized = {} if quantization is None else _stored_weights(quantization, infos)
    parts = {info.name for stored in quantized.values() for info in stored.parts.values()}
    return Contents({name: info for name, info in infos.items() if name not in parts}, quantized)


def _stored_weights(quantization: Quantization, infos: Mapping[str, TensorInfo]) -> dict[str, StoredWeight]:
    if quantization.layout == "mxfp4":
        return _mxfp4_weights(infos)
    modules: defaultdict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for suffix in _PARTS[quantization.layout]:
        for name, info in infos.items():
            if name.endswith(f".{suffix}"):
                modules[name.removesuffix(f".{suffix}")][suffix] = info
    found = {}
    for module, parts in modules.items():
        if _MARKS[quantization.layout] in parts:
            try:
                found[f"{module}.weight"] = StoredWeight(_shape(quantization, parts), parts)
            except KeyError as e:
                raise IntegrityError(f"{module} is incomplete: the tensor {module}.{e.args[0]} is missing") from e
            except (ValueError, TypeError, OSError) as e:
                raise IntegrityError(f"{module} is damaged: {e}") from e
    return found


def _mxfp4_weights(infos: Mapping[str, TensorInfo]) -> dict[str, StoredWeight]:
    found = {}
    for name, blocks in infos.items():
        if name.endswith("_blocks"):
            weight = name.removesuffix("_blocks")
            if (scales := infos.get(f"{weight}_scales")) is None:
                raise IntegrityError(f"{weight} is incomplete: the tensor {weight}_scales is missing")
            if len(blocks.shape) != 4 or blocks.shape[3] != _MXFP4_GROUP // 2 or scales.shape != blocks.shape[:3]:
                raise IntegrityError(f"{weight} is damaged: blocks {blocks.shape} and scales {scales.shape} do not fit")
            experts, out, num_groups, _ = blocks.shape
            shape = (experts, num_groups * _MXFP4_GROUP, out)
            found[weight] = StoredWeight(shape, {"blocks": blocks, "scales": scales})
    return found


def _shape(quantization: Quantization, parts: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """(O, I). Raises KeyError, which has the suffix of a part that is missing."""
    in_word = _WORD // quantization.bits
    match quantization.layout:
        case "compressed-tensors" | "fp8":
            if "weight_packed" in parts:
                out, words = parts["weight_packed"].shape
                _ = parts["weight_shape"]
                return out, words * in_word
            out, width = parts["weight"].shape
            if (dtype := parts["weight"].dtype) != (stored := "F8_E4M3" if quantization.kind == "fp8" else "I8"):
                raise ValueError(f"its weight is {dtype}, not {stored}")
            return out, width
        case "bitsandbytes":
            out, width = (int(n) for n in state_of(parts)["shape"])
            if 2 * parts["weight"].shape[0] != out * width or "weight.quant_map" not in parts:
                raise ValueError(f"its 4-bit weight has {parts['weight'].shape[0]} bytes, not those of {(out, width)}")
            return out, width
        case layout:
            first, second = parts["qweight"].shape
            _ = parts["qzeros"], parts["scales"]
            return (second * in_word, first) if layout == "awq" else (second, first * in_word)


def state_of(parts: Mapping[str, TensorInfo]) -> Mapping[str, Any]:
    """Read bitsandbytes' description of a weight: shape, dtype, sizes of blocks. Raises KeyError without one."""
    info = next((info for suffix, info in parts.items() if suffix.startswith(STATE)), None)
    if info is None:
        raise KeyError(f"{STATE}nf4")
    with info.file.open("rb") as f:
        f.seek(info.start)
        state: Mapping[str, Any] = json.loads(f.read(info.stop - info.start))
    return state
