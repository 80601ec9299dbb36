"""A run's data: read, tokenised, split into what is trained on and what is held out, counted, and fingerprinted."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from loray.errors import DataError
from loray.spec import DataSpec
from loray.train.data_files import DataFormat, Rows, read_rows
from loray.train.examples import Example, TokenRows, pack_rows, tokenize

_SPLIT_STREAM, _SAMPLE_STREAM = 1, 2  # keep the generators of one seed apart


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the files. Tokens are those of the training rows; targets are the tokens learned from."""

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
    """`fingerprint`: SHA-256 of the training file; where there is an evaluation file, of both files' hex digests."""

    train: TokenRows
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

    Without `spec.eval`, `eval_fraction` of the documents is held out, the same ones for the same seed; a single text
    gives its last windows instead. At most `max_eval_rows` rows are kept for evaluation, drawn by the seed.
    whole_windows  evaluate on windows of exactly `max_length` tokens where there are any: figures at one context length
    fetched        copies on this machine of sources that lie elsewhere
    """
    rows = read_rows(spec.train, spec.format, spec.max_rows, fetched=fetched.get(spec.train))
    examples = list(tokenize(rows, tokenizer, max_length))
    fingerprint = rows.sha256
    if spec.eval is not None:
        eval_rows = read_rows(spec.eval, spec.format, fetched=fetched.get(spec.eval))
        held_out = list(tokenize(eval_rows, tokenizer, max_length))
        fingerprint = hashlib.sha256(f"{rows.sha256}\n{eval_rows.sha256}\n".encode()).hexdigest()
    else:
        examples, held_out = _hold_out(rows, examples, spec.eval_fraction, seed)

    usable = [e for e in examples if any(e.targets[1:])]
    held_out = [e for e in held_out if any(e.targets[1:])]
    if not usable:
        raise DataError(
            f"no row of {spec.train} has a token to learn within {max_length} tokens; raise data.max_length"
        )
    if spec.eval is not None and not held_out:
        raise DataError(f"no row of {spec.eval} has a token to learn within {max_length} tokens; raise data.max_length")
    if whole_windows and any(len(e.ids) == max_length for e in held_out):
        held_out = [e for e in held_out if len(e.ids) == max_length]
    if len(held_out) > max_eval_rows:
        drawn = np.random.default_rng([seed, _SAMPLE_STREAM]).choice(len(held_out), max_eval_rows, replace=False)
        held_out = [held_out[i] for i in sorted(drawn)]

    train = pack_rows([(e.ids, e.targets) for e in usable])
    evaluation = pack_rows([(e.ids, e.targets) for e in held_out])
    report = DataReport(
        format=rows.format,
        num_documents=len(rows.records),
        num_rows=len(train),
        num_eval_rows=len(evaluation),
        num_tokens=len(train.ids_N),
        num_targets=train.num_targets,
        num_truncated=sum(e.truncated for e in usable),
        num_without_targets=len(examples) - len(usable),
    )
    return Dataset(train, evaluation, max_length, fingerprint, report)


def _hold_out(rows: Rows, examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held out), split by document: windows of a text never lie on both sides, unless it is the only one."""
    if fraction == 0:
        return examples, []
    by_document: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        by_document[example.document].append(example)
    units = list(by_document.values())
    if len(units) == 1 and rows.format == "text":
        units = [[e] for e in units[0]]
        order = np.arange(len(units))[::-1]  # the end of the text
    else:
        order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(len(units))
    if len(units) < 2:
        raise DataError(
            f"{rows.source} has a single row, so nothing can be held out of it; "
            "give data.eval, or set data.eval_fraction to 0"
        )
    count = min(max(1, round(len(units) * fraction)), len(units) - 1)
    chosen = {int(i) for i in order[:count]}
    train = [e for i, unit in enumerate(units) if i not in chosen for e in unit]
    return train, [e for i, unit in enumerate(units) if i in chosen for e in unit]
