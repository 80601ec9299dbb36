"""Values as bytes between ranks: pickle, except that tensors go as plain bytes to the receiver's device, and resident
adapters and shared pairs, of which every rank has its own, go by digest.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loray.engine.pool.resident import ResidentAdapter, ResidentPair


def dumps(value: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def loads(
    data: bytes,
    device: torch.device,
    adapters: Mapping[str, ResidentAdapter],
    pairs: Mapping[str, ResidentPair],
) -> Any:
    """`adapters` and `pairs` are the receiver's, by digest."""
    return _Unpickler(io.BytesIO(data), device, adapters, pairs).load()


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            content = obj.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            return "tensor", str(obj.dtype).removeprefix("torch."), tuple(obj.shape), content
        if isinstance(obj, ResidentAdapter):
            return "adapter", obj.ref.digest
        if isinstance(obj, ResidentPair):
            return "pair", obj.digest
        if isinstance(obj, torch.device):
            return ("device",)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        device: torch.device,
        adapters: Mapping[str, ResidentAdapter],
        pairs: Mapping[str, ResidentPair],
    ) -> None:
        super().__init__(file)
        self._device, self._adapters, self._pairs = device, adapters, pairs

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("tensor", dtype, shape, content):
                empty = torch.empty(shape, dtype=getattr(torch, dtype))
                if content:
                    empty = torch.frombuffer(bytearray(content), dtype=empty.dtype).view(shape)
                return empty.to(self._device)
            case ("adapter", digest):
                return self._adapters[digest]
            case ("pair", digest):
                return self._pairs[digest]
            case ("device",):
                return self._device
        raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")
