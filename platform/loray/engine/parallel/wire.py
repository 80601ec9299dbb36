"""Values as bytes between ranks: pickle, except that tensors go as plain bytes to the receiver's device, and resident
adapters and shared pairs, of which every rank has its own, go by digest. Rows of adapters follow the bytes, each in a
message of its own, straight into host memory that the receiver chooses. A recorded decode step is integers of 64 bits:
its parts, how many there are of each field, the fields.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loray.engine.pool.resident import ResidentAdapter, ResidentPair
from loray_kernels import DecodeStep, Parts

_STEP_HEAD = len(DecodeStep._fields)  # the parts, and a number for each of the others


ReceiveRows = Callable[[torch.dtype, tuple[int, ...]], Tensor]


class Packed(NamedTuple):
    """A value; its tensors that follow in this order, contiguous and in host memory."""

    data: bytes
    rows: tuple[Tensor, ...]


def dumps(value: object, *, rows_apart: bool = False) -> Packed:
    """`rows_apart`: all tensors of `value` are rows of adapters."""
    buffer, rows = io.BytesIO(), list[Tensor]()
    _Pickler(buffer, rows if rows_apart else None).dump(value)
    return Packed(buffer.getvalue(), tuple(rows))


def loads(
    data: bytes,
    device: torch.device,
    adapters: Mapping[str, ResidentAdapter],
    pairs: Mapping[str, ResidentPair],
    receive_rows: ReceiveRows,
) -> Any:
    """`adapters` and `pairs` are the receiver's, by digest. `receive_rows` gives what follows, in order."""
    return _Unpickler(io.BytesIO(data), device, adapters, pairs, receive_rows).load()


def dump_step(step: DecodeStep) -> bytes:
    fields = [np.asarray(getattr(step, name), dtype=np.int64) for name in DecodeStep._fields if name != "parts"]
    head = np.array([int(step.parts), *map(len, fields)], dtype=np.int64)
    return np.concatenate([head, *fields]).tobytes()


def load_step(data: bytes) -> DecodeStep:
    words = np.frombuffer(data, dtype=np.int64)
    starts = accumulate(words[1:_STEP_HEAD].tolist(), initial=_STEP_HEAD)
    fields: list[Any] = [words[start:stop] for start, stop in pairwise(starts)]
    fields.insert(DecodeStep._fields.index("parts"), Parts(int(words[0])))
    return DecodeStep(*fields)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, rows: list[Tensor] | None) -> None:
        super().__init__(file, protocol=5)
        self._rows = rows

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and self._rows is not None:
            self._rows.append(obj.detach().cpu().contiguous())
            return "rows", obj.dtype, tuple(obj.shape)
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
        receive_rows: ReceiveRows,
    ) -> None:
        super().__init__(file)
        self._device, self._adapters, self._pairs = device, adapters, pairs
        self._receive_rows = receive_rows

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("tensor", dtype, shape, content):
                empty = torch.empty(shape, dtype=getattr(torch, dtype))
                if content:
                    empty = torch.frombuffer(bytearray(content), dtype=empty.dtype).view(shape)
                return empty.to(self._device)
            case ("rows", dtype, shape):
                return self._receive_rows(dtype, shape)
            case ("adapter", digest):
                return self._adapters[digest]
            case ("pair", digest):
                return self._pairs[digest]
            case ("device",):
                return self._device
        raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")
