"""A run's data: read, tokenised, split into training rows and held-out rows, and fingerprinted.

Rows are single documents, windows of one, or joined texts as in LongLoRA's paper (Chen et al., ICLR 2024): the ids of
`tokenizer(eos.join(texts))`, cut every N tokens. Positions run through such a row and attention crosses the joints, so
that every position of the context is trained, whatever the length of a text. The last row is shorter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loray.errors import DataError
from loray.recipes.sources import Copy, find_files
from loray.spec import DataFormat, DataSpec, SftSpec, TrainSpec
from loray.train.data.batches import (
    FIRST,
    BatchStream,
    Cursor,
    RowSource,
    ShareOut,
    SourceShare,
    TokenizedRows,
    UnpairedRows,
    compute_here,
    pack_rows,
    pair_lengths,
)
from loray.train.data.corpus import Corpus, Files, Indices, Runner, ShardTokens, TemporaryCache, load_corpus, run_here
from loray.train.data.formats import FORMATS, Formats
from loray.train.data.known import open_known
from loray.train.data.lessons import Lessons
from loray.train.data.read import RowFile
from loray.train.data.shards import FolderCache, let_go
from loray.train.data.tokenize import Tokenisation

_COUNTED_AT_ONCE = 1 << 22  # rows
_MANY_CUT = 0.05  # of the rows: more are warned of


class Cut(NamedTuple):
    """What rows lose at `max_length`: the share of the rows that are longer, the share of all tokens beyond it, and the
    length that keeps 99 % of the rows whole, in tokens.
    """

    rows: float
    tokens: float
    length_99: int

    @classmethod
    def of(cls, lengths_RS: NDArray[np.integer], max_length: int) -> Cut:
        """Row r has S sequences, one or two of a pair. One that is cut cuts the row."""
        if not lengths_RS.size:
            return cls(0.0, 0.0, 0)
        longest_R = lengths_RS.max(1)
        beyond = np.maximum(lengths_RS - max_length, 0).sum()
        length_99 = int(np.quantile(longest_R, 0.99, method="higher"))
        return cls(float((longest_R > max_length).mean()), float(beyond / max(1, lengths_RS.sum())), length_99)

    def warning(self, max_length: int) -> str | None:
        """What to do about rows that are cut, if they are many."""
        if self.rows <= _MANY_CUT:
            return None
        return (
            f"{self.rows:.0%} of the rows are longer than {max_length:,} tokens and lose their ends, {self.tokens:.0%} "
            f"of all tokens; data.max_length={self.length_99} keeps 99 % of the rows whole"
        )


@dataclass(frozen=True, slots=True)
class DataReport:
    """Statistics of the data. A row of preferences is a pair. Tokens are those of the training rows; targets are tokens
    with a label.

    rendering  how rows become tokens, and why
    cut        of all rows, before those without a target are left out
    """

    format: DataFormat
    rendering: str
    max_length: int
    num_documents: int
    num_rows: int
    num_eval_rows: int
    num_tokens: int
    num_targets: int
    num_truncated: int
    num_without_targets: int
    cut: Cut

    @property
    def warning(self) -> str | None:
        """What to do about rows that are cut, if they are many."""
        return self.cut.warning(self.max_length)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training rows, which are read from the cache of tokens, and held-out rows, which are few.

    `fingerprint` is the SHA-256 of the training file; of several files, and with evaluation files, that of their hex
    digests. `is_joined`: rows are texts joined by the end-of-sequence token. `is_paired`: rows 2i and 2i + 1 are a
    pair, the chosen answer before the rejected one. `shares`: of the sources, where they have weights. `cache`: where
    the tokens are, and what runs keep beside them. `lessons`: what a served teacher has said of training rows, and of
    held-out ones.
    """

    train: RowSource
    evaluation: TokenizedRows
    max_length: int
    fingerprint: str
    report: DataReport
    cache: FolderCache
    is_joined: bool = False
    is_paired: bool = False
    shares: tuple[SourceShare, ...] = ()
    lessons: tuple[Lessons, Lessons] | None = None

    def stream(
        self,
        spec: TrainSpec,
        *,
        cursor: Cursor = FIRST,
        rank: int = 0,
        size: int = 1,
        share_out: ShareOut = compute_here,
    ) -> BatchStream:
        """Make the micro-batches of a run for one of `size` data ranks."""
        return BatchStream(
            self.train,
            spec.batch,
            max_length=self.max_length,
            seed=spec.seed,
            cursor=cursor,
            per_step=spec.micro_batches_per_step,
            rank=rank,
            size=size,
            shares=self.shares,
            paired=self.is_paired,
            share_out=share_out,
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each training row; of a pair those of both answers, padded to the longer one."""
        return pair_lengths(self.train.lengths) if self.is_paired else self.train.lengths

    @property
    def length_counts(self) -> dict[int, int]:
        """Numbers of training sequences that are learned, by their numbers of tokens."""
        lengths, counts = self.train.lengths, np.zeros(self.max_length + 1, np.int64)
        each = 1 if self.train.desirable is None else 2
        for first in range(0, len(lengths), _COUNTED_AT_ONCE):
            counts += np.bincount(lengths[first : first + _COUNTED_AT_ONCE : each], minlength=len(counts))
            self.train.let_go()
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
    formats: Formats = SftSpec.formats,
    invocation: Sequence[int] | None = None,
    fetched: Mapping[str, Copy] = MappingProxyType({}),
    cache: FolderCache | None = None,
    run: Runner = run_here,
) -> Dataset:
    """Read and tokenise `spec.train` (and `spec.eval`). Raises DataError.

    Without `spec.eval`, `eval_fraction` of the documents is held out, the same ones for the same seed; of a single text
    its last rows are held out. At most `max_eval_rows` rows are kept for evaluation, drawn by the seed.
    joined         join texts and cut them at `max_length`, see `loray.train.data.rows`; None: where the data is texts
    whole_windows  hold out only rows of exactly `max_length` tokens, where there are any
    formats        of rows. A preference pair is left out where an answer is cut away, or where both are equal; answers
                   that are no pairs are `UnpairedRows`
    invocation     learn what follows these tokens alone, see Tokenisation; texts are cut off at `max_length`
    fetched        copies on this machine of remote sources
    cache          where tokens stay for other runs, and are read from; None: until nobody has the result any more
    run            tokenises what the cache lacks
    """
    cache = cache or TemporaryCache()
    train_files, eval_files = (
        [_open(source.path, spec, fetched, cache, formats) for source in sources]
        for sources in (spec.train_sources, spec.eval_sources)
    )
    files = [file for source in (*train_files, *eval_files) for file in source]
    is_joined = joined if joined is not None else all(file.format == "text" for file in files)
    if is_joined:
        check_texts(files)
    tokenisation = Tokenisation(
        tokenizer, joined=is_joined, raw=spec.format == "raw", system=spec.system, invocation=invocation
    )
    train_corpus = load_corpus(train_files, spec.max_rows, tokenisation, cache, run)
    eval_corpus = load_corpus(eval_files, None, tokenisation, cache, run) if eval_files else None
    rows_of = joined_texts if is_joined else windows
    trained, held_out = split(train_files, train_corpus, eval_corpus, max_length, spec.eval_fraction, seed, rows_of)

    paired = any(FORMATS[file.format].is_pair for file in files)
    single = any(FORMATS[file.format].is_desirable is not None for file in files)
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
    train: RowSource = trained.rows.select(kept).kept()
    report = DataReport(
        format=next((file.format for file in files if file.format != "text"), "text"),
        rendering=tokenisation.rendering([file.format for file in files]),
        max_length=max_length,
        num_documents=train_corpus.num_documents,
        num_rows=len(usable),
        num_eval_rows=len(measured),
        num_tokens=int(train.lengths.sum()),
        num_targets=int(trained.num_targets[kept].sum()),
        num_truncated=int(trained.truncated[kept].reshape(-1, each).any(1).sum()),
        num_without_targets=len(trained.rows) // each - len(usable),
        cut=Cut.of(trained.whole_lengths.reshape(-1, each), max_length),
    )
    # A copy, of these rows alone.
    evaluation = pack_rows([held_out.rows.row(int(i)) for i in _sequences(measured, each)])
    if single:
        desirable, num_targets = held_out.desirable[measured], held_out.num_targets[measured]
        unpaired = UnpairedRows.of(evaluation, num_targets, desirable, max_length)
        evaluation = pack_rows([unpaired.row(i) for i in range(len(unpaired))], desirable)
        train = UnpairedRows.of(train, trained.num_targets[kept], trained.desirable[kept], max_length)
    weights = [source.weight for source in spec.train_sources]
    counts = np.bincount(trained.sources[each * usable], minlength=len(weights)).tolist()
    shares = tuple(map(SourceShare, counts, weights)) if set(weights) != {1.0} else ()
    fingerprint = _digest([_digest(corpus.sha256s) for corpus in (train_corpus, eval_corpus) if corpus is not None])
    return Dataset(train, evaluation, max_length, fingerprint, report, cache, is_joined, paired or single, shares)


def _usable_pairs(part: SourceRows) -> NDArray[np.int64]:
    """Pairs of which both answers have a target, and which differ as far as they go."""
    usable = np.flatnonzero((part.num_targets.reshape(-1, 2) > 0).all(1))
    both_cut = np.flatnonzero(part.truncated.reshape(-1, 2).all(1))
    equal = [i for i in both_cut.tolist() if np.array_equal(part.rows.row(2 * i)[0], part.rows.row(2 * i + 1)[0])]
    return np.setdiff1d(usable, np.array(equal, np.int64))


def _sequences(rows: NDArray[np.int64], each: int) -> NDArray[np.int64]:
    return (each * rows[:, None] + np.arange(each)).ravel()


def _open(
    path: str, spec: DataSpec, fetched: Mapping[str, Copy], cache: FolderCache, formats: Formats
) -> tuple[RowFile, ...]:
    """The files of one source."""
    return tuple(open_known(file, spec, cache, formats) for file in find_files(path, fetched.get(path)))


def _digest(digests: Sequence[str]) -> str:
    """A single digest itself, or the SHA-256 of several."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(f"{d}\n" for d in digests).encode()).hexdigest()


# -- training rows and held-out rows ----------------------------------------------------------------------------------

SPLIT_STREAM, SAMPLE_STREAM = 1, 2  # different generators for one seed


class SourceRows(NamedTuple):
    """Rows to train on or to hold out; of each its source, its length before it was truncated, its number of targets,
    and false where it says that it is not desirable.
    """

    rows: StreamRows
    sources: NDArray[np.integer]
    whole_lengths: Indices
    num_targets: Indices
    desirable: NDArray[np.bool_]

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """True for rows that were."""
        return self.whole_lengths > self.rows.lengths

    def select(self, indices: Indices) -> SourceRows:
        rows, sources, whole_lengths, num_targets, desirable = self
        return SourceRows(
            rows.select(indices), sources[indices], whole_lengths[indices], num_targets[indices], desirable[indices]
        )


def num_held_out(num_units: int, fraction: float) -> int:
    """How many of two units or more are held out."""
    return min(max(1, round(num_units * fraction)), num_units - 1)


def held_out_documents(num_documents: int, count: int, seed: int) -> Indices:
    """Draw the documents that are held out, in their order: the same ones for the same seed."""
    return np.sort(np.random.default_rng([seed, SPLIT_STREAM]).permutation(num_documents)[:count])


RowsOf = Callable[[Corpus, Indices, int], SourceRows]  # of (corpus, documents, max_length)


def split(
    files: Files,
    train: Corpus,
    evaluation: Corpus | None,
    max_length: int,
    fraction: float,
    seed: int,
    rows_of: RowsOf,
) -> tuple[SourceRows, SourceRows]:
    """Make the rows to train on, and those to hold out. What becomes of one document is on one side, but for a single
    text, whose last rows are held out.
    """

    def some_held_out(num_units: int) -> int:
        if num_units < 2:
            raise DataError(
                f"{files[0][0].source} has a single row, so nothing can be held out of it; "
                "give data.eval, or set data.eval_fraction to 0"
            )
        return num_held_out(num_units, fraction)

    documents = np.arange(train.num_documents)
    if evaluation is not None:
        held_out = rows_of(evaluation, np.arange(evaluation.num_documents), max_length)
        return rows_of(train, documents, max_length), held_out
    if fraction == 0:
        return rows_of(train, documents, max_length), rows_of(train, documents[:0], max_length)
    if len(documents) == 1 and train.is_text_E[0]:
        whole = rows_of(train, documents, max_length)
        numbers = np.arange(len(whole.rows))
        count = some_held_out(len(numbers))
        return whole.select(numbers[:-count]), whole.select(numbers[-count:])
    chosen = held_out_documents(len(documents), some_held_out(len(documents)), seed)
    trained = np.setdiff1d(documents, chosen)
    return rows_of(train, trained, max_length), rows_of(train, chosen, max_length)


def windows(corpus: Corpus, documents: Indices, max_length: int) -> SourceRows:
    """Make a row of every example of these documents, cut off at `max_length` tokens, and of a text all its windows."""
    examples = np.flatnonzero(np.isin(corpus.documents_E, documents))
    counts = np.where(corpus.is_text_E[examples], -(-corpus.lengths_E[examples] // max_length), 1)
    example_R = np.repeat(examples, counts)
    number_R = np.arange(len(example_R)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the window
    left_R = corpus.lengths_E[example_R] - number_R * max_length
    lengths_R = np.minimum(left_R, max_length)
    is_text_R = corpus.is_text_E[example_R]
    return SourceRows(
        StreamRows.of(corpus.tokens, corpus.starts_E[example_R] + number_R * max_length, lengths_R),
        corpus.sources_E[example_R],
        np.where(is_text_R, lengths_R, left_R),
        np.where(is_text_R, lengths_R - 1, corpus.num_targets_within(max_length)[example_R]),
        corpus.desirable_E[example_R],
    )


def joined_texts(corpus: Corpus, documents: Indices, max_length: int) -> SourceRows:
    """Make rows of these documents, which are texts, joined, of each source for itself."""
    bounds = np.searchsorted(corpus.sources_E, np.arange(corpus.sources_E[-1] + 2))
    streams = [documents[slice(*np.searchsorted(documents, (a, b)))] for a, b in pairwise(bounds)]
    rows, sources = join(corpus.tokens, corpus.beginning, corpus.starts_E, corpus.lengths_E, streams, max_length)
    return SourceRows(rows, sources, rows.lengths, rows.lengths - 1, np.ones(len(rows), np.bool_))


def check_texts(files: Iterable[RowFile]) -> None:
    """Raise DataError where a file holds other rows than texts."""
    for file in files:
        if file.format != "text":
            raise DataError(
                f"{file.source} holds rows of format {file.format}, and batch.order concat joins texts: take shuffled, "
                "length_grouped or packed"
            )


# -- joined texts -----------------------------------------------------------------------------------------------------

_BEGINNING = -1  # the start of the piece that is no document
_HELD = 1 << 20  # rows whose columns stay in memory: a read maps megabytes around it


@dataclass(frozen=True, slots=True)
class StreamRows:
    """Row i is [starts[i], starts[i] + lengths[i]) of a stream, which is P pieces one after the other.

    Documents that follow each other in `tokens` are one piece: there are few, however many the documents.

    beginning  token ids before the first document of a source
    begins_P   where a piece begins in `tokens`
    ends_P     where it ends in the stream
    is_text    every token is a target
    columns    keys of `starts` and `lengths` in the cache of tokens, where they are kept
    """

    tokens: ShardTokens
    beginning: NDArray[np.int32]
    begins_P: Indices
    ends_P: Indices
    starts: Indices
    lengths: Indices
    is_text: bool
    columns: tuple[str, str] | None = None
    desirable: ClassVar[None] = None

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {field.name: getattr(self, field.name) for field in dataclass_fields(self)}
        if self.columns is not None:
            del fields["starts"], fields["lengths"]
        return _stream_rows, (fields,)

    def kept(self) -> StreamRows:
        """Keep the columns beside the shards, from where every process maps them: pickled rows have their names."""
        cache = self.tokens.cache
        columns = cache.put_column(self.starts), cache.put_column(self.lengths)
        starts, lengths = map(cache.column, columns)
        return replace(self, starts=starts, lengths=lengths, columns=columns)

    def let_go(self) -> None:
        for column in (self.starts, self.lengths):
            let_go(column)

    @classmethod
    def of(cls, tokens: ShardTokens, starts: Indices, lengths: Indices) -> StreamRows:
        """Make rows of the tokens as they are: they are the only piece."""
        whole = np.array([np.iinfo(np.int64).max])
        return cls(tokens, np.empty(0, np.int32), np.zeros(1, np.int64), whole, starts, lengths, is_text=False)

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Read the token ids of row i, and which of them are targets: never the first."""
        at, stop = int(self.starts[i]), int(self.starts[i] + self.lengths[i])
        if len(self.starts) > _HELD:
            self.let_go()
        num_tokens, piece = stop - at, int(np.searchsorted(self.ends_P, at, side="right"))
        ids, targets = [], []
        while at < stop:
            end = int(self.ends_P[piece])
            skipped = at - (int(self.ends_P[piece - 1]) if piece else 0)
            taken, begin = min(stop, end) - at, int(self.begins_P[piece])
            if begin == _BEGINNING:
                ids.append(self.beginning[skipped : skipped + taken])
            else:
                ids.append(self.tokens.ids(begin + skipped, begin + skipped + taken))
                if not self.is_text:
                    targets.append(self.tokens.targets(begin + skipped, begin + skipped + taken))
            at, piece = at + taken, piece + 1
        learned = np.concatenate(targets) if targets else np.ones(num_tokens, np.bool_)
        learned[:1] = False
        return np.concatenate(ids), learned

    def select(self, indices: Indices) -> StreamRows:
        """Select rows, without a copy of the tokens."""
        return replace(self, starts=self.starts[indices], lengths=self.lengths[indices], columns=None)


def _stream_rows(fields: Mapping[str, Any]) -> StreamRows:
    """Make rows, and map their columns where they are kept."""
    if (columns := fields["columns"]) is None:
        return StreamRows(**fields)
    starts, lengths = (fields["tokens"].cache.column(key) for key in columns)
    return StreamRows(**fields, starts=starts, lengths=lengths)


def join(
    tokens: ShardTokens,
    beginning: Sequence[int],
    begins_D: NDArray[np.int64],
    lengths_D: NDArray[np.int64],
    streams: Sequence[NDArray[np.int64]],
    row_length: int,
) -> tuple[StreamRows, Indices]:
    """Join the documents of each source's stream into rows of `row_length` tokens, those of one before those of the
    next. Returns them, and the source of each.

    Document d is [begins_D[d], begins_D[d] + lengths_D[d]) of `tokens`. It ends with the end-of-sequence token, which
    the last one of a stream loses. A stream has what the tokenizer puts before a text once.
    """
    begins, lengths, starts, stops, sources = [], [], [], [], []
    first = 0
    for source, chosen in enumerate(streams):
        if not len(chosen):
            continue
        at, size = begins_D[chosen], lengths_D[chosen]
        heads = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1] + size[:-1]]))
        begins += [np.array([_BEGINNING]), at[heads]]
        lengths += [np.array([len(beginning)]), np.add.reduceat(size, heads)]
        stop = first + len(beginning) + int(size.sum())
        firsts = np.arange(first, stop - 1, row_length, dtype=np.int64)
        starts.append(firsts)
        stops.append(np.minimum(firsts + row_length, stop - 1))
        sources.append(np.full(len(firsts), source, np.int64))
        first = stop
    starts_R = _concatenated(starts)
    rows = StreamRows(
        tokens,
        np.array(beginning, np.int32),
        _concatenated(begins),
        np.cumsum(_concatenated(lengths)),
        starts_R,
        _concatenated(stops) - starts_R,
        is_text=True,
    )
    return rows, _concatenated(sources)


def _concatenated(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
