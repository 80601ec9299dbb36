"""A look at data before it is trained on: how rows are rendered, how long they are, and which stand there twice.

All rows are read and hashed. Of much data a sample is tokenised, and the lengths of the other rows follow from their
bytes. Large files are read by a process for each CPU.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import blake2b
from multiprocessing import get_context
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from loray.recipes.sources import Copy, find_files
from loray.spec import DataSource, DataSpec, SftSpec
from loray.telemetry import Progress
from loray.train.data.formats import FORMATS, Formats, fitting_formats
from loray.train.data.read import (
    BadRow,
    Content,
    FilePart,
    cut,
    located,
    place,
    read_head,
    read_parts,
    records_of,
    rows_of,
)
from loray.train.data.rows import Cut, held_out_documents, num_held_out
from loray.train.data.tokenize import Tokenisation

_SAMPLE_ROWS, _SAMPLE_BYTES = 4000, 16 << 20  # that are tokenised, of all data
_FEW_PARTS = 3  # which this process reads itself: others take longer to start
_MOST_SHOWN = 3  # duplicates

_Hashes = NDArray[np.uint64]
T = TypeVar("T")


class Piece(NamedTuple):
    """A stretch of a rendered row: whether it is learned, and whether it is beyond the longest row."""

    text: str
    is_learned: bool
    is_cut: bool


class Duplicate(NamedTuple):
    """A row that stands in the data `times` times, first at `place`."""

    place: str
    times: int


class Survey(NamedTuple):
    """What was found.

    rendering       how rows become tokens, and why
    num_bytes       of what is read of the rows
    num_sampled     rows that were tokenised; of the others lengths are estimated
    lengths_R       tokens of each training row before it is cut, of a pair those of the longer answer
    learned         the share of the sample's tokens that is learned
    cut             at the longest row; texts are cut into windows, which lose nothing
    num_duplicates  training rows that stand there before
    duplicates      the most frequent of them
    num_held_out    rows, of which `num_in_both` stand in the training rows too
    shown           the first rows: the sequences of each in pieces
    are_pairs       those of a row are a chosen and a rejected answer, else the answers of a chat
    """

    rendering: str
    num_bytes: int
    num_rows: int
    num_sampled: int
    lengths_R: NDArray[np.int64]
    learned: float
    cut: Cut
    num_duplicates: int
    duplicates: tuple[Duplicate, ...]
    num_held_out: int
    num_in_both: int
    shown: tuple[tuple[tuple[Piece, ...], ...], ...]
    are_pairs: bool


class _Scan(NamedTuple):
    """What is in a part. `sizes_R`: bytes; `sample` are indices of rows, with their tokens."""

    hashes_R: _Hashes
    sizes_R: NDArray[np.int64]
    sample_K: NDArray[np.int64]
    tokens_K: NDArray[np.int64]
    num_tokens: int
    num_targets: int


def survey(
    spec: DataSpec,
    tokenizer: Any,
    *,
    max_length: int,
    seed: int,
    formats: Formats = SftSpec.formats,
    invocation: Sequence[int] | None = None,
    num_shown: int = 3,
    fetched: Mapping[str, Copy] = MappingProxyType({}),
    progress: Progress = lambda step, share: None,
) -> Survey:
    """Look at `spec.train` (and `spec.eval`), as `load_data` would read them. Rows of none of the `formats` are read as
    what they are. `invocation`: the tokens of aLoRA's. Raises DataError.
    """
    tokenisation = Tokenisation(
        tokenizer, joined=False, raw=spec.format == "raw", system=spec.system, invocation=invocation
    )
    train, held_out = (
        _parts(sources, max_rows, spec, tokenisation, formats, fetched)
        for sources, max_rows in ((spec.train_sources, spec.max_rows), (spec.eval_sources, None))
    )
    total = sum(_size(part) for part in (*train, *held_out))
    scans = list(_scans([*train, *held_out], tokenisation, total, progress))
    mine, others = scans[: len(train)], scans[len(train) :]
    hashes_R = np.concatenate([scan.hashes_R for scan in mine])
    lengths_R, num_sampled = _lengths(mine)
    is_text = invocation is None and all(FORMATS[part.file.format].turns is None for part in train)
    held_R, trained_R = _split(hashes_R, [scan.hashes_R for scan in others], spec, seed)
    num_tokens = sum(scan.num_tokens for scan in mine)
    firsts, counts = np.unique(hashes_R, return_index=True, return_counts=True)[1:]
    return Survey(
        rendering=tokenisation.rendering([part.file.format for part in train]),
        num_bytes=int(sum(scan.sizes_R.sum() for scan in mine)),
        num_rows=len(hashes_R),
        num_sampled=num_sampled,
        lengths_R=lengths_R,
        learned=sum(scan.num_targets for scan in mine) / max(1, num_tokens),
        cut=Cut.of(lengths_R[:, None][: 0 if is_text else None], max_length),
        num_duplicates=len(hashes_R) - len(firsts),
        duplicates=tuple(_duplicates(firsts, counts, train, mine)),
        num_held_out=len(held_R),
        num_in_both=int(np.isin(held_R, trained_R).sum()),
        shown=tuple(_shown(train[0], tokenisation, tokenizer, num_shown, max_length)),
        are_pairs=FORMATS[train[0].file.format].is_pair,
    )


def _parts(
    sources: tuple[DataSource, ...],
    max_rows: int | None,
    spec: DataSpec,
    tokenisation: Tokenisation,
    formats: Formats,
    fetched: Mapping[str, Copy],
) -> list[FilePart]:
    parts = list[FilePart]()
    for source in sources:
        left = max_rows
        for found in find_files(source.path, fetched.get(source.path)):
            head = read_head(found)
            are_others = not fitting_formats(head.names, spec, formats) and fitting_formats(
                head.names, spec, frozenset(FORMATS)
            )
            file = rows_of(found, head, spec, frozenset(FORMATS) if are_others else formats)
            tokenisation.check_format(found, file.format)
            pieces = cut(file, left)
            parts += pieces.parts
            left = None if left is None else left - (pieces.num_rows or 0)
    return parts


def _size(part: FilePart) -> int:
    """Bytes, or of tables rows."""
    return part.stop - part.first


def _scans(parts: list[FilePart], tokenisation: Tokenisation, total: int, progress: Progress) -> Iterator[_Scan]:
    """Scan the parts in their order."""

    def contents() -> Iterator[tuple[FilePart, Content]]:
        start = 0
        for i in range(1, len(parts) + 1):  # of one file, which may stand there twice
            if i == len(parts) or parts[i].file != parts[start].file or parts[i].first <= parts[i - 1].first:
                yield from read_parts(parts[start:i])
                start = i

    def begun() -> Iterator[tuple[FilePart, Callable[[], _Scan]]]:
        """Yield each part with what scans it, or waits until that is done."""
        each, num_processes = len(parts), len(os.sched_getaffinity(0))
        if each <= _FEW_PARTS or num_processes == 1:
            for part, content in contents():
                yield part, partial(_scan, content, tokenisation, each)
            return
        waiting: deque[tuple[FilePart, Callable[[], _Scan]]] = deque()
        with ProcessPoolExecutor(num_processes, get_context("spawn"), _begin, (tokenisation, each)) as pool:
            for part, content in contents():
                waiting.append((part, pool.submit(_scan_there, content).result))
                if len(waiting) > 2 * num_processes:
                    yield waiting.popleft()
            yield from waiting

    done = 0
    for part, scan in begun():
        yield _located(part, scan)
        done += _size(part)
        progress("reading", done / total)


def _located(part: FilePart, make: Callable[[], T]) -> T:
    try:
        return make()
    except BadRow as e:
        raise located(e, part) from e


_process: tuple[Tokenisation, int]  # of a process that scans


def _begin(tokenisation: Tokenisation, num_parts: int) -> None:
    global _process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _process = tokenisation, num_parts


def _scan_there(content: Content) -> _Scan:
    return _scan(content, *_process)


def _scan(content: Content, tokenisation: Tokenisation, num_parts: int) -> _Scan:
    records = records_of(content)
    hashes_R, sizes_R = np.empty(len(records), np.uint64), np.empty(len(records), np.int64)
    for i, (_, record) in enumerate(records):
        given = {name: value for name, value in record.items() if value is not None}
        text = repr(given).encode("utf-8", "surrogatepass")
        hashes_R[i] = int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
        sizes_R[i] = len(text)
    share = min(1.0, _SAMPLE_BYTES / num_parts / max(1, sizes_R.sum()))
    count = min(len(records), max(1, int(len(records) * share)), -(-_SAMPLE_ROWS // num_parts))
    sample_K = np.unique(np.linspace(0, len(records) - 1, count).astype(np.int64))
    index = tokenisation.tokenised(content.format, [records[i] for i in sample_K]).index
    tokens_K = np.zeros(len(sample_K), np.int64)
    np.maximum.at(tokens_K, index.documents_E, index.lengths_E)
    return _Scan(hashes_R, sizes_R, sample_K, tokens_K, index.num_tokens, int(index.mask().sum()))


def _lengths(scans: list[_Scan]) -> tuple[NDArray[np.int64], int]:
    """(tokens of each row, how many rows were tokenised): a line through the sample's bytes and tokens."""
    sizes_K = np.concatenate([scan.sizes_R[scan.sample_K] for scan in scans])
    tokens_K = np.concatenate([scan.tokens_K for scan in scans])
    sizes_R = np.concatenate([scan.sizes_R for scan in scans])
    slope, start = 0.0, float(tokens_K.mean())
    if len(sizes_K) < len(sizes_R) and np.ptp(sizes_K):
        slope, start = np.polyfit(sizes_K, tokens_K, 1)
    lengths_R = np.maximum(1, np.rint(start + slope * sizes_R)).astype(np.int64)
    first = 0
    for scan in scans:
        lengths_R[first + scan.sample_K] = scan.tokens_K
        first += len(scan.sizes_R)
    return lengths_R, len(tokens_K)


def _split(hashes_R: _Hashes, given: list[_Hashes], spec: DataSpec, seed: int) -> tuple[_Hashes, _Hashes]:
    """(rows that are held out, rows that are trained on)."""
    if given:
        return np.concatenate(given), hashes_R
    if spec.eval_fraction == 0 or len(hashes_R) < 2:
        return hashes_R[:0], hashes_R
    held_out = held_out_documents(len(hashes_R), num_held_out(len(hashes_R), spec.eval_fraction), seed)
    return hashes_R[held_out], np.delete(hashes_R, held_out)


def _duplicates(
    firsts: NDArray[np.int64], counts: NDArray[np.int64], parts: list[FilePart], scans: list[_Scan]
) -> Iterator[Duplicate]:
    ends = np.cumsum([len(scan.hashes_R) for scan in scans])
    for i in np.lexsort((firsts, -counts))[:_MOST_SHOWN]:  # of equal counts the first
        if counts[i] > 1:
            k = int(np.searchsorted(ends, firsts[i], side="right"))
            ((part, content),) = read_parts([parts[k]])
            row = int(firsts[i] - (ends[k - 1] if k else 0))
            yield Duplicate(place(part, records_of(content)[row][0]), int(counts[i]))


def _shown(
    part: FilePart, tokenisation: Tokenisation, tokenizer: Any, count: int, max_length: int
) -> Iterator[tuple[tuple[Piece, ...], ...]]:
    ((_, content),) = read_parts([part])
    for record in records_of(content)[:count]:
        shard = _located(part, partial(tokenisation.tokenised, content.format, [record]))
        ends = np.cumsum(shard.index.lengths_E)
        mask = shard.index.mask()
        yield tuple(
            tuple(_pieces(shard.tokens_N[end - length : end].tolist(), mask[end - length : end], tokenizer, max_length))
            for end, length in zip(ends, shard.index.lengths_E, strict=True)
        )


def _pieces(ids: list[int], learned: NDArray[np.bool_], tokenizer: Any, max_length: int) -> Iterator[Piece]:
    """Decoded from the beginning up to the end of each piece: some tokenizers write a token by those before it."""
    kinds = [(bool(is_learned), i >= max_length) for i, is_learned in enumerate(learned)]
    written, start = "", 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or kinds[stop] != kinds[start]:
            text = tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            yield Piece(text[len(written) :], *kinds[start])
            written, start = text, stop
