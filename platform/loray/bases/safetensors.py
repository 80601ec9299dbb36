"""The header of a safetensors file, parsed without torch.

A file is 8 bytes with the length of the header, the header as JSON, then the bytes of the tensors, without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

from loray.errors import IntegrityError
from loray.spec import DTYPE_BYTES

# The format's codes → torch's names.
DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPE_CODES: Mapping[str, str] = {name: code for code, name in DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class TensorEntry(NamedTuple):
    """`dtype` is the format's code; the tensor's bytes are `file[start:stop]`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_end(beginning: bytes, *, source: str) -> int:
    """Position behind the header, from the file's first 8 bytes. IntegrityError names `source`."""
    length = int.from_bytes(beginning[:8], "little")
    if len(beginning) < 8 or length > _MAX_HEADER_BYTES:
        raise IntegrityError(f"{source} is damaged: it is not a safetensors file")
    return 8 + length


def parse_header(beginning: bytes, *, source: str) -> dict[str, TensorEntry]:
    """The tensors by name, from the file's bytes up to `header_end` at least.

    Raises IntegrityError, which names `source`, where the header is damaged, or tensors overlap, leave gaps, or have
    another number of bytes than their shape and dtype need.
    """
    end = header_end(beginning, source=source)
    try:
        header = json.loads(beginning[8:end])
        header.pop("__metadata__", None)
        entries = {}
        for name, fields in header.items():
            start, stop = (end + int(offset) for offset in fields["data_offsets"])
            entries[name] = TensorEntry(str(fields["dtype"]), tuple(map(int, fields["shape"])), start, stop)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise IntegrityError(f"{source} is damaged: its header cannot be read ({type(e).__name__})") from e
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end or entry.stop < entry.start:
            raise IntegrityError(f"{source} is damaged: the bytes of tensor {name} are not behind those before it")
        if min(entry.shape, default=0) < 0:
            raise IntegrityError(f"{source} is damaged: tensor {name} has a negative size")
        item_bytes = DTYPE_BYTES.get(DTYPES.get(entry.dtype, ""))
        if item_bytes is not None and math.prod(entry.shape) * item_bytes != entry.stop - entry.start:
            raise IntegrityError(f"{source} is damaged: tensor {name} has the wrong number of bytes")
        end = entry.stop
    return entries
