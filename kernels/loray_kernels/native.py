"""The C++ library of one instruction set: chosen, loaded, its functions declared, and tables packed for it.

Packed tables are arrays of 64-bit words that csrc's structs read in place.
"""

from __future__ import annotations

import ctypes
import platform
from array import array
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loray_kernels.build import BackendUnavailable, library
from loray_kernels.ops import AttentionMeta, KvLayout, LoraTable, RowTables, Segments

# From slow to fast, with the compiler's flags; a number is the place in host.cpp.
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = tuple(f"-mavx512{f}" for f in ("f", "bw", "vl", "dq", "bf16"))
ISA_FLAGS = {"generic": (), "avx2": _AVX2, "avx512": (*_AVX2, *_AVX512, "-mprefer-vector-width=512")}
_SOURCES = ("attention.cpp", "linear.cpp", "lora.cpp", "rows.cpp", "vera.cpp")

_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pack_linear": (_P, _I, _I, _P, _N),
    "linear": (_P, _I, _I, _I, _P, _P, _I, _P, _N),
    "logits": (_P, _I, _I, _I, _P, _P, _I, _P, _N),
    "silu_mul": (_P, _I, _I, _I, _P, _N),
    "lora_shrink": (_P, _I, _P, _P, _P, _I, _P, _N),
    "lora_expand": (_P, _P, _P, _I, _P, _N),
    "vera_shrink": (_P, _I, _I, _P, _P, _I, _P, _N),
    "vera_expand": (_P, _I, _P, _I, _I, _I, _I, _P, _P, _P, _P, _P, _N),
    "paged_attention": (_P, _I, _P, _I, _P, _P, _I, _P, _F, _N),
    "rms_norm": (_P, _I, _I, _I, _I, _P, _F, _P, _P, _P, _I, _P, _N),
    "rope": (_P, _I, _I, _I, _I, _P, _P, _P, _N),
    "write_kv": (_P, _I, _I, _P, _I, _P, _I, _I, _P, _I, _N),
}
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Functions(NamedTuple):
    """The kernels for one dtype; arguments as in csrc."""

    pack_linear: Any
    linear: Any
    logits: Any
    silu_mul: Any
    lora_shrink: Any
    lora_expand: Any
    vera_shrink: Any
    vera_expand: Any
    paged_attention: Any
    rms_norm: Any
    rope: Any
    write_kv: Any


@cache
def supported() -> tuple[str, ...]:
    """Instruction sets that this CPU has, slow to fast. BackendUnavailable as `functions`."""
    host = _load("host", ("host.cpp",), ())
    known = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else ("generic",)
    return tuple(isa for i, isa in enumerate(known) if host.loray_supports(i))


@cache
def functions(isa: str) -> dict[torch.dtype, Functions]:
    """Compiled at first use. BackendUnavailable says why there is no library; ValueError that the CPU lacks `isa`."""
    if isa not in supported():
        raise ValueError(f"no instruction set {isa!r} here; there is: {', '.join(supported())}")
    loaded = _library(isa)
    found = {}
    for dtype, suffix in _SUFFIX.items():
        kernels = []
        for name, signature in _SIGNATURES.items():
            function = loaded[f"{name}_{suffix}_{isa}"]
            function.argtypes, function.restype = signature, None
            kernels.append(function)
        found[dtype] = Functions(*kernels)
    return found


@cache
def _library(isa: str) -> ctypes.CDLL:
    return _load(isa, _SOURCES, (f"-DLORAY_ISA={isa}", *ISA_FLAGS[isa]))


def _load(name: str, sources: tuple[str, ...], flags: tuple[str, ...]) -> ctypes.CDLL:
    # torch is imported above: its OpenMP library is the one that this finds loaded, so both share their threads.
    path = library(name, sources, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError as e:
        raise BackendUnavailable(f"the cpu kernels do not load: {e}; delete {path} to have it made anew") from e


class Packed(NamedTuple):
    """`address` for C; `keep` holds what it points to. Sizes are checked before C trusts them."""

    address: int
    keep: tuple[Any, ...]
    widths: tuple[int, ...]
    num: int


def _words(values: list[int]) -> tuple[int, array[int]]:
    packed = array("q", values)
    return packed.buffer_info()[0], packed


def pack_rows(rows: RowTables) -> Packed:
    """widths: (columns); num: rows."""
    packed: Packed | None = rows.memo.get("cpu")
    if packed is None:
        words, keep, width = [len(rows.segments)], [], 0
        num = rows.segments[0][2].shape[0]
        for column, columns, offsets_R in rows.segments:
            offsets_R = offsets_R.contiguous()
            assert offsets_R.shape[0] == num
            assert column == width
            width += columns
            words += (column, columns, offsets_R.data_ptr())
            keep.append(offsets_R)
        address, held = _words(words)
        packed = rows.memo["cpu"] = Packed(address, (held, *keep), (width,), num)
    return packed


def pack_lora(table: LoraTable) -> Packed:
    """widths: (in, out, largest rank); num: adapters."""
    packed: Packed | None = table.memo.get("cpu")
    if packed is None:
        a, b, starts = pack_rows(table.a), pack_rows(table.b), table.rank_start
        rank = max((stop - start for start, stop in pairwise(starts)), default=0)
        assert starts[-1] <= min(a.num, b.num)
        start_address, start = _words(list(starts))
        scale = array("f", table.scale)
        address, held = _words([a.address, b.address, start_address, scale.buffer_info()[0]])
        widths = (a.widths[0], b.widths[0], rank)
        packed = table.memo["cpu"] = Packed(address, (held, a, b, start, scale), widths, len(table.scale))
    return packed


def pack_segments(segments: Segments) -> Packed:
    """widths: (tokens at least); num: adapters."""
    packed: Packed | None = segments.memo.get("cpu")
    if packed is None:
        (start_address, start), (stop_address, stop) = _words(list(segments.start)), _words(list(segments.stop))
        address, held = _words([len(start), start_address, stop_address])
        last = max(segments.stop, default=0)
        packed = segments.memo["cpu"] = Packed(address, (held, start, stop), (last,), len(start))
    return packed


def pack_meta(meta: AttentionMeta, block_tokens: int) -> Packed:
    """widths: (tokens); num: sequences."""
    packed: Packed | None = meta.memo.get("cpu")
    if packed is None:
        tables = [t.contiguous() for t in meta.block_table]
        assert all(t.shape[0] * block_tokens >= c for t, c in zip(tables, meta.context_len, strict=True))
        (query_address, query), (context_address, context) = (
            _words(list(meta.query_start)),
            _words(list(meta.context_len)),
        )
        table_address, pointers = _words([t.data_ptr() for t in tables])
        address, held = _words([len(context), query_address, context_address, table_address])
        keep = (held, query, context, pointers, *tables)
        packed = meta.memo["cpu"] = Packed(address, keep, (meta.query_start[-1],), len(context))
    return packed


@cache
def packed_size(isa: str, in_features: int, out_features: int, itemsize: int) -> int:
    """Elements of a packed matrix."""
    size = ctypes.c_int64()
    function = _library(isa)[f"packed_size_{isa}"]
    function.argtypes = (_I, _I, _I, _P)
    function(in_features, out_features, itemsize, ctypes.addressof(size))
    return size.value


@cache
def pack_layout(layout: KvLayout) -> Packed:
    address, held = _words([layout.num_layers, layout.block_tokens, layout.num_kv_heads, layout.head_dim])
    return Packed(address, (held,), (), 0)


def dense_rows(matrix: Tensor, width: int) -> RowTables:
    """The rows of a (rows, columns) matrix as a table, cut to `width` columns."""
    return _dense_rows(matrix.shape[0], matrix.stride(0), width)


@cache
def _dense_rows(num: int, stride: int, width: int) -> RowTables:
    return RowTables(((0, width, torch.arange(num) * stride),))
