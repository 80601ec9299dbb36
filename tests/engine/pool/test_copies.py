"""Files that differ in values alone are packed by copies, into the same rows as by their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loray.engine.memory.blocks import Geometry
from loray.engine.pool.copies import KnownFile, KnownFiles
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.errors import IntegrityError
from loray.methods.weights import AdapterWeights, EmbeddingRows, LoraWeights, ModuleKey
from loray.spec import RopeParameters

LAYERS, RANK, WIDE, NARROW = 13, 3, 40, 6  # a row of `WIDE` elements is cut into two segments
SHAPES = {"q_proj": (NARROW, WIDE), "v_proj": (WIDE, WIDE)}


def packer(dtype: torch.dtype = torch.float32) -> Packer:
    return Packer(Geometry(400, LAYERS, 2, 32), dtype, torch.zeros(1, 8))


def in_a_file(seed: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Bytes of which 8 are a header, and in them tensors in the order of their names, as files have them."""
    shapes = {f"{layer}.{m}.a": (RANK, i) for layer in range(LAYERS) for m, (_, i) in SHAPES.items()}
    shapes |= {f"{layer}.{m}.b": (o, RANK) for layer in range(LAYERS) for m, (o, _) in SHAPES.items()}
    shapes["7.norm"] = (1, WIDE)
    generator = torch.Generator().manual_seed(seed)
    end = 8 + sum(a * b for a, b in shapes.values()) * dtype.itemsize
    file = torch.zeros(16 + end, dtype=torch.uint8)[16:]
    tensors = {}
    at = 8
    for name in sorted(shapes):
        shape = shapes[name]
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        tensors[name] = file[at : at + num_bytes].view(dtype).view(shape)
        tensors[name].copy_(torch.randn(shape, generator=generator))
        at += num_bytes
    return file, tensors


def weights_of(tensors: Mapping[str, Tensor], **fields: object) -> AdapterWeights:
    modules = {
        ModuleKey(layer, m): LoraWeights(tensors[f"{layer}.{m}.a"], tensors[f"{layer}.{m}.b"], 2.0)
        for layer in range(LAYERS)
        for m in SHAPES
    }
    norms = {"norm": tensors["7.norm"][0], "layers.7.input_layernorm": tensors["7.norm"][0]}
    return AdapterWeights(modules=modules, norms=norms, **fields)  # type: ignore[arg-type]


def equal(a: PackedAdapter | None, b: PackedAdapter) -> bool:
    return a is not None and (a.shape, a.rope) == (b.shape, b.rope) and all(map(torch.equal, a.parts, b.parts))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pooled", [torch.bfloat16, torch.float32])
def test_the_next_file_has_the_same_rows(stored: torch.dtype, pooled: torch.dtype) -> None:
    packing, rope = packer(pooled), RopeParameters(rope_theta=5.0)
    first, tensors = in_a_file(0, stored)
    assert packing.pack_alike("kind", first) is None
    packed = packing.pack(weights_of(tensors, rope=rope), file=first, kind="kind")
    assert equal(packing.pack_alike("kind", first), packed)
    second, tensors = in_a_file(1, stored)
    expected = packer(pooled).pack(weights_of(tensors, rope=rope))
    assert not equal(packed, expected)
    assert equal(packing.pack_alike("kind", second), expected)
    assert packing.pack_alike("another", second) is None
    cut = replace(packing, geometry=replace(packing.geometry, layer_share=48))
    assert cut.pack_alike("kind", second) is None


def test_layers_are_copied_together() -> None:
    """Of 13 layers 10 to 12 stand behind 1. A matrix of a layer in two segments is two matrices."""
    packing = packer()
    file, tensors = in_a_file(0, torch.float32)
    packing.pack(weights_of(tensors), file=file, kind="kind")
    known = packing._known.get((packing.key, "kind"))
    assert known is not None
    of_layers = [copy for copy in known.copies if copy.shape[0] > 1]
    assert len(known.copies) < 40
    assert sum(copy.shape[0] for copy in of_layers) > LAYERS * 4


def test_values_that_are_not_finite_are_named() -> None:
    packing = packer()
    file, tensors = in_a_file(0, torch.float32)
    packing.pack(weights_of(tensors), file=file, kind="kind")
    file, tensors = in_a_file(1, torch.float32)
    tensors["11.v_proj.b"][2, 1] = float("nan")
    with pytest.raises(IntegrityError, match="layer 11 v_proj lora_b is not finite"):
        packing.pack_alike("kind", file)


def test_what_values_decide_is_not_kept() -> None:
    """Which rows of an embedding differ from the base's; and rows that are computed."""
    packing = packer()
    file, tensors = in_a_file(0, torch.float32)
    rows_VD = file[8 : 8 + 4 * 8].view(torch.float32).view(1, 8)
    packing.pack(weights_of(tensors, embedding=EmbeddingRows(None, rows_VD)), file=file, kind="embedding")
    computed = {name: tensor.clone() if name == "3.q_proj.a" else tensor for name, tensor in tensors.items()}
    packing.pack(weights_of(computed), file=file, kind="computed")
    assert packing.pack_alike("embedding", file) is packing.pack_alike("computed", file) is None


def test_the_last_kinds_are_kept() -> None:
    known = KnownFiles()
    file = KnownFile(packer().pack(AdapterWeights({})).shape, None, ())
    for number in range(100):
        known.put(number, file)
    assert [known.get(number) is not None for number in range(100)] == [False] * 36 + [True] * 64
