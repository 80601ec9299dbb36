"""An adapter packed as rows of the pool: in host memory, and as a file.

`AdapterShape.demand` asks for rows by width. Here the rows of one width follow each other, widest first, cut into
segments as in the pool. So every extent that the allocator gives is filled from one contiguous stretch of each layer.
Reading a file maps the rows into memory and touches every page; nothing is copied, parsed or converted.

Shapes: V vocabulary, D hidden, R rows, L layers of a group, E elements of a layer, I input width, O output width.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loray.bases.checkpoint import DTYPE_CODES
from loray.bases.weights import WeightSource
from loray.engine.memory.adapter_layout import OF_INPUTS, AdapterShape, LayerGroup, Matrix, pooled, rows_by_width
from loray.engine.memory.blocks import BlockKind, Extent, Geometry
from loray.engine.pool.copies import KnownFile, KnownFiles, Write, copies_of
from loray.errors import IntegrityError
from loray.methods.weights import AdapterWeights, LoraWeights, ModuleKey, Role, SharedProjection
from loray.spec import RopeParameters
from loray_kernels.memory import Recycled

FIRST_BYTES = (4 << 20, 8 << 20, 16 << 20)  # of the tensors for which memory is prepared at the start
_IDLE_BYTES = 64 << 20  # of host memory that is kept for the next adapters
_COMPARED_BYTES = 16 << 20  # of the base's rows at a time
_NORMS = {
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
}
_FORMAT = 1  # of the file
_ORDERS = 256  # of rows that are kept: adapters of one recipe have the same
_PAGE = mmap.PAGESIZE

PackedRows = Mapping[Matrix, Tensor]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter's rows in host memory.

    layered    for each group of the shape, (layers of the group, elements)
    flat       rows without a layer, (elements,)
    token_ids  tokens that have an embedding row of the adapter's, in the order of its flat rows
    pinned     whether the rows are in page-locked memory
    """

    shape: AdapterShape
    layered: tuple[Tensor, ...]
    flat: Tensor
    token_ids: tuple[int, ...]
    pair: SharedProjection | None
    rope: RopeParameters | None
    pinned: bool = False

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (*self.layered, self.flat)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts)

    @property
    def host_bytes(self) -> int:
        """The host memory that the rows take."""
        return sum(bytes_taken(t, pinned=self.pinned) for t in self.parts)


def bytes_taken(tensor: Tensor, *, pinned: bool) -> int:
    """Count the host memory of a tensor: torch takes page-locked memory by powers of two."""
    return 1 << (tensor.nbytes - 1).bit_length() if pinned and tensor.nbytes else tensor.nbytes


class RowSpan(NamedTuple):
    """Columns [column, column + width) of a matrix's rows; row follows row from element `start` of a layer."""

    column: int
    width: int
    start: int


class CopySpan(NamedTuple):
    """`num_elements` elements of a layer, from `start`, go to `offset` in the layer's share of `block`."""

    block: int
    offset: int
    start: int
    num_elements: int


class RowOrder(NamedTuple):
    """The place of each matrix, none of one that is not in the pool; for each width the first element and the number of
    rows.
    """

    stretches: Mapping[Matrix, tuple[RowSpan, ...]]
    widths: Mapping[int, tuple[int, int]]
    num_elements: int

    def writes(self, part: int, layer: int, rows: PackedRows) -> Iterator[Write]:
        """Yield where the rows of a layer go, whose first element in a part is `layer`."""
        for matrix, tensor in rows.items():
            for column, width, start in self.stretches[matrix]:
                yield Write(part, layer, start, tensor[:, column : column + width])

    def pieces(self, extents: Iterable[Extent], kind: BlockKind) -> Iterator[CopySpan]:
        """Say which of a layer's elements go to which extent."""
        used: Counter[int] = Counter()
        for e in extents:
            if e.kind is kind and e.width in self.widths:
                start, num_rows = self.widths[e.width]
                n = min(e.rows, num_rows - used[e.width])
                if n > 0:  # 0 or less if another group has more rows of this width
                    yield CopySpan(e.block, e.offset, start + used[e.width] * e.width, n * e.width)
                used[e.width] += e.rows


@lru_cache(_ORDERS)
def row_order(matrices: tuple[Matrix, ...], capacity: int) -> RowOrder:
    """Order rows as `adapter_layout.place` assigns them: among rows of one width as `matrices`."""
    counts = rows_by_width(matrices, capacity)
    widths: dict[int, tuple[int, int]] = {}
    end = 0
    for width in sorted(counts, reverse=True):
        widths[width] = (end, counts[width])
        end += width * counts[width]
    used: Counter[int] = Counter()
    stretches: dict[Matrix, tuple[RowSpan, ...]] = {}
    for m in matrices:
        own = []
        for column, width in pooled(m, capacity):
            own.append(RowSpan(column, width, widths[width][0] + width * used[width]))
            used[width] += m.rows
        stretches[m] = tuple(own)
    return RowOrder(stretches, widths, end)


@dataclass(frozen=True, slots=True, eq=False)
class Packer:
    """Packs adapters for one engine's pool.

    embedding_VD  the base's: of an adapter's dense embedding only the rows that differ from it are kept
    weights       the base's, for the norms that DoRA divides by
    fused         see ModelConfig.fused; the pool has the modules apart
    pinned        pack into page-locked memory, which a device can read directly
    memory        that adapters are read and packed into
    """

    geometry: Geometry
    dtype: torch.dtype
    embedding_VD: Tensor
    weights: WeightSource | None = None
    fused: Mapping[str, Mapping[str, slice]] = field(default_factory=dict)
    pinned: bool = False
    memory: Recycled = field(default_factory=lambda: Recycled(_IDLE_BYTES, FIRST_BYTES))
    _pairs: WeakValueDictionary[str, SharedProjection] = field(default_factory=WeakValueDictionary)
    _known: KnownFiles = field(default_factory=KnownFiles)

    @property
    def key(self) -> str:
        """A name of how adapters are packed: packers with the same key pack an adapter into the same bytes."""
        return f"{str(self.dtype).removeprefix('torch.')}-{self.geometry.layer_share}-{self.geometry.num_layers}"

    def pack(self, weights: AdapterWeights, *, file: Tensor | None = None, kind: Hashable = None) -> PackedAdapter:
        """IntegrityError if a row is not finite in the pool's dtype.

        `file`: the bytes that `weights` are views of; `kind`: what it has in common with files that `pack_alike` packs.
        """
        layers, flat = self._rows(weights)
        token_ids, rows_VD = own_embedding_rows(weights, self.embedding_VD, self.dtype)
        if token_ids:
            flat[Matrix("embed_tokens", "embedding", len(token_ids), rows_VD.shape[1])] = rows_VD
        shape = AdapterShape.of(layers, flat)
        writes = list(self._writes(shape, layers, flat))
        # One copy of the pair on the host, however many adapters have it.
        pair = None if weights.pair is None else self._pairs.setdefault(weights.pair.digest, weights.pair)
        packed = self._empty(shape, token_ids, pair, weights.rope)
        parts = [part.view(-1) for part in packed.parts]
        for write in writes:
            rows_RW = write.source
            end = write.start + rows_RW.numel()
            parts[write.part][write.start : end].view(rows_RW.shape).copy_(rows_RW)
        self._check_finite(packed)
        if file is not None and pair is None and weights.embedding is None:  # these say by their values what is packed
            copies = copies_of(writes, file)
            if copies is not None:
                self._known.put((self.key, kind), KnownFile(shape, weights.rope, copies))
        return packed

    def pack_alike(self, kind: Hashable, file: Tensor) -> PackedAdapter | None:
        """Pack the bytes of a file as one of its kind has been packed; None if none has been. Raises as `pack`."""
        known = self._known.get((self.key, kind))  # a packer of another geometry, made of this one, shares them
        if known is None:
            return None
        packed = self._empty(known.shape, rope=known.rope)
        known.fill(packed.parts, file)
        self._check_finite(packed)
        return packed

    def _empty(
        self,
        shape: AdapterShape,
        token_ids: tuple[int, ...] = (),
        pair: SharedProjection | None = None,
        rope: RopeParameters | None = None,
    ) -> PackedAdapter:
        *layered, flat = self._orders(shape)
        rows = [
            self.empty(len(group.layers), order.num_elements)
            for group, order in zip(shape.groups, layered, strict=True)
        ]
        return PackedAdapter(shape, tuple(rows), self.empty(flat.num_elements), token_ids, pair, rope, self.pinned)

    def _orders(self, shape: AdapterShape) -> list[RowOrder]:
        """Order the rows of each group, then the flat ones: of the parts of a packed adapter."""
        capacity = self.geometry.capacity(BlockKind.LAYERED)
        layered = [row_order(group.matrices, capacity) for group in shape.groups]
        return [*layered, row_order(shape.flat, self.geometry.capacity(BlockKind.FLAT))]

    def _writes(self, shape: AdapterShape, layers: Mapping[int, PackedRows], flat: PackedRows) -> Iterator[Write]:
        """Yield where the rows go: to each group's part layer behind layer, then to that of the flat ones."""
        *layered, of_flat = self._orders(shape)
        for part, (group, order) in enumerate(zip(shape.groups, layered, strict=True)):
            for i, layer in enumerate(group.layers):
                yield from order.writes(part, i * order.num_elements, layers[layer])
        yield from of_flat.writes(len(layered), 0, flat)

    def _check_finite(self, packed: PackedAdapter) -> None:
        layers = [[f"layer {layer} " for layer in group.layers] for group in packed.shape.groups]
        parts = (*packed.layered, packed.flat[None])
        for rows_LE, names, order in zip(parts, [*layers, [""]], self._orders(packed.shape), strict=True):
            _check_finite(rows_LE, names, order)

    def empty(self, *shape: int) -> Tensor:
        if self.pinned:
            return torch.empty(shape, dtype=self.dtype, pin_memory=True)
        return self.memory.empty(math.prod(shape), self.dtype).view(shape)

    def _rows(self, weights: AdapterWeights) -> tuple[dict[int, dict[Matrix, Tensor]], dict[Matrix, Tensor]]:
        """Rows by layer, and rows without a layer."""
        layers: dict[int, dict[Matrix, Tensor]] = {}
        for key, module in weights.modules.items():
            own = layers.setdefault(key.layer, {})
            for role, tensor, scale, changed in module.rows():
                if role == "dora":
                    assert isinstance(module, LoraWeights)
                    tensor = self._excess_scale(key, module)
                for name, part, first in self._parts(changed or key.module, role, tensor):
                    num_rows, width = part.shape
                    matrix = Matrix(name, role, num_rows, width, first if role == "vera_b" else scale)
                    if matrix in own:  # two scales of one output, each less one
                        part = own[matrix] + part + own[matrix] * part
                    own[matrix] = part
        flat: dict[Matrix, Tensor] = {}
        for path, norm in weights.norms.items():
            if path == "norm":
                flat[Matrix("norm", "norm", 1, norm.shape[0])] = norm[None]
            else:
                _, layer, name = path.split(".", 2)
                assert name in _NORMS
                layers.setdefault(int(layer), {})[Matrix(name, "norm", 1, norm.shape[0])] = norm[None]
        return layers, flat

    def _parts(self, module: str, role: Role, tensor: Tensor) -> Iterator[tuple[str, Tensor, int]]:
        """Yield what the parts of a fused module have of its rows, and the first output of each. A is the same for all
        of them.
        """
        for name, outputs in self.fused.get(module, {module: slice(0, None)}).items():
            yield name, tensor if role in OF_INPUTS else tensor[:, outputs], outputs.start

    def _excess_scale(self, key: ModuleKey, module: LoraWeights) -> Tensor:
        """Compute the factors by which DoRA scales the module's outputs, less one, (1, O): so they are as exact in the
        pool's dtype as the outputs.
        """
        assert self.weights is not None, "DoRA needs the base's weights"
        weight_OI = self.weights.dense(f"model.{key.path}.weight").to(self.dtype)
        return (module.output_scale(weight_OI) - 1)[None]


def own_embedding_rows(weights: AdapterWeights, base_VD: Tensor, dtype: torch.dtype) -> tuple[tuple[int, ...], Tensor]:
    """Find the tokens whose rows an adapter brings, and these rows: of a dense embedding those that differ from the
    base's.
    """
    if weights.embedding is None:
        return (), base_VD[:0]
    rows_VD = weights.embedding.rows_VD.to(dtype)
    if weights.embedding.token_ids is not None:
        return weights.embedding.token_ids, rows_VD
    differs = _differs(rows_VD, base_VD)
    return tuple(differs.nonzero().flatten().tolist()), rows_VD[differs]


def _differs(rows_VD: Tensor, base_VD: Tensor) -> Tensor:
    """Find the rows that are others than those of `base_VD`, (V,). From a device these are copied on a stream of their
    own and a few MiB at a time: no step waits for them, and they take no memory to speak of.
    """
    num_rows = max(1, _COMPARED_BYTES // (base_VD.element_size() * base_VD.shape[1]))
    with torch.cuda.stream(_beside_steps(base_VD.device) if base_VD.is_cuda else None):
        parts = zip(torch.split(rows_VD, num_rows), torch.split(base_VD, num_rows), strict=True)
        return torch.cat([(own_RD != base_RD.cpu().to(own_RD.dtype)).any(dim=1) for own_RD, base_RD in parts])


@cache
def _beside_steps(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _check_finite(rows_LE: Tensor, layers: Sequence[str], order: RowOrder) -> None:
    if _is_finite(rows_LE):
        return
    for row, layer in zip(rows_LE, layers, strict=True):
        for matrix, own in order.stretches.items():
            if not all(_is_finite(row[s.start : s.start + matrix.rows * s.width]) for s in own):
                raise IntegrityError(
                    f"the adapter's {layer}{matrix.module} {matrix.role} is not finite in {row.dtype}; its weights are "
                    "unusable"
                )


def _is_finite(x: Tensor) -> bool:
    """If one value is NaN, both extremes are. Finding them takes a fiftieth of the time of isfinite() on all values."""
    return not x.numel() or all(math.isfinite(extreme) for extreme in torch.stack(torch.aminmax(x)).tolist())


# -- the file ----------------------------------------------------------------------------------------------------------


def packed_name(packer: Packer, base_fingerprint: str) -> str:
    """Name the file in an adapter's folder, by the base and the kind of pool for which it was made."""
    return f"packed{_FORMAT}-{packer.key}-{base_fingerprint[:16]}.safetensors"


def save_packed(packed: PackedAdapter, path: Path) -> None:
    """Write `path` atomically. Not for adapters with a VeRA pair, which many adapters share."""
    assert packed.pair is None
    shape = packed.shape
    header = json.dumps(
        {
            "groups": [(group.layers, group.matrices) for group in shape.groups],
            "flat": shape.flat,
            "token_ids": packed.token_ids,
            "rope": packed.rope and packed.rope.model_dump(mode="json"),
        }
    )
    tensors = {f"group{i}": rows for i, rows in enumerate(packed.layered)} | {"flat": packed.flat}
    handle, temporary = tempfile.mkstemp(prefix=".packed-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _write_safetensors(file, tensors, {"packed": header, "crc32": _crc32(header, tensors)})
        os.chmod(temporary, 0o444)
        os.rename(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def open_packed(path: Path, *, pinned: bool = False, verify: bool = False) -> PackedAdapter:
    """Read a file. IntegrityError if it is damaged; damage to the rows is found only with `verify`."""
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata: dict[str, str] = f.metadata()
            tensors: dict[str, Tensor] = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        if verify and _crc32(metadata["packed"], tensors) != metadata["crc32"]:
            raise IntegrityError(f"{path} is damaged: its checksum differs")
        for tensor in tensors.values():
            tensor.view(-1).view(torch.uint8)[::_PAGE].sum()  # so that the engine does not wait for the disk
        header: dict[str, Any] = json.loads(metadata["packed"])
        groups = tuple(LayerGroup(tuple(layers), _matrices(matrices)) for layers, matrices in header["groups"])
        shape = AdapterShape(groups=groups, flat=_matrices(header["flat"]))
        layered = [tensors[f"group{i}"] for i in range(len(groups))]
        flat = tensors["flat"]
        rope = header["rope"] and RopeParameters.model_validate(header["rope"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise IntegrityError(f"{path} is damaged: {e}") from e
    return PackedAdapter(
        shape=shape,
        layered=tuple(rows.pin_memory() if pinned else rows for rows in layered),
        flat=flat.pin_memory() if pinned else flat,
        token_ids=tuple(header["token_ids"]),
        pair=None,
        rope=rope,
        pinned=pinned,
    )


def _write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the format directly from the rows: the library's writer copies each tensor twice."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype = DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": tuple(tensor.shape), "data_offsets": (begin, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _matrices(raw: list[list[Any]]) -> tuple[Matrix, ...]:
    return tuple(Matrix(*fields) for fields in raw)


def _crc32(header: str, tensors: dict[str, Tensor]) -> str:
    crc = zlib.crc32(header.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(_bytes(tensors[name]), crc)
    return str(crc)
