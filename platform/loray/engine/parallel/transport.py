"""How ranks meet, and how values become the bytes that they send each other.

In a message a number, text, bytes, a truth value and None are themselves. Everything else is a list that begins with
the number of its class. Rows of adapters follow the bytes, each in a message of its own, straight into host memory that
the receiver chooses: of a tensor the bytes have its dtype and shape.

Ranks meet in a store of rank 0. The names in it begin with what only the ranks that know the engine's secret can
compute. Whoever else reaches the port can list names, and so keep an engine from starting; but a rank is sent nothing
before it has shown that it knows the secret (`communicator`). Nothing in the store is a program, or is made into
objects.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
import socket
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import torch
from pydantic import BaseModel as Model
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

SECRET_BYTES = _NONCE_BYTES = hashlib.sha256().digest_size
_TUPLE, _LIST, _DICT, _TENSOR, _PATH, _FIRST = range(6)
_DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "int32")
_MAX_DEPTH = 32

ReceiveRows = Callable[[torch.dtype, tuple[int, ...]], Tensor]


class WireError(Exception):
    """Bytes that came are no message of a rank."""


class Encoded(NamedTuple):
    """A value; its tensors that follow in this order, contiguous and in host memory."""

    data: bytes
    rows: tuple[Tensor, ...] = ()


def no_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Refuse rows, for messages without tensors."""
    raise WireError("a tensor where none is expected")


class Codec:
    """Turns values into bytes and back. `classes`: those of the values beside what is built in: named tuples,
    dataclasses, enums, pydantic's models. Both ends have the same.
    """

    def __init__(self, classes: Sequence[type]) -> None:
        self._classes = tuple(classes)
        self._number = {cls: n for n, cls in enumerate(self._classes, _FIRST)}
        self._fields = {cls: _fields(cls) for cls in self._classes}

    def dumps(self, value: object, *, rows_apart: bool = False) -> Encoded:
        """`rows_apart`: all tensors of `value` are rows of adapters."""
        rows: list[Tensor] | None = [] if rows_apart else None
        data: bytes = msgpack.packb(self._lists(value, rows))
        return Encoded(data, tuple(rows or ()))

    def loads(self, data: bytes, receive_rows: ReceiveRows = no_rows) -> Any:
        """`receive_rows` gives what follows, in order. WireError where the bytes are not those of a value."""
        try:
            lists = msgpack.unpackb(data, use_list=True, strict_map_key=True, ext_hook=_no_extension)
            return self._value(lists, receive_rows, _MAX_DEPTH)
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as e:
            raise WireError(f"no message of a rank: {e}") from e

    def _lists(self, value: Any, rows: list[Tensor] | None) -> Any:
        cls = type(value)
        if value is None or cls in (int, str, bytes, float, bool):
            return value
        if (number := self._number.get(cls)) is not None:
            if isinstance(value, Enum):
                return [number, value.value]
            if isinstance(value, Model):
                return [number, value.model_dump_json()]
            return [number, *(self._lists(getattr(value, name), rows) for name in self._fields[cls])]
        if cls is tuple or cls is list:
            return [_TUPLE if cls is tuple else _LIST, *(self._lists(item, rows) for item in value)]
        if cls is dict:
            return [_DICT, *(self._lists(item, rows) for pair in value.items() for item in pair)]
        if isinstance(value, Path):
            return [_PATH, str(value)]
        assert isinstance(value, Tensor), f"{cls} is no class of the wire"
        assert rows is not None, "a command with tensors that are not rows of adapters"
        rows.append(value.detach().cpu().contiguous())
        return [_TENSOR, _DTYPES.index(str(value.dtype).removeprefix("torch.")), *value.shape]

    def _value(self, lists: Any, receive_rows: ReceiveRows, depth: int) -> Any:
        if lists is None or type(lists) in (int, str, bytes, float, bool):
            return lists
        if type(lists) is not list or not lists or type(lists[0]) is not int or not depth:
            raise WireError("no value")
        number, *items = lists
        if number == _TENSOR:
            dtype, *shape = items
            if any(type(n) is not int or n < 0 for n in items) or dtype >= len(_DTYPES):
                raise WireError("no tensor")
            return receive_rows(getattr(torch, _DTYPES[dtype]), tuple(shape))
        values = [self._value(item, receive_rows, depth - 1) for item in items]
        if number in (_TUPLE, _LIST):
            return tuple(values) if number == _TUPLE else values
        if number == _DICT:
            return dict(zip(values[::2], values[1::2], strict=True))
        if number == _PATH:
            (path,) = values
            return Path(path)
        if not _FIRST <= number < _FIRST + len(self._classes):
            raise WireError(f"no class has the number {number}")
        cls = self._classes[number - _FIRST]
        if len(values) != len(self._fields[cls]):
            raise WireError(f"{len(values)} fields of {cls.__name__}")
        return cls.model_validate_json(*values) if issubclass(cls, Model) else cls(*values)


def _fields(cls: type) -> tuple[str, ...]:
    if issubclass(cls, Enum | Model):
        return ("value",)
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return tuple(cls._fields)  # type: ignore[attr-defined]


def _no_extension(code: int, data: bytes) -> object:
    raise WireError("msgpack's extensions are not used")


# -- the meeting -------------------------------------------------------------------------------------------------------


def joined(rank: int) -> str:
    """Name the key that is set when this rank has started."""
    return f"joined-{rank}"


def open_meeting(host: str, secret: bytes) -> tuple[Store, int]:
    """Open rank 0's store; also returns the port of `host` at which the others find it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.bind((host, 0))
        port: int = listening.getsockname()[1]
        descriptor = listening.detach()  # the store closes it
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
    return PrefixStore(_prefix(secret), store), port


def meeting(host: str, port: int, secret: bytes) -> Store:
    """Find rank 0's store, for another rank."""
    return PrefixStore(_prefix(secret), TCPStore(host, port, is_master=False))


def new_nonce() -> bytes:
    return secrets.token_bytes(_NONCE_BYTES)


def proof(secret: bytes, rank: int, nonce: bytes) -> bytes:
    """Prove that this rank knows the secret, to the one that sent `nonce`."""
    return hmac.digest(secret, b"rank %d " % rank + nonce, hashlib.sha256)


def _prefix(secret: bytes) -> str:
    return hmac.digest(secret, b"meeting", hashlib.sha256).hex()
