"""Bounds of PEFT's two files, and checks of a weights file by its header and in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from loray.bases.checkpoint import TensorEntry, header_end, parse_header
from loray.errors import IntegrityError, UnsupportedError, shown
from loray.methods.pairs import PAIR_NAMES

if TYPE_CHECKING:
    from loray.spec import AdapterManifest


MAX_CONFIG_BYTES = 4 << 20  # the ids of changed embedding rows are in it
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 1 << 15

_DTYPES = ("F32", "BF16", "F16", "F64")
_NUMPY_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_CHUNK_BYTES = 4 << 20


def check_header_length(beginning: bytes, *, source: str) -> int:
    """Find `header_end` of an adapter's file, which is bounded. Raises IntegrityError."""
    end = header_end(beginning, source=source)
    if end > MAX_HEADER_BYTES:
        raise IntegrityError(f"{source}: its header would have {end - 8:,} bytes; at most {MAX_HEADER_BYTES:,}")
    return end


def check_tensors(entries: Mapping[str, TensorEntry], *, source: str, file_bytes: int | None = None) -> None:
    """Raise where the header of an adapter's file promises what no adapter has, or other bytes than the file has."""
    if len(entries) > MAX_TENSORS:
        raise UnsupportedError(f"{source} has {len(entries):,} tensors; an adapter may have {MAX_TENSORS:,}")
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise UnsupportedError(
                f"{source}: tensor {shown(name)} is {shown(entry.dtype)}, not of {', '.join(_DTYPES)}"
            )
        if len(entry.shape) not in (1, 2) or 0 in entry.shape:
            raise IntegrityError(f"{source}: tensor {shown(name)} has the shape {list(entry.shape[:8])}")
    promised = max((entry.stop for entry in entries.values()), default=None)
    if None not in (file_bytes, promised) and promised != file_bytes:
        raise IntegrityError(f"{source} is damaged: it has {file_bytes:,} bytes, its header describes {promised:,}")


def check_declared(entries: Mapping[str, TensorEntry], manifest: AdapterManifest, *, source: str) -> None:
    """Raise IntegrityError unless the tensors have the bytes that the manifest says, by which memory is planned."""
    pair_bytes = 0
    if manifest.projection is not None:
        pair = manifest.projection
        pair_bytes = pair.rank * (pair.max_in + pair.max_out) * 8  # in the widest dtype
    found = own_bytes(entries)
    stored_pair = sum(entry.stop - entry.start for name, entry in entries.items() if name in PAIR_NAMES)
    if found != manifest.nbytes or stored_pair > pair_bytes:
        raise IntegrityError(
            f"{source} holds {found + stored_pair:,} bytes of tensors, its manifest says {manifest.nbytes:,}; "
            "publish the adapter again"
        )


def own_bytes(entries: Mapping[str, TensorEntry]) -> int:
    """Count the bytes of the tensors without VeRA's shared pair."""
    return sum(entry.stop - entry.start for name, entry in entries.items() if name not in PAIR_NAMES)


def header_of(data: bytes, *, source: str) -> dict[str, TensorEntry]:
    """Read and check the header of an adapter's file in memory, as `read_header`."""
    entries = parse_header(data[: check_header_length(data, source=source)], source=source)
    check_tensors(entries, source=source, file_bytes=len(data))
    return entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of an adapter's file. Raises IntegrityError or UnsupportedError, which name it."""
    source = str(path)
    try:
        with path.open("rb") as f:
            beginning = f.read(8)
            beginning += f.read(check_header_length(beginning, source=source) - 8)
    except OSError as e:
        raise IntegrityError(f"{path} cannot be read: {e.strerror}") from e
    entries = parse_header(beginning, source=source)
    check_tensors(entries, source=source, file_bytes=path.stat().st_size)
    return entries


def check_finite(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Read the values. Raises IntegrityError, which names the first tensor with one that is NaN or infinite."""
    with path.open("rb") as f:
        for name, entry in entries.items():
            if not _is_finite(f, entry):
                raise IntegrityError(f"{path}: tensor {shown(name)} has values that are NaN or infinite")


def _is_finite(f: BinaryIO, entry: TensorEntry) -> bool:
    import numpy as np

    f.seek(entry.start)
    for start in range(entry.start, entry.stop, _CHUNK_BYTES):
        chunk = f.read(min(_CHUNK_BYTES, entry.stop - start))
        if entry.dtype == "BF16":  # all bits of the exponent are set; numpy has no such dtype
            exponents = np.frombuffer(chunk, "<u2") & np.uint16(0x7F80)
            finite = not bool((exponents == 0x7F80).any())
        else:
            finite = bool(np.isfinite(np.frombuffer(chunk, _NUMPY_TYPES[entry.dtype])).all())
        if not finite:
            return False
    return True
