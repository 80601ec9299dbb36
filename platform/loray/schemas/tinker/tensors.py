"""Tensors of Tinker's messages, as bytes in little-endian order, from and to numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from loray.errors import RequestError, UnsupportedParameter

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
_DTYPES: Mapping[int, np.dtype[Any]] = {
    FLOAT32: np.dtype("<f4"),
    INT64: np.dtype("<i8"),
    INT32: np.dtype("<i4"),
    BFLOAT16: np.dtype("<u2"),
}
_MOST_ELEMENTS = 1 << 22  # of a sparse tensor, once it is dense
_EMPTY_TOKEN, _EMPTY_LOGPROB = 0, -99999.0  # of a place that has fewer than k


def read_tokens(chunks: Sequence[Any], where: str) -> npt.NDArray[np.int32]:
    """Return the token ids of a model's input, (T,). Raises RequestError, also for images and sounds."""
    parts = []
    for chunk in chunks:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            what = {"image": "an image", "dmel": "a sound"}.get(kind, "of no known kind")
            raise UnsupportedParameter(f"{where}: a chunk is {what}; loray's bases read text alone", where)
        parts.append(_array(chunk.encoded_text.tokens, INT32, where))
    if not parts:
        return np.zeros(0, np.int32)
    return np.concatenate(parts).astype(np.int32, copy=False)


def read_tensor(message: Any, where: str) -> npt.NDArray[Any]:
    """Return a Tensor as float32, int64 or int32; a sparse one is made dense. Raises RequestError."""
    shape = tuple(message.shape)
    if any(size < 0 for size in shape):
        raise RequestError(f"{where}: the shape {list(shape)} has a negative size", where)
    if message.HasField("sparse_csr"):
        return _dense(message, shape, where)
    values = _array(message.dense, message.dtype, where)
    if not shape:
        return values
    if math.prod(shape) != values.size:
        raise RequestError(f"{where}: the shape {list(shape)} does not fit its {values.size} values", where)
    return values.reshape(shape)


def _dense(message: Any, shape: tuple[int, ...], where: str) -> npt.NDArray[Any]:
    """Return a matrix whose rows are in compressed form (CSR): row i has `columns[rows[i]:rows[i + 1]]`."""
    if len(shape) != 2 or math.prod(shape) > _MOST_ELEMENTS:
        raise RequestError(f"{where}: a sparse tensor has two sizes, of together at most {_MOST_ELEMENTS:,}", where)
    sparse = message.sparse_csr
    values = _array(sparse.values, message.dtype, where)
    rows, columns = (_array(raw, INT64, where) for raw in (sparse.crow_indices, sparse.col_indices))
    counts = np.diff(rows)
    is_valid = (
        rows.size == shape[0] + 1
        and rows[0] == 0
        and rows[-1] == values.size == columns.size
        and bool((counts >= 0).all())
        and (not columns.size or (columns.min() >= 0 and columns.max() < shape[1]))
    )
    if not is_valid:
        raise RequestError(f"{where}: the indices of the sparse tensor do not fit its shape {list(shape)}", where)
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


def _array(raw: bytes, dtype: int, where: str) -> npt.NDArray[Any]:
    if dtype not in _DTYPES:
        raise RequestError(f"{where}: dtype {dtype} is not known; send float32, int64, int32 or bfloat16", where)
    kind = _DTYPES[dtype]
    if len(raw) % kind.itemsize:
        raise RequestError(f"{where}: {len(raw)} bytes are no whole number of {kind.itemsize} bytes each", where)
    values = np.frombuffer(raw, kind)
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == BFLOAT16 else values


def write_batch(message: Any, arrays: Sequence[npt.NDArray[np.float32]]) -> None:
    """Write float32 arrays (T_i,) into a BatchedTensor. Its offsets count bytes."""
    lengths = np.array([0, *(array.size for array in arrays)], dtype=np.int64)
    message.offsets = (np.cumsum(lengths) * 4).astype("<i8").tobytes()
    message.data = b"".join(array.astype("<f4", copy=False).tobytes() for array in arrays)
    message.dtype = FLOAT32


def write_top(message: Any, places: Sequence[Sequence[tuple[int, float]]], k: int) -> None:
    """Write the best `k` tokens of each place, fewer of them filled up, into a TopkLogprobs."""
    token_ids = np.full((len(places), k), _EMPTY_TOKEN, "<i4")
    logprobs = np.full((len(places), k), _EMPTY_LOGPROB, "<f4")
    for i, place in enumerate(places):
        for j, (token_id, logprob) in enumerate(place[:k]):
            token_ids[i, j], logprobs[i, j] = token_id, logprob
    message.token_ids, message.logprobs = token_ids.tobytes(), logprobs.tobytes()
    message.k, message.length = k, len(places)
