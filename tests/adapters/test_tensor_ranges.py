"""A file that is read in ranges: layers in order, every byte once, tensors valid once their bytes are received."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loray.adapters.tensor_ranges import PartialFile
from loray.bases.checkpoint import header_end, parse_header
from loray.errors import IntegrityError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Twelve layers, which the file has in the order 0, 1, 10, 11, 2, …; a norm without one behind them."""
    tensors = {f"m.layers.{i}.{part}.weight": torch.randn(50, 4) for i in range(12) for part in ("a", "b")}
    path = tmp_path / "file.safetensors"
    save_file(tensors | {"m.norm.weight": torch.randn(20), "m.layers.3.odd": torch.ones(3, dtype=torch.uint8)}, path)
    return path


def partial_file(beginning: bytes) -> PartialFile:
    return PartialFile(
        beginning, parse_header(beginning, source="f"), lambda n, dtype: torch.full((n,), 255, dtype=dtype), source="f"
    )


@pytest.mark.parametrize("max_bytes", [1, 2000, 1 << 20])
def test_layers_come_in_order_and_every_byte_once(file: Path, max_bytes: int) -> None:
    data, whole = file.read_bytes(), load_file(file)
    end = header_end(data, source="f")
    partial = partial_file(data[: end + 100])
    for tensor in partial.tensors.values():
        assert tensor.data_ptr() % tensor.itemsize == 0
    num_received, num_layers = end + 100, 0
    for piece in partial.ranges(max_bytes):
        assert piece.num_layers >= num_layers
        partial.data[piece.start : piece.stop] = data[piece.start : piece.stop]
        partial.mark_received(piece.start, piece.stop)
        partial.update_hash()
        num_received += piece.stop - piece.start
        num_layers = piece.num_layers
        for name, tensor in whole.items():
            if ".layers." not in name or int(name.split(".")[2]) < num_layers:
                assert torch.equal(partial.tensors[name], tensor), (name, piece)
    assert (num_received, num_layers) == (len(data), 12)
    assert bytes(partial.data) == data
    partial.verify(hashlib.sha256(data).hexdigest())
    with pytest.raises(IntegrityError, match="f is damaged: it differs from its SHA-256"):
        partial.verify("0" * 64)


def test_neighbours_are_asked_for_together(file: Path) -> None:
    data = file.read_bytes()
    beginning = data[: header_end(data, source="f")]
    ranges = partial_file(beginning).ranges(max_bytes=1 << 20)
    assert len(ranges) == 1
    by_layer = partial_file(beginning).ranges(max_bytes=10_000)
    assert [r.num_layers for r in by_layer] == [0, 2, 3, 4, 10, 12]


def test_what_is_not_the_format_is_named(file: Path) -> None:
    data = file.read_bytes()
    end = header_end(data, source="f")
    header = json.loads(data[8:end])
    header["m.norm.weight"]["data_offsets"][1] += 4
    broken = json.dumps(header).encode()
    for beginning in (b"", b"\xff" * 100, data[:8] + b"x" * (end - 8), len(broken).to_bytes(8, "little") + broken):
        with pytest.raises(IntegrityError, match="f is damaged"):
            partial_file(beginning)
