"""`WeightSource`: the weights of a base by the names of plain parameters, however its checkpoint stores them; and
`write_tensors`, which writes a checkpoint.

Shapes: O outputs, I inputs, G groups of inputs that share a scale. W is scale · (q − zero); `bases.quantization` has
the tensors of each layout. Packed values stand in words of 32 bits from the lowest bits on, AWQ's in an order of their
own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loray.bases.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    expert_parts,
    fused_parts,
    plain_name,
    tensor_infos,
)
from loray.bases.config import ModelConfig
from loray.bases.quantization import Contents, Layout, Quantization, StoredWeight, contents, state_of
from loray.errors import IntegrityError
from loray_kernels.ops import QuantizedWeight, Weight

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of eight, that each four bits of a word are of
_SAME_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


class WeightSource:
    """Reads weights by name, or by `plain_name`, from files that are opened at the first one. Any thread may use it.

    A quantised weight whose scales do not belong to neighbouring inputs (GPTQ's desc_act) or are not linear (NF4) is
    read dequantised.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._folder, self._quantization = folder, config.quantization

    @cached_property
    def _contents(self) -> Contents:
        return contents(self._quantization, tensor_infos(self._folder))

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """The names in the checkpoint, by those and by the decoder's."""
        names = (*self._contents.plain, *self._contents.quantized)
        return {plain_name(name): name for name in names} | {name: name for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[tuple[str, Weight]]:
        """Read (name, weight) over all files, sorted by name; plain tensors in the stored dtypes."""
        with ExitStack() as opened:
            files: dict[Path, Any] = {}

            def tensor(info: TensorInfo) -> Tensor:
                if info.file not in files:
                    files[info.file] = opened.enter_context(_open(info.file))
                found: Tensor = files[info.file].get_tensor(info.name)
                return found

            for name in sorted((*self._contents.plain, *self._contents.quantized)):
                yield name, self._read(name, tensor)

    def read(self, name: str) -> Weight:
        """Read a weight; a plain one in its stored dtype, a view of the mapped file. Raises IntegrityError if there is
        none.
        """
        return self._read(name, _tensor)

    def dense(self, name: str) -> Tensor:
        """Read a weight likewise, a quantised one dequantised, in fp32."""
        weight = self.read(name)
        return weight.dequantized(slice(None), torch.float32) if isinstance(weight, QuantizedWeight) else weight

    def dense_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read its rows from `start` up to `stop`, likewise."""
        if (info := self._contents.plain.get(self._names.get(name, name))) is not None:
            with _open(info.file) as f:
                rows: Tensor = f.get_slice(info.name)[start:stop]
            return rows
        weight = self.read(name)
        if isinstance(weight, QuantizedWeight):
            return weight.dequantized(slice(start, stop), torch.float32)
        return weight[start:stop]

    def _read(self, name: str, tensor: Callable[[TensorInfo], Tensor]) -> Weight:
        name = self._names.get(name, name)
        if (info := self._contents.plain.get(name)) is not None:
            return tensor(info)
        stored = self._contents.quantized.get(name)
        if stored is None:
            raise IntegrityError(f"the checkpoint lacks the tensor {name!r}; add the base again")
        assert self._quantization is not None
        try:
            return _DECODERS[self._quantization.layout](self._quantization, stored, tensor)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise IntegrityError(f"{name} is not stored as config.json's quantization_config says: {e}") from e


def unfused(tensors: Iterable[tuple[str, Weight]], config: ModelConfig) -> Iterator[tuple[str, Weight]]:
    """Yield a checkpoint's tensors by the names of `expected_shapes`."""
    for name, tensor in tensors:
        parts = fused_parts(name, config)
        for part, rows in parts.items():
            yield part, tensor.rows(rows) if isinstance(tensor, QuantizedWeight) else tensor[rows]
        experts = expert_parts(name, tensor.shape)
        for part, (expert, first, every) in experts.items():
            assert isinstance(tensor, Tensor)
            own = tensor[expert, ..., first::every]
            yield part, own.t() if own.dim() == 2 else own
        if not parts and not experts:
            yield plain_name(name), tensor


def _open(file: Path) -> Any:
    return safe_open(str(file), framework="pt")


def _tensor(info: TensorInfo) -> Tensor:
    with _open(info.file) as f:
        found: Tensor = f.get_tensor(info.name)
    return found


_SHARD_BYTES = 1 << 30  # held in memory twice while a file is written


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write files of up to `_SHARD_BYTES`, with an index where there are several, as transformers does."""
    shards: list[dict[str, str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        nonlocal size
        path = folder / f"shard-{len(shards)}.safetensors"
        save_file({name: t.contiguous() for name, t in held.items()}, path, metadata={"format": "pt"})
        shards.append(dict.fromkeys(held, path.name))
        held.clear()
        size = 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > _SHARD_BYTES:
            write()
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / SINGLE_FILE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"shard-{i}.safetensors").rename(folder / name)
    weight_map = {tensor: names[i] for i, shard in enumerate(shards) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- layouts ----------------------------------------------------------------------------------------------------------

_Read = Callable[[TensorInfo], Tensor]


def unpacked(words_XW: Tensor, bits: int, order: tuple[int, ...] = _SAME_ORDER) -> Tensor:
    """Take the values out of words of 32 bits, uint8 (X, n W) with n values a word. Value i of a word is its column
    `order[i]` of n.
    """
    num = 32 // bits
    shifts_n = torch.arange(0, 32, bits, dtype=torch.int32)
    values_XWn = (words_XW.unsqueeze(-1) >> shifts_n) & ((1 << bits) - 1)
    at_n = sorted(range(num), key=order[:num].__getitem__)
    return values_XWn[..., at_n].to(torch.uint8).flatten(1)


def _packed_weight(
    values_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, group_I: Tensor | None
) -> Weight:
    """Make a weight of values from 0 to 2^bits − 1. `group_I`: the group of each input where they are no neighbours."""
    middle = 1 << (bits - 1)
    zero_OG = None if zero_OG is None else zero_OG.float()
    if group_I is not None:
        zero_OI = float(middle) if zero_OG is None else zero_OG[:, group_I]
        return scale_OG.float()[:, group_I] * (values_OI.float() - zero_OI)
    if zero_OG is not None and bool((zero_OG == middle).all()):
        zero_OG = None
    scale_OG = scale_OG.float().contiguous()
    if bits == 4:
        return QuantizedWeight(values_OI[:, 0::2] | (values_OI[:, 1::2] << 4), scale_OG, zero_OG)
    centred_OI = (values_OI.to(torch.int16) - middle).to(torch.int8)
    return QuantizedWeight(centred_OI, scale_OG, None if zero_OG is None else zero_OG - middle)


def _uneven(quantization: Quantization, scale_OG: Tensor, width: int, group_I: Tensor | None = None) -> Tensor | None:
    """The group of each input; None where groups are as many neighbours each."""
    size = quantization.group_size or width
    neighbours_I = torch.arange(width) // size
    if group_I is None or bool((group_I < 0).all()):
        group_I = neighbours_I
    num_groups = scale_OG.shape[1]
    if num_groups == 1 or (torch.equal(group_I.long(), neighbours_I) and num_groups * size == width):
        return None
    return group_I.long()


def _compressed_tensors(quantization: Quantization, stored: StoredWeight, tensor: _Read) -> Weight:
    parts = {suffix: tensor(info) for suffix, info in stored.parts.items()}
    (out, width), zero = stored.shape, parts.get("weight_zero_point")
    scale = parts["weight_scale_inv" if quantization.layout == "fp8" else "weight_scale"].float()
    is_packed = "weight_packed" in parts
    if is_packed and zero is not None:
        zero = unpacked(zero.t(), quantization.bits).t()[:out]
    scale_OG = _by_row(scale, out, width, quantization.group_size)
    zero_OG = None if zero is None else _by_row(zero.float(), out, width, quantization.group_size)
    group_I = _uneven(quantization, scale_OG, width, parts.get("weight_g_idx"))
    if is_packed:
        bits = quantization.bits
        return _packed_weight(unpacked(parts["weight_packed"], bits), scale_OG, zero_OG, bits, group_I)
    if zero_OG is not None and not bool(zero_OG.any()):
        zero_OG = None
    q_OI = parts["weight"]
    if group_I is not None:
        values_OI = q_OI.float() if zero_OG is None else q_OI.float() - zero_OG[:, group_I]
        return values_OI * scale_OG[:, group_I]
    return QuantizedWeight(q_OI, scale_OG, zero_OG)


def _by_row(scale: Tensor, out: int, width: int, group: int | None) -> Tensor:
    """(O, G), of one scale, one a row, one a group of inputs, or one a square block."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(out, 1).contiguous()
    scale = scale.reshape(len(scale), -1)
    if len(scale) != out:
        if group is None or scale.shape != (-(-out // group), -(-width // group)):
            raise ValueError(f"scales of shape {tuple(scale.shape)} do not fit a weight of {(out, width)}")
        scale = scale.repeat_interleave(group, dim=0)[:out]
    return scale.contiguous()


def _gptq(quantization: Quantization, stored: StoredWeight, tensor: _Read) -> Weight:
    parts, bits = {suffix: tensor(info) for suffix, info in stored.parts.items()}, quantization.bits
    values_OI = unpacked(parts["qweight"].t(), bits)
    zero_OG = unpacked(parts["qzeros"], bits).t().float()
    if quantization.layout == "gptq":
        zero_OG = zero_OG + 1  # its first format stores zeros less one
    scale_OG = parts["scales"].t()
    group_I = _uneven(quantization, scale_OG, stored.shape[1], parts.get("g_idx"))
    return _packed_weight(values_OI, scale_OG, zero_OG, bits, group_I)


def _awq(quantization: Quantization, stored: StoredWeight, tensor: _Read) -> Weight:
    parts = {suffix: tensor(info) for suffix, info in stored.parts.items()}
    values_IO, zero_GO = (unpacked(parts[suffix], 4, _AWQ_ORDER) for suffix in ("qweight", "qzeros"))
    scale_OG = parts["scales"].t()
    group_I = _uneven(quantization, scale_OG, stored.shape[1])
    return _packed_weight(values_IO.t(), scale_OG, zero_GO.t(), 4, group_I)


def _bitsandbytes(quantization: Quantization, stored: StoredWeight, tensor: _Read) -> Weight:
    """Blocks of a row-major weight have a scale each, and each value is one of 16 levels (Dettmers et al., 2023)."""
    state = state_of(stored.parts)
    parts = {suffix: tensor(info) for suffix, info in stored.parts.items()}
    scale_B = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        outer_B = parts["weight.nested_absmax"].repeat_interleave(int(state["nested_blocksize"]))[: len(scale_B)]
        scale_B = parts["weight.nested_quant_map"][scale_B.long()] * outer_B + float(state["nested_offset"])
    bytes_N = parts["weight"].flatten()
    levels_E = parts["weight.quant_map"][torch.stack((bytes_N >> 4, bytes_N & 15), dim=1).flatten().long()]
    weight_E = levels_E * scale_B.repeat_interleave(int(state["blocksize"]))[: len(levels_E)]
    dtype: torch.dtype = getattr(torch, str(state["dtype"]))
    return weight_E.to(dtype).view(stored.shape)


_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _mxfp4(quantization: Quantization, stored: StoredWeight, tensor: _Read) -> Weight:
    """One of 16 levels times a power of two that 32 inputs share (Open Compute Project, 2023), which is exact in bf16.
    Of all experts, (E, I, O).
    """
    blocks_EOGb, scales_EOG = (tensor(stored.parts[part]) for part in ("blocks", "scales"))
    weight_EIO = torch.empty(stored.shape, dtype=torch.bfloat16)
    for own_IO, blocks_OGb, scales_OG in zip(weight_EIO, blocks_EOGb, scales_EOG, strict=True):
        pairs_OGb2 = torch.stack((blocks_OGb & 15, blocks_OGb >> 4), dim=-1)
        levels_OGv = torch.tensor(_LEVELS)[pairs_OGb2.long()].flatten(2)
        own_IO.copy_(torch.ldexp(levels_OGv, scales_OG.int().unsqueeze(-1) - 127).flatten(1).t())
    return weight_EIO


_DECODERS: Mapping[Layout, Callable[[Quantization, StoredWeight, _Read], Weight]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _compressed_tensors,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}
