"""Packed rows: in the pool where the table says, the same after reading a file; damage is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.memory.blocks import Geometry
from loray.engine.pool import packed as embedding
from loray.engine.pool.packed import PackedAdapter, Packer, bytes_taken, open_packed, packed_name, save_packed
from loray.engine.pool.pool import Pool, ResidentAdapter
from loray.errors import IntegrityError
from loray.methods.weights import AdapterWeights, EmbeddingRows, LoraWeights, ModuleKey
from loray_kernels import KvLayout
from tests.engine.adapters import TestAdapter
from tests.fixtures.stores import damage

LAYOUT = KvLayout(num_layers=4, block_tokens=2, num_kv_heads=1, head_dim=8)  # 32 elements of a layer in a block


def packer(num_blocks: int = 40) -> Packer:
    geometry = Geometry(num_blocks, LAYOUT.num_layers, LAYOUT.block_tokens, LAYOUT.layer_share)
    return Packer(geometry, torch.float32, torch.zeros(1, 8))


def weights(ranks: dict[int, int], *, wide: int = 40, narrow: int = 6, seed: int = 0) -> AdapterWeights:
    """Ranks by layer; a row of `wide` is cut into two segments."""
    generator = torch.Generator().manual_seed(seed)

    def lora(rank: int, i: int, o: int) -> LoraWeights:
        return LoraWeights(torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator), 2.0)

    modules = {ModuleKey(layer, "q_proj"): lora(rank, wide, narrow) for layer, rank in ranks.items()}
    modules |= {ModuleKey(layer, "v_proj"): lora(rank, wide, wide) for layer, rank in ranks.items()}
    return AdapterWeights(modules=modules)


@pytest.mark.parametrize("ranks", [{0: 3, 1: 3, 2: 3, 3: 3}, {0: 2, 1: 5, 3: 2}])
def test_every_row_stands_where_the_table_says(ranks: dict[int, int], adapters: dict[str, TestAdapter]) -> None:
    """Also in a pool with gaps, where an adapter's rows of one width are in several extents."""
    pool = Pool(LAYOUT, 40, dtype=torch.float32, device=torch.device("cpu"))
    ref = adapters["r2"].ref
    small = [pool.place(ref, packer().pack(weights({0: 1}, wide=w))) for w in (14, 6, 20, 6)]
    for resident in small[::2]:
        assert resident is not None
        pool.remove(resident)
    own = weights(ranks)
    resident = pool.place(ref, packer().pack(own))
    assert resident is not None
    check_rows(pool, resident, own)


def check_rows(pool: Pool, resident: ResidentAdapter, own: AdapterWeights) -> None:
    """Every row of its LoRA modules is in the pool where the table says."""
    for key, module in own.modules.items():
        assert isinstance(module, LoraWeights)
        table = resident.table.groups[resident.table.layer_group[key.layer]]
        for part, matrix in (("lora_a", module.a_RI), ("lora_b", module.b_OR.T)):
            for segment in table[key.module, part]:  # type: ignore[index]
                for row, offset in zip(matrix, segment.offsets, strict=True):
                    start = offset + key.layer * LAYOUT.layer_share
                    stands = pool.tensor[start : start + segment.width]
                    assert torch.equal(stands, row[segment.column : segment.column + segment.width])


def _same(a: PackedAdapter, b: PackedAdapter) -> bool:
    rows = zip((*a.layered, a.flat), (*b.layered, b.flat), strict=True)
    return (a.shape, a.token_ids, a.rope) == (b.shape, b.token_ids, b.rope) and all(torch.equal(x, y) for x, y in rows)


@pytest.mark.parametrize("name", ["r5", "longlora"])
def test_a_file_gives_back_what_was_packed(
    base: BaseModel, adapters: dict[str, TestAdapter], tmp_path: Path, name: str
) -> None:
    from loray.bases.checkpoint import read_tensors

    base_VD = next(t for n, t in read_tensors(base.path) if n == "model.embed_tokens.weight")
    packing = Packer(Geometry(40, base.config.num_layers, 16, 2 * 16 * 2 * 16), torch.bfloat16, base_VD)
    packed = packing.pack(adapters[name].load(base))
    path = tmp_path / packed_name(packing, base.fingerprint)
    save_packed(packed, path)
    assert _same(open_packed(path, verify=True), packed)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    damage(path)
    with pytest.raises(IntegrityError, match="damaged"):
        open_packed(path, verify=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="damaged"):
        open_packed(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_what_is_not_finite_in_the_pools_dtype_is_named(bad: float) -> None:
    own = weights({1: 2})
    module = own.modules[ModuleKey(1, "v_proj")]
    assert isinstance(module, LoraWeights)
    module.b_OR[3, 1] = bad
    half = Packer(packer().geometry, torch.bfloat16, torch.zeros(1, 8))
    with pytest.raises(IntegrityError, match="layer 1 v_proj lora_b is not finite"):
        half.pack(own)


class OnDevice:
    """The base's embedding on a device. `copied`: (on the side stream, bytes) of each copy to the host."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, rows: Tensor, stream: Callable[[], object], copied: list[tuple[object, int]]) -> None:
        self._rows, self._stream, self._copied, self.shape = rows, stream, copied, rows.shape

    def element_size(self) -> int:
        return self._rows.element_size()

    def split(self, num_rows: int, dim: int) -> list[OnDevice]:
        return [OnDevice(rows, self._stream, self._copied) for rows in self._rows.split(num_rows, dim)]

    def cpu(self) -> Tensor:
        self._copied.append((self._stream(), self._rows.nbytes))
        return self._rows

    def to(self, **to: object) -> Tensor:
        return self.cpu()


def test_a_dense_embedding_is_compared_beside_the_steps_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = [None]
    copied: list[tuple[object, int]] = []

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(embedding, "_beside_steps", lambda device: "side", raising=False)
    monkeypatch.setattr(embedding, "_COMPARED_BYTES", 1 << 10, raising=False)
    base_VD = torch.zeros(100, 8)
    rows_VD = base_VD.clone()
    rows_VD[[3, 70]] = 1.0
    on_device = OnDevice(base_VD, lambda: current[-1], copied)
    own = replace(weights({0: 1}), embedding=EmbeddingRows(None, rows_VD))
    assert Packer(packer().geometry, torch.float32, cast(Any, on_device)).pack(own).token_ids == (3, 70)
    assert {stream for stream, _ in copied} == {"side"}
    assert max(num_bytes for _, num_bytes in copied) <= 1 << 10


def test_page_locked_memory_is_counted_as_torch_takes_it() -> None:
    """By powers of two, for each tensor."""
    packed = packer().pack(weights({0: 3, 1: 3, 3: 5}))
    sizes = [t.nbytes for t in (*packed.layered, packed.flat)]
    assert packed.host_bytes == packed.nbytes == sum(sizes)
    pinned = replace(packed, pinned=True)
    assert pinned.nbytes == sum(sizes)
    taken = [next(1 << n for n in range(30) if 1 << n >= size) for size in sizes if size]
    assert pinned.host_bytes == sum(taken) > sum(sizes)
    whole = torch.zeros(1 << 10, dtype=torch.uint8)
    assert bytes_taken(whole, pinned=True) == 1 << 10
