"""Files cut into parts of a few megabytes, which are tokenised one by one.

A file is cut at the same places under the same digests whenever it is read, and reading it for that parses nothing. A
part of JSONL is named by its bytes, so that lines added at a file's end leave the parts before them as they are.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from loray.errors import DataError
from loray.train.data.reading.files import (
    DataFormat,
    RowFile,
    open_arrow,
    open_parquet,
    open_source,
    problem,
    record_of,
)

PART_BYTES = 8 << 20  # more where a single row is longer
_BATCH_ROWS = 256  # of a Parquet file that are decoded at once


class Part(NamedTuple):
    """[first, stop) of a file: bytes of JSONL, else rows. `digest` names the content."""

    file: RowFile
    digest: str
    first: int
    stop: int


class CutFile(NamedTuple):
    """`sha256` is that of the whole file. `num_rows` of its parts is counted where a limit was given."""

    sha256: str
    parts: tuple[Part, ...]
    num_rows: int | None


class Content(NamedTuple):
    """The rows of a part, as they are sent to who tokenises them: lines of JSONL, or an Arrow stream."""

    format: DataFormat
    is_lines: bool
    data: bytes


class BadRow(Exception):
    """A row of a part is wrong: line `index` of JSONL, else row `index`, from 0."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason


def cut(file: RowFile, max_rows: int | None = None) -> CutFile:
    """All rows, or the first `max_rows`, in parts. Raises DataError."""
    found = _cut_lines(file, max_rows) if file.kind == "jsonl" else _cut_rows(file, max_rows)
    if not found.parts and max_rows != 0:
        raise DataError(f"{file.source} has no rows; give a file with at least one")
    return found


def read_parts(parts: Sequence[Part]) -> Iterator[tuple[Part, Content]]:
    """The content of parts of one file, which are in order."""
    if not parts:
        return
    file = parts[0].file
    if file.kind == "jsonl":
        with open_source(file.source) as opened:
            for part in parts:
                opened.seek(part.first)
                yield part, Content(file.format, True, opened.read(part.stop - part.first))
        return
    tables = _arrow_tables(file) if file.kind == "arrow" else _parquet_tables(file, parts)
    for part, table in _slices(tables, parts):
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        yield part, Content(file.format, False, sink.getvalue())


def records_of(content: Content) -> list[tuple[int, dict[str, Any]]]:
    """(index as in BadRow, row) of all rows. Raises BadRow for the first that is malformed."""
    found = list(_parsed(content.data)) if content.is_lines else _decoded(content.data)
    for index, record in found:
        if wrong := problem(record, content.format):
            raise BadRow(index, wrong)
    return found


def place(part: Part, index: int) -> str:
    """Where a row is in its file, for people."""
    if part.file.kind != "jsonl":
        return f"{part.file.source}, row {part.first + index + 1}"
    before = 0
    with open_source(part.file.source) as opened:
        while (left := part.first - opened.tell()) > 0:
            before += opened.read(min(left, PART_BYTES)).count(b"\n")
    return f"{part.file.source}, line {before + index + 1}"


# -- lines ------------------------------------------------------------------------------------------------------------


def _cut_lines(file: RowFile, max_rows: int | None) -> CutFile:
    whole, parts, at, num_rows = hashlib.sha256(), list[Part](), 0, 0
    with open_source(file.source) as opened:
        for block in _blocks(opened):
            whole.update(block)
            taken = block if max_rows is None else _first_lines(block, max_rows - num_rows)
            if taken.strip():
                parts.append(Part(file, hashlib.sha256(taken).hexdigest(), at, at + len(taken)))
            if max_rows is not None:
                num_rows += sum(1 for line in taken.split(b"\n") if line.strip())
            at += len(block)
    return CutFile(whole.hexdigest(), tuple(parts), None if max_rows is None else num_rows)


def _blocks(file: Any) -> Iterator[bytes]:
    """The file in whole lines. Where it is cut depends on nothing that comes later."""
    pieces: list[bytes] = []
    while data := file.read(PART_BYTES):
        end = data.rfind(b"\n") + 1
        if end:
            yield b"".join([*pieces, data[:end]])
            pieces = []
        pieces.append(data[end:])
    if last := b"".join(pieces):
        yield last


def _first_lines(block: bytes, count: int) -> bytes:
    """Up to the end of its line `count`, where blank lines do not count."""
    taken = list[bytes]()
    for line in block.split(b"\n"):
        if count == 0:
            break
        taken.append(line)
        count -= bool(line.strip())
    return b"\n".join(taken)


def _parsed(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, line in enumerate(data.split(b"\n")):
        if line.strip():
            try:
                yield index, record_of(line)
            except ValueError as e:
                raise BadRow(index, str(e)) from e


# -- tables -----------------------------------------------------------------------------------------------------------


def _cut_rows(file: RowFile, max_rows: int | None) -> CutFile:
    with open_source(file.source) as opened:
        sha256 = _sha256(opened)
    pieces = _arrow_pieces(file) if file.kind == "arrow" else _parquet_pieces(file)
    parts = list[Part]()
    for first, stop in _ranges(pieces):
        stop = stop if max_rows is None else min(stop, max_rows)
        if first < stop:
            name = json.dumps([sha256, first, stop, file.columns])
            parts.append(Part(file, hashlib.sha256(name.encode()).hexdigest(), first, stop))
    return CutFile(sha256, tuple(parts), parts[-1].stop if parts else 0)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(PART_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _ranges(pieces: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """[first, stop) rows of parts, from (rows, bytes) of what follows each other."""
    first = stop = filled = 0
    for num_rows, num_bytes in pieces:
        count = max(1, -(-num_bytes // PART_BYTES))
        for i in range(count):  # a piece that is larger than a part is cut into equal ones
            rows = num_rows * (i + 1) // count - num_rows * i // count
            if rows and filled and filled + num_bytes // count > PART_BYTES:
                yield first, stop
                first, filled = stop, 0
            stop, filled = stop + rows, filled + num_bytes // count
    if first < stop:
        yield first, stop


def _parquet_pieces(file: RowFile) -> Iterator[tuple[int, int]]:
    with open_parquet(file.source) as table:
        metadata = table.metadata
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            columns = (group.column(c) for c in range(group.num_columns))
            read = [c for c in columns if c.path_in_schema.split(".")[0] in file.columns]
            yield group.num_rows, sum(c.total_uncompressed_size for c in read)


def _arrow_pieces(file: RowFile) -> Iterator[tuple[int, int]]:
    for _, table in _arrow_tables(file):
        yield table.num_rows, table.nbytes


def _arrow_tables(file: RowFile) -> Iterator[tuple[int, Any]]:
    """(number of its first row, table)."""
    at = 0
    with open_arrow(file.source) as reader:
        for batch in reader:
            yield at, pa.Table.from_batches([batch]).select(file.columns)
            at += batch.num_rows


def _parquet_tables(file: RowFile, parts: Sequence[Part]) -> Iterator[tuple[int, Any]]:
    """As above, of those row groups that hold rows of the parts."""
    at = 0
    with open_parquet(file.source) as table:
        for g in range(table.metadata.num_row_groups):
            stop = at + table.metadata.row_group(g).num_rows
            if any(part.first < stop and at < part.stop for part in parts):
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[g], columns=list(file.columns)):
                    yield at, pa.Table.from_batches([batch])
                    at += batch.num_rows
            at = stop


def _slices(tables: Iterator[tuple[int, Any]], parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
    """The rows of each part, out of tables in order."""
    left, held = iter(parts), list[Any]()
    part = next(left)
    for at, table in tables:
        stop = at + table.num_rows
        while part.first < stop:
            begin = max(part.first, at)
            held.append(table.slice(begin - at, min(part.stop, stop) - begin))
            if part.stop > stop:
                break
            yield part, pa.concat_tables(held)
            held, following = [], next(left, None)
            if following is None:
                return
            part = following


def _decoded(data: bytes) -> list[tuple[int, dict[str, Any]]]:
    try:
        return list(enumerate(pa.ipc.open_stream(data).read_all().to_pylist()))
    except UnicodeDecodeError as e:  # pyarrow does not check it when it reads
        raise BadRow(0, f"holds text that is not UTF-8: {e}; write it as UTF-8") from e
