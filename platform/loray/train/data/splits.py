"""Tokenised sources, split into rows to train on and rows to hold out."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loray.errors import DataError
from loray.train.data.examples import Example, RowSpool, TokenRows, check_tokenizer, prompt_ids, tokenize
from loray.train.data.files import RowFile
from loray.train.data.joined import JoinedRows, join

Indices = NDArray[np.int64]
Files = Sequence[Sequence[RowFile]]  # of each source

SPLIT_STREAM, SAMPLE_STREAM = 1, 2  # different generators for one seed


class Part(NamedTuple):
    """Rows to train on or to hold out; of each its source, whether it was truncated, and its number of targets."""

    rows: TokenRows | JoinedRows
    sources: Indices
    truncated: NDArray[np.bool_]
    num_targets: NDArray[np.int64]

    def select(self, indices: Indices) -> Part:
        return Part(
            self.rows.select(indices), self.sources[indices], self.truncated[indices], self.num_targets[indices]
        )


class Split(NamedTuple):
    """`num_documents` are those of the training files, held-out ones included."""

    trained: Part
    held_out: Part
    num_documents: int


def windows(
    train_files: Files, eval_files: Files, tokenizer: Any, max_length: int, fraction: float, seed: int
) -> Split:
    """Rows of single documents, or of windows of one."""
    examples, documents = _spool(train_files, tokenizer, max_length)
    num_documents = int(documents[-1]) + 1  # every document has an example
    if eval_files:
        return Split(examples, _spool(eval_files, tokenizer, max_length)[0], num_documents)
    if num_documents == 1 and train_files[0][0].format == "text" and fraction:
        trained, held_out = _end_held_out(train_files, len(examples.rows), fraction)
    else:
        _, documents_out = _hold_out(train_files, num_documents, fraction, seed)
        is_held_out = np.isin(documents, documents_out)
        trained, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    return Split(examples.select(trained), examples.select(held_out), num_documents)


def joined_texts(
    train_files: Files, eval_files: Files, tokenizer: Any, max_length: int, fraction: float, seed: int
) -> Split:
    """Rows of joined texts, of each source for itself. What is held out is split off before texts are joined, unless
    there is a single text.
    """

    def rows_of(texts: _Texts, chosen: Indices) -> Part:
        streams = [chosen[(chosen >= a) & (chosen < b)] for a, b in pairwise(texts.bounds)]
        rows = join(texts.rows, streams, max_length)
        # A stream's first token is that of its first piece: rows of a source lie between two of them.
        begins = np.cumsum([0, *(len(stream) + 1 for stream in streams)])[:-1]
        sources = np.searchsorted((rows.ends - rows.pieces.lengths)[begins], rows.starts, side="right") - 1
        return Part(rows, sources, np.zeros(len(rows), np.bool_), rows.lengths - 1)

    texts = _spool_texts(train_files, tokenizer)
    everything = np.arange(texts.bounds[-1])
    if eval_files:
        measured = _spool_texts(eval_files, tokenizer)
        return Split(rows_of(texts, everything), rows_of(measured, np.arange(measured.bounds[-1])), len(everything))
    if len(everything) == 1 and fraction:
        whole = rows_of(texts, everything)
        trained, held_out = _end_held_out(train_files, len(whole.rows), fraction)
        return Split(whole.select(trained), whole.select(held_out), 1)
    trained, held_out = _hold_out(train_files, len(everything), fraction, seed)
    return Split(rows_of(texts, trained), rows_of(texts, held_out), len(everything))


def _examples(files: Sequence[RowFile], tokenizer: Any, max_length: int | None, first: int) -> Iterator[Example]:
    """Of one source; its documents are numbered from `first`, through all files."""
    begin, most = first, files[0].max_rows
    for file in files:
        left = None if most is None else most - (first - begin)
        if left == 0:
            return
        document = first
        for example in tokenize(file._replace(max_rows=left), tokenizer, max_length):
            document = first + example.document
            yield example._replace(document=document)
        first = document + 1


def _spool(files: Files, tokenizer: Any, max_length: int) -> tuple[Part, Indices]:
    """The rows, and the document of each."""
    documents, truncated, num_targets, sources = array("q"), array("b"), array("q"), array("q")
    with RowSpool() as spool:
        for number, source in enumerate(files):
            first = documents[-1] + 1 if documents else 0
            for example in _examples(source, tokenizer, max_length, first):
                num_targets.append(spool.add(example.ids, example.targets))
                documents.append(example.document)
                truncated.append(example.truncated)
                sources.append(number)
        rows = spool.rows()
    part = Part(rows, np.array(sources, np.int64), np.array(truncated, np.bool_), np.array(num_targets, np.int64))
    return part, np.array(documents, np.int64)


class _Texts(NamedTuple):
    """Row 0 is what the tokenizer puts before a text, row k + 1 is the whole text k with an end-of-sequence token.
    Source i has texts bounds[i] to bounds[i + 1].
    """

    rows: TokenRows
    bounds: list[int]


def _spool_texts(files: Files, tokenizer: Any) -> _Texts:
    check_tokenizer(tokenizer)
    (beginning,) = prompt_ids(tokenizer, [""])
    bounds = [0]
    with RowSpool() as spool:
        spool.add(beginning, [False] * len(beginning))
        for source in files:
            first = bounds[-1]
            for example in _examples(source, tokenizer, None, first):
                spool.add(example.ids, example.targets)
                first = example.document + 1
            bounds.append(first)
        return _Texts(spool.rows(), bounds)


def _end_held_out(files: Files, num_rows: int, fraction: float) -> tuple[Indices, Indices]:
    """(training, held out) rows of a single text, whose end is held out."""
    count = _num_held_out(files, num_rows, fraction)
    return np.arange(num_rows - count), np.arange(num_rows - count, num_rows)


def _hold_out(files: Files, num_documents: int, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """(training, held out) documents: what becomes of one document is on one side."""
    if fraction == 0:
        return np.arange(num_documents), np.empty(0, np.int64)
    order = np.random.default_rng([seed, SPLIT_STREAM]).permutation(num_documents)
    held_out = np.sort(order[: _num_held_out(files, num_documents, fraction)])
    return np.setdiff1d(np.arange(num_documents), held_out), held_out


def _num_held_out(files: Files, num_units: int, fraction: float) -> int:
    if num_units < 2:
        raise DataError(
            f"{files[0][0].source} has a single row, so nothing can be held out of it; "
            "give data.eval, or set data.eval_fraction to 0"
        )
    return min(max(1, round(num_units * fraction)), num_units - 1)


def check_texts(files: Iterable[RowFile]) -> None:
    for file in files:
        if file.format != "text":
            raise DataError(
                f"{file.source} holds rows of format {file.format}, and batch.order concat joins texts: take shuffled, "
                "length_grouped or packed"
            )
