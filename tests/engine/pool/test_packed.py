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
from loray.errors import IntegrityError
from loray.methods.ia3 import Ia3Weights
from loray.methods.weights import AdapterWeights, EmbeddingRows, LoraWeights, ModuleKey
from tests.fixtures.packing import packer, weights
from tests.fixtures.peft_adapters import Adapters
from tests.fixtures.stores import damage


def _same(a: PackedAdapter, b: PackedAdapter) -> bool:
    rows = zip((*a.layered, a.flat), (*b.layered, b.flat), strict=True)
    return (a.shape, a.token_ids, a.rope) == (b.shape, b.token_ids, b.rope) and all(torch.equal(x, y) for x, y in rows)


@pytest.mark.parametrize("name", ["r5", "longlora"])
def test_a_file_gives_back_what_was_packed(base: BaseModel, adapters: Adapters, tmp_path: Path, name: str) -> None:
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


def test_factors_of_one_output_are_one_row() -> None:
    """IA³'s of down_proj's inputs are those of up_proj's outputs."""
    up, down = (1 + 0.3 * torch.randn(40, generator=torch.Generator().manual_seed(i)) for i in range(2))
    modules = {ModuleKey(2, "up_proj"): Ia3Weights(up[:, None]), ModuleKey(2, "down_proj"): Ia3Weights(down[None])}
    packed = packer().pack(AdapterWeights(modules))
    ((_, (matrix,)),) = packed.shape.groups
    assert (matrix.module, matrix.role, matrix.rows, matrix.width) == ("up_proj", "scale", 1, 40)
    torch.testing.assert_close(packed.layered[0][0], up * down - 1, rtol=0, atol=1e-6)
