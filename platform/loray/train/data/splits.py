"""Tokenised sources, split into rows to train on and rows to hold out, from the index of their shards alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loray.errors import DataError
from loray.train.data.corpus import Corpus, Files, Indices, SliceRows
from loray.train.data.joined import JoinedRows, join
from loray.train.data.reading.files import RowFile

SPLIT_STREAM, SAMPLE_STREAM = 1, 2  # different generators for one seed


class Part(NamedTuple):
    """Rows to train on or to hold out; of each its source, whether it was truncated, and its number of targets."""

    rows: SliceRows | JoinedRows
    sources: NDArray[np.integer]
    truncated: NDArray[np.bool_]
    num_targets: Indices

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
    files: Files, train: Corpus, evaluation: Corpus | None, max_length: int, fraction: float, seed: int
) -> Split:
    """Rows of single documents, or of windows of one."""
    part, documents = _cut(train, max_length)
    num_documents = train.num_documents
    if evaluation is not None:
        return Split(part, _cut(evaluation, max_length)[0], num_documents)
    if num_documents == 1 and train.is_text_E[0] and fraction:
        trained, held_out = _end_held_out(files, len(part.rows), fraction)
    else:
        _, documents_out = _hold_out(files, num_documents, fraction, seed)
        is_held_out = np.isin(documents, documents_out)
        trained, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    return Split(part.select(trained), part.select(held_out), num_documents)


def _cut(corpus: Corpus, max_length: int) -> tuple[Part, Indices]:
    """A row of every example, cut off at `max_length` tokens, and of a text all its windows; and the document of each
    row.
    """
    counts_E = np.where(corpus.is_text_E, -(-corpus.lengths_E // max_length), 1)
    example_R = np.repeat(np.arange(len(counts_E)), counts_E)
    number_R = np.arange(len(example_R)) - np.repeat(np.cumsum(counts_E) - counts_E, counts_E)  # of the window
    left_R = corpus.lengths_E[example_R] - number_R * max_length
    lengths_R = np.minimum(left_R, max_length)
    is_text_R = corpus.is_text_E[example_R]
    part = Part(
        SliceRows(corpus.tokens, corpus.starts_E[example_R] + number_R * max_length, lengths_R),
        corpus.sources_E[example_R],
        ~is_text_R & (left_R > max_length),
        np.where(is_text_R, lengths_R - 1, corpus.num_targets_within(max_length)[example_R]),
    )
    return part, corpus.documents_E[example_R]


def joined_texts(
    files: Files, train: Corpus, evaluation: Corpus | None, max_length: int, fraction: float, seed: int
) -> Split:
    """Rows of joined texts, of each source for itself. What is held out is split off before texts are joined, unless
    there is a single text.
    """

    def rows_of(corpus: Corpus, chosen: Indices) -> Part:
        bounds = np.searchsorted(corpus.sources_E, np.arange(corpus.sources_E[-1] + 2))
        streams = [chosen[slice(*np.searchsorted(chosen, (a, b)))] for a, b in pairwise(bounds)]
        rows = join(corpus.tokens, corpus.beginning, corpus.starts_E, corpus.lengths_E, streams, max_length)
        return Part(rows, rows.sources, np.zeros(len(rows), np.bool_), rows.lengths - 1)

    everything = np.arange(train.num_documents)
    if evaluation is not None:
        return Split(
            rows_of(train, everything), rows_of(evaluation, np.arange(evaluation.num_documents)), len(everything)
        )
    if len(everything) == 1 and fraction:
        whole = rows_of(train, everything)
        trained, held_out = _end_held_out(files, len(whole.rows), fraction)
        return Split(whole.select(trained), whole.select(held_out), 1)
    trained, held_out = _hold_out(files, len(everything), fraction, seed)
    return Split(rows_of(train, trained), rows_of(train, held_out), len(everything))


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
