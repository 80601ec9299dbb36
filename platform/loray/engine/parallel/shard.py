"""A rank's part of the model and of an adapter.

q, k, v, gate and up are split by output (heads, columns of the MLP): column-parallel. o and down are split by input:
row-parallel, and each rank's result is a partial sum. Norms and the embedding are complete on every rank: adapters
replace whole embedding rows, and a vocabulary-parallel lookup would cost an all-reduce as wide as the hidden size. The
output head, all of which is read for every token, is split by vocabulary.

    module             A, r rows of the input's width          Bᵀ, r rows of the output's width
    column-parallel    all of it                               the rank's columns
    row-parallel       the rank's columns, as of the input     all of it

An A that sums columns (see `adapter_layout`) is split so, too; the rank's sums are the whole input's in another order,
and so are the rows of its Bᵀ.

All parts have the same shape, so one allocator's answers fit all ranks. VeRA's vector b and scales of outputs are
split as the columns of B are; two outputs that RoAd turns together must be on one rank. VeRA's vector d, norms and
embedding rows are complete on every rank, and so is the shared pair, since modules of different widths use different
parts of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.bases.config import ModelConfig
from loray.bases.weights import unfused
from loray.engine.memory.adapter_layout import SUMMED, AdapterShape, LayerGroup, Matrix
from loray.engine.memory.blocks import BlockKind, Geometry
from loray.engine.pool.loader import LoadAdapter
from loray.engine.pool.packed import PackedAdapter, Packer, bytes_taken, row_order
from loray.engine.pool.pool import input_shapes
from loray.errors import SpecError, UnsupportedError
from loray.spec import LINEAR_MODULES, AdapterRef, ServeSpec
from loray_kernels import INPUTS, InputShape, QuantizedWeight, Weight
from loray_kernels.reference import quantize_rows

ROW_PARALLEL = frozenset({"o_proj", "down_proj"})
COLUMN_PARALLEL = frozenset(LINEAR_MODULES) - ROW_PARALLEL
_SPLIT_BY_OUTPUT = frozenset({"lora_b", "vera_b", "dora", "scale", "turn"})  # of column-parallel modules
_SPLIT_BY_INPUT = frozenset({"lora_a", SUMMED})  # of row-parallel ones


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of one rank of several."""

    rank: int
    world_size: int

    def slice(self, size: int) -> slice:
        """Find the rank's part of `size` elements, which the ranks divide evenly."""
        assert size % self.world_size == 0
        own = size // self.world_size
        return slice(self.rank * own, (self.rank + 1) * own)


def check_divisible(config: ModelConfig, world_size: int) -> None:
    """Raise SpecError unless the ranks evenly divide everything that is split."""
    sizes = {
        "attention heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "columns of the MLP": config.intermediate_size,
        "hidden columns": config.hidden_size,
    }
    for what, size in sizes.items():
        if size % world_size:
            fitting = [n for n in range(1, size + 1) if not any(s % n for s in sizes.values())]
            raise SpecError(
                f"tensor_parallel_size={world_size} does not divide the base's {size} {what}; take one of {fitting}"
            )


def local_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """Make the configuration of one rank's decoder."""
    n = shard.world_size
    return replace(
        config,
        num_heads=config.num_heads // n,
        num_kv_heads=config.num_kv_heads // n,
        intermediate_size=config.intermediate_size // n,
        tie_word_embeddings=False,  # the head is split, the embedding is not
    )


def local_tensors(
    tensors: Iterable[tuple[str, Weight]], config: ModelConfig, shard: Shard
) -> Iterator[tuple[str, Weight]]:
    """Cut the rank's parts from a checkpoint's tensors, with the same names. A tied head is rounded to int8 where the
    checkpoint rounds its layers to integers, as by a single rank. SpecError if that cuts a group of columns that share
    a scale.
    """
    has_integers = config.quantization is not None and config.quantization.has_integers
    for name, tensor in unfused(tensors, config):
        module, _, kind = name.removeprefix("model.").rpartition(".")
        last = module.rpartition(".")[2]
        if last in COLUMN_PARALLEL:
            yield name, _rows(tensor, shard.slice(tensor.shape[0]))
        elif last in ROW_PARALLEL:
            if kind == "weight":
                yield name, _columns(name, tensor, shard)
            else:  # which one rank adds to its part of the sum
                assert isinstance(tensor, Tensor)
                yield name, tensor if shard.rank == 0 else torch.zeros_like(tensor)
        elif kind == "sinks":
            yield name, _rows(tensor, shard.slice(tensor.shape[0]))
        elif last == "lm_head":
            if not config.tie_word_embeddings:  # some checkpoints have one although it is tied
                yield name, local_head(tensor, shard)
        else:
            yield name, tensor
        if last == "embed_tokens" and config.tie_word_embeddings:
            assert isinstance(tensor, Tensor)
            head = QuantizedWeight(*quantize_rows(tensor)) if has_integers else tensor
            yield "lm_head.weight", local_head(head, shard)


def _rows(weight: Weight, rows: slice) -> Weight:
    """Copy rows: a view would keep the whole tensor."""
    return (weight.rows(rows) if isinstance(weight, QuantizedWeight) else weight[rows]).clone()


def _columns(name: str, weight: Weight, shard: Shard) -> Weight:
    """Copy the rank's columns."""
    columns = shard.slice(weight.shape[1])
    if not isinstance(weight, QuantizedWeight):
        return weight[:, columns].clone()
    try:
        return weight.columns(columns).clone()
    except ValueError as e:
        raise SpecError(f"tensor_parallel_size={shard.world_size} does not fit {name}: {e}; take fewer ranks") from e


def local_head(head_VD: Weight, shard: Shard) -> Weight:
    """Cut the rank's rows from a vocabulary that is padded with zeros so that the ranks divide it."""
    padding = -head_VD.shape[0] % shard.world_size
    if padding:
        zeros = (0, 0, 0, padding)
        head_VD = head_VD.padded(padding) if isinstance(head_VD, QuantizedWeight) else F.pad(head_VD, zeros)
    return _rows(head_VD, shard.slice(head_VD.shape[0]))


def local_device(spec: ServeSpec, rank: int) -> torch.device:
    """Find the rank's device: on CUDA each rank has one of its own if the process sees several."""
    device = torch.device(spec.device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", rank % torch.cuda.device_count())
    return device


# -- adapters ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardedAdapter(PackedAdapter):
    """Rank 0's part, and `others`: those of ranks 1, 2 …"""

    others: tuple[PackedAdapter, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all ranks' parts."""
        return sum(t.nbytes for part in (self, *self.others) for t in part.parts)

    @property
    def host_bytes(self) -> int:
        """The host memory that all ranks' parts take."""
        parts = (self, *self.others)
        return sum(bytes_taken(t, pinned=part.pinned) for part in parts for t in part.parts)


def split_inputs(config: ModelConfig, capacity: int, shard: Shard) -> tuple[InputShape, ...]:
    """Give the `input_shapes` of a rank's part of adapters. `config` is the rank's."""
    shapes, n = [], shard.world_size
    for modules, shape in zip(INPUTS, input_shapes(config, capacity), strict=True):
        outputs, inputs = zip(*map(config.module_shape, modules), strict=True)
        if modules[0] in COLUMN_PARALLEL:
            rows = zip(shape.pair_rows, outputs, strict=True)
            shapes.append(shape._replace(pair_rows=tuple(n * first + shard.rank * width for first, width in rows)))
        else:
            shapes.append(shape._replace(pair_column=shard.rank * inputs[0]))
    return tuple(shapes)


def shard_adapter(
    packed: PackedAdapter, whole: Geometry, local: Geometry, world_size: int, *, pinned: bool = False
) -> ShardedAdapter:
    """Cut `packed`, which is for blocks of the geometry `whole`, into parts for blocks of the geometry `local`.

    pinned  rank 0's part is in page-locked memory; the others are sent
    """
    parts = [
        _part(packed, whole, local, Shard(rank, world_size), pinned=pinned and rank == 0) for rank in range(world_size)
    ]
    first = parts[0]
    assert all(part.shape == first.shape for part in parts)
    return ShardedAdapter(
        shape=first.shape,
        layered=first.layered,
        flat=first.flat,
        token_ids=first.token_ids,
        pair=first.pair,
        rope=first.rope,
        pinned=first.pinned,
        others=tuple(parts[1:]),
    )


def _part(packed: PackedAdapter, whole: Geometry, local: Geometry, shard: Shard, *, pinned: bool) -> PackedAdapter:
    groups: list[LayerGroup] = []
    layered: list[Tensor] = []
    for group, rows_LE in zip(packed.shape.groups, packed.layered, strict=True):
        own: dict[Matrix, Tensor] = {}
        summed = {m.module: m.width for m in group.matrices if m.role == SUMMED and m.module in ROW_PARALLEL}
        for matrix, whole_LRW in _unpack(rows_LE, group.matrices, whole.capacity(BlockKind.LAYERED)).items():
            own_LRW = _slice(matrix, whole_LRW, shard)
            if matrix.role == "lora_b" and matrix.module in summed:
                # Sums begin at the rank's first column: its sum i is the whole input's sum (first + i) mod r.
                own_LRW = own_LRW.roll(-shard.slice(summed[matrix.module]).start, dims=1)
            own[matrix._replace(width=own_LRW.shape[2])] = own_LRW
        groups.append(LayerGroup(group.layers, tuple(own)))
        layered.append(_pack(own, local.capacity(BlockKind.LAYERED), pinned=pinned))
    flat = _unpack(packed.flat[None], packed.shape.flat, whole.capacity(BlockKind.FLAT))
    return replace(
        packed,
        shape=AdapterShape(tuple(groups), packed.shape.flat),
        layered=tuple(layered),
        flat=_pack(flat, local.capacity(BlockKind.FLAT), pinned=pinned)[0],
        pinned=pinned,
    )


def _slice(matrix: Matrix, rows_LRW: Tensor, shard: Shard) -> Tensor:
    """The rank's part of a layered matrix's rows, (layers, rows, width)."""
    split = _SPLIT_BY_OUTPUT if matrix.module in COLUMN_PARALLEL else _SPLIT_BY_INPUT
    if matrix.role not in split:
        return rows_LRW
    if matrix.role == "turn" and (matrix.width // shard.world_size) % (group := int(2 * matrix.scale)):
        raise UnsupportedError(
            f"the adapter turns pairs in groups of {group}, which does not divide the {matrix.width} outputs of "
            f"{matrix.module} over {shard.world_size} ranks: train it with a smaller adapter.group_size"
        )
    return rows_LRW[:, :, shard.slice(matrix.width)]


def _unpack(rows_LE: Tensor, matrices: tuple[Matrix, ...], capacity: int) -> dict[Matrix, Tensor]:
    """(layers, rows, width) of each matrix; without memory where it is not in the pool."""
    found: dict[Matrix, Tensor] = {}
    for m, stretches in row_order(matrices, capacity).stretches.items():
        parts = [rows_LE[:, s.start : s.start + m.rows * s.width].view(-1, m.rows, s.width) for s in stretches]
        empty_LRW = torch.empty(len(rows_LE), m.rows, m.width, dtype=rows_LE.dtype, device="meta")
        found[m] = torch.cat(parts, dim=2) if parts else empty_LRW
    return found


def _pack(rows: Mapping[Matrix, Tensor], capacity: int, *, pinned: bool) -> Tensor:
    """(layers, elements) in the order in which the pool takes them; (1, 0) if there are no rows."""
    order = row_order(tuple(rows), capacity)
    tensors = list(rows.values())
    if not tensors:
        return torch.empty(1, 0)
    packed_LE = torch.empty(tensors[0].shape[0], order.num_elements, dtype=tensors[0].dtype, pin_memory=pinned)
    for matrix, rows_LRW in rows.items():
        for column, width, start in order.stretches[matrix]:
            to_LE = packed_LE[:, start : start + matrix.rows * width]
            to_LE.view(-1, matrix.rows, width).copy_(rows_LRW[:, :, column : column + width])
    return packed_LE


def sharded_loads(load: LoadAdapter, whole: Geometry, world_size: int) -> LoadAdapter:
    """Make `load` cut its adapters. `whole`: the geometry of an engine of one rank with as many blocks."""

    def cut(ref: AdapterRef, packer: Packer) -> PackedAdapter:
        packed = load(ref, replace(packer, geometry=whole, pinned=False))
        return shard_adapter(packed, whole, packer.geometry, world_size, pinned=packer.pinned)

    return cut
