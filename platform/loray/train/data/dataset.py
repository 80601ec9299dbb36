"""A run's data: read, tokenised, split into training rows and held-out rows, and fingerprinted."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loray.errors import DataError
from loray.spec import DataSpec
from loray.train.data.examples import Example, Rows, RowSpool, TokenRows, tokenize
from loray.train.data.files import DataFormat, RowFile, open_rows

Indices = NDArray[np.int64]

_SPLIT_STREAM, _SAMPLE_STREAM = 1, 2  # different generators for one seed


@dataclass(frozen=True, slots=True)
class DataReport:
    """Statistics of the data. Tokens are those of the training rows; targets are tokens with a label."""

    format: DataFormat
    num_documents: int
    num_rows: int
    num_eval_rows: int
    num_tokens: int
    num_targets: int
    num_truncated: int
    num_without_targets: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training rows, which may be outside of this process's memory, and held-out rows, which are few.

    `fingerprint` is the SHA-256 of the training file; with an evaluation file, that of both files' hex digests.
    """

    train: Rows
    evaluation: TokenRows
    max_length: int
    fingerprint: str
    report: DataReport


def load_data(
    spec: DataSpec,
    tokenizer: Any,
    *,
    max_length: int,
    max_eval_rows: int,
    seed: int,
    whole_windows: bool = False,
    fetched: Mapping[str, Path] = MappingProxyType({}),
) -> Dataset:
    """Read and tokenise `spec.train` (and `spec.eval`). Raises DataError.

    Without `spec.eval`, `eval_fraction` of the documents is held out, the same ones for the same seed; of a single text
    its last windows are held out. At most `max_eval_rows` rows are kept for evaluation, drawn by the seed.
    whole_windows  hold out only windows of exactly `max_length` tokens, where there are any
    fetched        copies on this machine of remote sources
    """
    file = open_rows(spec.train, spec.format, spec.max_rows, fetched=fetched.get(spec.train))
    examples = _spool(tokenize(file, tokenizer, max_length))
    fingerprint = file.sha256
    if spec.eval is not None:
        eval_file = open_rows(spec.eval, spec.format, fetched=fetched.get(spec.eval))
        eval_examples = _spool(tokenize(eval_file, tokenizer, max_length))
        trained, held_out = np.arange(len(examples.rows)), np.arange(len(eval_examples.rows))
        fingerprint = hashlib.sha256(f"{file.sha256}\n{eval_file.sha256}\n".encode()).hexdigest()
    else:
        eval_examples = examples
        trained, held_out = _hold_out(file, examples, spec.eval_fraction, seed)

    usable = trained[examples.num_targets[trained] > 0]
    held_out = held_out[eval_examples.num_targets[held_out] > 0]
    for source, rows in ((spec.train, usable), (spec.eval, held_out)):
        if source is not None and not len(rows):
            raise DataError(
                f"no row of {source} has a token to learn within {max_length} tokens; raise data.max_length"
            )
    whole = held_out[eval_examples.rows.lengths[held_out] == max_length]
    if whole_windows and len(whole):
        held_out = whole
    if len(held_out) > max_eval_rows:
        drawn = np.random.default_rng([seed, _SAMPLE_STREAM]).choice(len(held_out), max_eval_rows, replace=False)
        held_out = held_out[np.sort(drawn)]

    train = examples.rows.select(usable)
    report = DataReport(
        format=file.format,
        num_documents=int(examples.documents[-1]) + 1,
        num_rows=len(train),
        num_eval_rows=len(held_out),
        num_tokens=int(train.lengths.sum()),
        num_targets=int(examples.num_targets[usable].sum()),
        num_truncated=int(examples.truncated[usable].sum()),
        num_without_targets=len(trained) - len(usable),
    )
    return Dataset(train, eval_examples.rows.select(held_out).packed(), max_length, fingerprint, report)


class _Examples(NamedTuple):
    """Tokenised rows; for each row its document, whether it was truncated, and its number of targets."""

    rows: TokenRows
    documents: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    num_targets: NDArray[np.int64]


def _spool(examples: Iterable[Example]) -> _Examples:
    documents, truncated, num_targets = array("q"), array("b"), array("q")
    with RowSpool() as spool:
        for example in examples:
            num_targets.append(spool.add(example.ids, example.targets))
            documents.append(example.document)
            truncated.append(example.truncated)
        rows = spool.rows()
    return _Examples(
        rows, np.array(documents, np.int64), np.array(truncated, np.bool_), np.array(num_targets, np.int64)
    )


def _hold_out(file: RowFile, examples: _Examples, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """(training, held out), split by document: windows of one text are on one side, unless it is the only document."""
    if fraction == 0:
        return np.arange(len(examples.rows)), np.empty(0, np.int64)
    units, num_units = examples.documents, int(examples.documents[-1]) + 1  # every document has an example
    if num_units == 1 and file.format == "text":
        units, num_units = np.arange(len(examples.rows)), len(examples.rows)
        order = np.arange(num_units)[::-1]  # the end of the text
    else:
        order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(num_units)
    if num_units < 2:
        raise DataError(
            f"{file.source} has a single row, so nothing can be held out of it; "
            "give data.eval, or set data.eval_fraction to 0"
        )
    count = min(max(1, round(num_units * fraction)), num_units - 1)
    is_held_out = np.isin(units, order[:count])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
