"""A packed adapter as a file: a safetensors file of its rows, with the rest as JSON in the metadata.

Reading maps the rows into memory and touches every page; nothing is copied, parsed or converted.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loray.bases.safetensors import DTYPE_CODES
from loray.engine.memory.rows import AdapterShape, LayerGroup, Matrix
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.errors import IntegrityError
from loray.spec import RopeParameters

_FORMAT = 1
_PAGE = mmap.PAGESIZE


def packed_name(packer: Packer, base_fingerprint: str) -> str:
    """Name of the file in an adapter's folder. It says for which base and which kind of pool the file was made."""
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
            _write(file, tensors, {"packed": header, "crc32": _crc32(header, tensors)})
        os.chmod(temporary, 0o444)
        os.rename(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def open_packed(path: Path, *, pinned: bool = False, verify: bool = False) -> PackedAdapter:
    """IntegrityError if the file is damaged; damage to the rows is found only with `verify`."""
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


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the safetensors format directly from the rows: the library's writer copies each tensor twice."""
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
