"""A run's data: read, tokenised, split into training rows and held-out rows, and fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loray.errors import DataError
from loray.recipes.sources import Copy, find_files
from loray.spec import DataSpec
from loray.train.data.corpus import Corpus, Runner, TemporaryCache, load_corpus, run_here
from loray.train.data.examples import Rows, TokenRows, pack_rows
from loray.train.data.plans import Share, pair_lengths
from loray.train.data.reading.files import DataFormat, RowFile
from loray.train.data.reading.known import open_known
from loray.train.data.reading.tokenising import Tokenisation
from loray.train.data.shards import ShardCache
from loray.train.data.splits import SAMPLE_STREAM, Part, check_texts, joined_texts, windows


@dataclass(frozen=True, slots=True)
class DataReport:
    """Statistics of the data. A row of preferences is a pair. Tokens are those of the training rows; targets are tokens
    with a label.
    """

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
    """Training rows, which are read from the cache of tokens, and held-out rows, which are few.

    `fingerprint` is the SHA-256 of the training file; of several files, and with evaluation files, that of their hex
    digests. `is_joined`: rows are texts joined by the end-of-sequence token. `is_paired`: rows 2i and 2i + 1 are a
    pair, the chosen answer before the rejected one. `shares`: of the sources, where they have weights. `cache` has the
    tokens of training rows.
    """

    train: Rows
    evaluation: TokenRows
    max_length: int
    fingerprint: str
    report: DataReport
    is_joined: bool = False
    is_paired: bool = False
    shares: tuple[Share, ...] = ()
    cache: ShardCache | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each training row; of a pair those of both answers, padded to the longer one."""
        return pair_lengths(self.train.lengths) if self.is_paired else self.train.lengths

    @property
    def length_counts(self) -> dict[int, int]:
        """How many sequences of the training rows have a number of tokens."""
        counts = np.bincount(self.train.lengths)
        return {int(length): int(counts[length]) for length in np.flatnonzero(counts)}


def load_data(
    spec: DataSpec,
    tokenizer: Any,
    *,
    max_length: int,
    max_eval_rows: int,
    seed: int,
    joined: bool | None = False,
    whole_windows: bool = False,
    paired: bool = False,
    fetched: Mapping[str, Copy] = MappingProxyType({}),
    cache: ShardCache | None = None,
    run: Runner = run_here,
) -> Dataset:
    """Read and tokenise `spec.train` (and `spec.eval`). Raises DataError.

    Without `spec.eval`, `eval_fraction` of the documents is held out, the same ones for the same seed; of a single text
    its last rows are held out. At most `max_eval_rows` rows are kept for evaluation, drawn by the seed.
    joined         join texts and cut them at `max_length`, see `loray.train.data.joined`; None: where the data is texts
    whole_windows  hold out only rows of exactly `max_length` tokens, where there are any
    paired         rows are preference pairs; one is left out where an answer is cut away, or where both are equal
    fetched        copies on this machine of remote sources
    cache          where tokens stay for other runs, and are read from; None: until nobody has the result any more
    run            tokenises what the cache lacks
    """
    cache = cache or TemporaryCache()
    train_files, eval_files = (
        [_open(source.path, spec, fetched, cache, paired) for source in sources]
        for sources in (spec.train_sources, spec.eval_sources)
    )
    files = [file for source in (*train_files, *eval_files) for file in source]
    is_joined = joined if joined is not None else all(file.format == "text" for file in files)
    if is_joined:
        check_texts(files)
    tokenisation = Tokenisation(tokenizer, joined=is_joined)
    train_corpus = load_corpus(train_files, spec.max_rows, tokenisation, cache, run)
    eval_corpus = load_corpus(eval_files, None, tokenisation, cache, run) if eval_files else None
    rows_of = joined_texts if is_joined else windows
    trained, held_out, num_documents = rows_of(
        train_files, train_corpus, eval_corpus, max_length, spec.eval_fraction, seed
    )

    each = 2 if paired else 1  # sequences of a row
    usable, measured = (_usable_pairs(p) if paired else np.flatnonzero(p.num_targets > 0) for p in (trained, held_out))
    for sources, rows in ((spec.train_sources, usable), (spec.eval_sources, measured)):
        if sources and not len(rows):
            named = ", ".join(source.path for source in sources)
            raise DataError(f"no row of {named} has a token to learn within {max_length} tokens; raise data.max_length")
    if whole_windows and not paired:
        whole = measured[held_out.rows.lengths[measured] == max_length]
        measured = whole if len(whole) else measured
    if len(measured) > max_eval_rows:
        drawn = np.random.default_rng([seed, SAMPLE_STREAM]).choice(len(measured), max_eval_rows, replace=False)
        measured = measured[np.sort(drawn)]

    kept = _sequences(usable, each)
    train = trained.rows.select(kept)
    report = DataReport(
        format=next((file.format for file in files if file.format != "text"), "text"),
        num_documents=num_documents,
        num_rows=len(usable),
        num_eval_rows=len(measured),
        num_tokens=int(train.lengths.sum()),
        num_targets=int(trained.num_targets[kept].sum()),
        num_truncated=int(trained.truncated[kept].reshape(-1, each).any(1).sum()),
        num_without_targets=len(trained.rows) // each - len(usable),
    )
    # A copy, of these rows alone.
    evaluation = pack_rows([held_out.rows.row(int(i)) for i in _sequences(measured, each)])
    weights = [source.weight for source in spec.train_sources]
    counts = np.bincount(trained.sources[each * usable], minlength=len(weights)).tolist()
    shares = tuple(map(Share, counts, weights)) if set(weights) != {1.0} else ()
    fingerprint = _fingerprint(train_corpus, eval_corpus)
    return Dataset(train, evaluation, max_length, fingerprint, report, is_joined, paired, shares, cache)


def _usable_pairs(part: Part) -> NDArray[np.int64]:
    """Pairs of which both answers have a target, and which differ as far as they go."""
    usable = np.flatnonzero((part.num_targets.reshape(-1, 2) > 0).all(1))
    both_cut = np.flatnonzero(part.truncated.reshape(-1, 2).all(1))
    equal = [i for i in both_cut.tolist() if np.array_equal(part.rows.row(2 * i)[0], part.rows.row(2 * i + 1)[0])]
    return np.setdiff1d(usable, np.array(equal, np.int64))


def _sequences(rows: NDArray[np.int64], each: int) -> NDArray[np.int64]:
    return (each * rows[:, None] + np.arange(each)).ravel()


def _open(
    path: str, spec: DataSpec, fetched: Mapping[str, Copy], cache: ShardCache, paired: bool
) -> tuple[RowFile, ...]:
    """The files of one source."""
    return tuple(open_known(file, spec.format, cache, paired=paired) for file in find_files(path, fetched.get(path)))


def _fingerprint(train: Corpus, evaluation: Corpus | None) -> str:
    """Of a single file its SHA-256, of several that of their SHA-256s."""
    return _digest([_digest(corpus.sha256s) for corpus in (train, evaluation) if corpus is not None])


def _digest(digests: Sequence[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(f"{d}\n" for d in digests).encode()).hexdigest()
