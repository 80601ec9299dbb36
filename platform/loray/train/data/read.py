"""Rows of files of all kinds, and files cut into parts of a few megabytes.

A source is a path, or a URI that pyarrow supports (`file://`, `s3://`), or a local copy of one. Every failure is a
DataError that names the source and the wrong line or row.

Parts are tokenised one by one. A file is cut at the same places under the same digests whenever it is read, and reading
it for that parses nothing but JSON arrays. A part of JSONL, a JSON array or CSV is named by its bytes, so that rows
added at a file's end leave the parts before them as they are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as papq

from loray.errors import DataError
from loray.recipes.sources import ARROW, SourceFiles, without_options
from loray.spec import DataFormat, DataSpec, SftSpec
from loray.train.data.formats import FORMATS, Column, Formats, columns_of, detect

FileKind = Literal["jsonl", "json", "csv", "parquet", "arrow"]
_CSV = (".csv", ".tsv")
_BEGINNING = 1 << 12  # bytes that tell a file's kind
_DELIMITERS = ",;\t"  # of CSV: the one that the header has most of

csv.field_size_limit(sys.maxsize)  # a field may be a document


class Head(NamedTuple):
    """The kind of a file, and the columns of its rows: of all, or of JSON those of the first."""

    kind: FileKind
    names: tuple[str, ...]


class RowFile(NamedTuple):
    """A file of rows. `columns` are those that its format reads, of which every row has `needed`."""

    source: SourceFiles
    format: DataFormat
    kind: FileKind
    columns: tuple[Column, ...]
    needed: tuple[str, ...]

    @property
    def read(self) -> list[str]:
        """The columns' names in the file."""
        return [name for _, name in self.columns]


def read_head(source: SourceFiles) -> Head:
    """Read what a file begins with. Raises DataError."""
    kind = _kind(source)
    match kind:
        case "parquet":
            with open_parquet(source) as table:
                names = table.schema_arrow.names
        case "arrow":
            with open_arrow(source) as reader:
                names = reader.schema.names
        case "csv":
            with open_source(source) as file:
                names = _fields(source, _header(io.BufferedReader(file)))
        case "json":
            with open_source(source) as file:
                _, first, stop = next(_array(source, file), (None, 0, 0))
                file.seek(first)
                names = list(json.loads(file.read(stop - first) or b"{}"))
        case "jsonl":
            names = _first_names(source)
    if not names and kind in ("csv", "json"):
        raise DataError(f"{source} has no rows; give a file with at least one")
    return Head(kind, tuple(names))


def rows_of(source: SourceFiles, head: Head, spec: DataSpec, formats: Formats = SftSpec.formats) -> RowFile:
    """Find the rows of the source that begins with `head`, as a recipe's data says, in one of `formats`. Raises
    DataError.
    """
    kind, names = head
    found = detect(source, names, spec, formats)
    columns = columns_of(found, names, spec, are_all=kind not in ("jsonl", "json"))
    return RowFile(source, found, kind, columns, FORMATS[found].columns)


def read_columns(name: str, path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read these columns, of any types, of all rows of a local file. Raises DataError."""
    source = SourceFiles(name, str(path))
    kind, names = read_head(source)
    if kind not in ("jsonl", "json") and (missing := [column for column in columns if column not in names]):
        raise DataError(f"{source} has no column {missing[0]!r} but {', '.join(names) or 'none'}")
    file = RowFile(source, "text", kind, tuple((column, column) for column in columns), tuple(columns))
    records = []
    for part, content in read_parts(cut(file).parts):
        try:
            records += [record for _, record in records_of(content)]
        except BadRow as e:
            raise located(e, part) from e
    return records


def read_text(name: str, path: Path) -> str:
    """Read the text of a local file. Raises DataError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{name} is not UTF-8: {e}; write it as UTF-8") from e


def record_of(line: bytes, *, unreadable: str | None = None) -> dict[str, Any]:
    """Parse the object in a line of JSONL. Raises ValueError; `unreadable` begins its message for what is not JSON."""
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as e:
        if unreadable is None and isinstance(e, UnicodeDecodeError):
            raise ValueError(f"not UTF-8: {e}; write the file as UTF-8") from e
        raise ValueError(f"{unreadable or 'not valid JSON'}: {e}") from e
    if not isinstance(record, dict):
        raise ValueError(f"a row must be an object, not {type(record).__name__}")
    return record


def open_source(source: SourceFiles) -> Any:
    """Open a pyarrow file. Use it in a `with` block."""
    source.fetched()
    try:
        if "://" in source.path:
            filesystem, path = pafs.FileSystem.from_uri(source.path)
        else:
            filesystem, path = pafs.LocalFileSystem(), source.path
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            raise DataError(f"data file {source} does not exist; relative paths start at the recipe's folder")
        if kind == pafs.FileType.Directory:
            raise DataError(f"{source} is a folder; name a local one, one on s3://, or its files")
        return filesystem.open_input_file(path)
    except (OSError, ValueError, pa.ArrowException) as e:
        raise DataError(f"cannot open data file {source}: {e}") from e


def _kind(source: SourceFiles) -> FileKind:
    if source.path.endswith(ARROW):
        return "arrow"
    if PurePosixPath(without_options(source.name)).suffix.lower() in _CSV:
        return "csv"
    with open_source(source) as file:
        begins = file.read(_BEGINNING)
    if begins.startswith(b"PAR1"):
        return "parquet"
    return "json" if begins.removeprefix(_MARK).lstrip().startswith(b"[") else "jsonl"


@contextmanager
def open_arrow(source: SourceFiles) -> Iterator[Any]:
    """Open the stream of batches that `datasets` writes a shard as."""
    try:
        with open_source(source) as file, pa.ipc.open_stream(file) as reader:
            yield reader
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{source} is not a readable Arrow file: {e}") from e


@contextmanager
def open_parquet(source: SourceFiles) -> Iterator[Any]:
    """Open a ParquetFile."""
    try:
        with open_source(source) as file:
            yield papq.ParquetFile(file)
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{source} is not a readable Parquet file: {e}") from e


def _first_names(source: SourceFiles) -> list[str]:
    with open_source(source) as file:
        for number, line in enumerate(io.BufferedReader(file), start=1):
            if line.strip():
                try:
                    return list(record_of(line, unreadable="neither JSON, Parquet nor named .csv or .tsv"))
                except ValueError as e:
                    raise DataError(f"{source}, line {number}: {e}") from e
    raise DataError(f"{source} is empty; give a file with at least one row")


# -- parts ------------------------------------------------------------------------------------------------------------

PART_BYTES = 8 << 20  # more where a single row is longer
_BATCH_ROWS = 256  # of a Parquet file that are decoded at once


class FilePart(NamedTuple):
    """[first, stop) of a file: bytes of JSONL, else rows. `digest` names the content."""

    file: RowFile
    digest: str
    first: int
    stop: int


class CutFile(NamedTuple):
    """`sha256` is that of the whole file. `num_rows` of its parts is counted where a limit was given."""

    sha256: str
    parts: tuple[FilePart, ...]
    num_rows: int | None


class Content(NamedTuple):
    """The rows of a part, as they are sent to who tokenises them: lines of JSONL, a JSON array, CSV behind its header,
    or else an Arrow stream. `columns` and `needed` are the file's.
    """

    format: DataFormat
    kind: FileKind
    columns: tuple[Column, ...]
    needed: tuple[str, ...]
    data: bytes


class BadRow(Exception):
    """A row of a part is wrong: line `index` of JSONL and CSV, else row `index`, from 0."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason


def cut(file: RowFile, max_rows: int | None = None) -> CutFile:
    """Cut all rows, or the first `max_rows`, into parts. Raises DataError."""
    cuts = {"jsonl": _cut_lines, "csv": _cut_lines, "json": _cut_array}
    found = cuts.get(file.kind, _cut_rows)(file, max_rows)
    if not found.parts and max_rows != 0:
        raise DataError(f"{file.source} has no rows; give a file with at least one")
    return found


def read_parts(parts: Sequence[FilePart]) -> Iterator[tuple[FilePart, Content]]:
    """Read the content of parts of one file, which are in order."""
    if not parts:
        return
    file = parts[0].file

    def content(data: bytes) -> Content:
        return Content(file.format, file.kind, file.columns, file.needed, data)

    if file.kind in ("jsonl", "csv", "json"):
        with open_source(file.source) as opened:
            header = _header(io.BufferedReader(opened)) if file.kind == "csv" else b""
        with open_source(file.source) as opened:
            for part in parts:
                opened.seek(part.first)
                data = opened.read(part.stop - part.first)
                yield part, content(b"[%b]" % data if file.kind == "json" else header + data)
        return
    tables = _arrow_tables(file) if file.kind == "arrow" else _parquet_tables(file, parts)
    for part, table in _slices(tables, parts):
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        yield part, content(sink.getvalue())


def records_of(content: Content) -> list[tuple[int, dict[str, Any]]]:
    """Parse all rows into (index as in BadRow, row with the columns' names here). Raises BadRow for the first that is
    malformed.
    """
    match content.kind:
        case "jsonl":
            found = list(_parsed(content.data))
        case "json":
            found = _parsed_array(content.data)
        case "csv":
            found = list(_parsed_csv(content.data))
        case _:
            try:
                found = list(enumerate(pa.ipc.open_stream(content.data).read_all().to_pylist()))
            except UnicodeDecodeError as e:  # pyarrow does not check it when it reads
                raise BadRow(0, f"holds text that is not UTF-8: {e}; write it as UTF-8") from e
    records = []
    for index, row in found:
        record = {ours: row[theirs] for ours, theirs in content.columns if theirs in row}
        if missing := [column for column in content.needed if column not in record]:
            raise BadRow(
                index,
                f"the row has no `{missing[0]}` but {', '.join(row) or 'nothing'}: all rows of a file have one format, "
                f"here {' and '.join(f'`{column}`' for column in content.needed)}; put others into a file of their own",
            )
        records.append((index, record))
    return records


def place(part: FilePart, index: int) -> str:
    """Name the place of a row in its file, for people."""
    source, before = part.file.source, 0
    if part.file.kind in ("parquet", "arrow"):
        return f"{source}, row {part.first + index + 1}"
    with open_source(source) as opened:
        if part.file.kind == "json":
            before = sum(1 for _, first, _ in _array(source, opened) if first < part.first)
            return f"{source}, row {before + index + 1}"
        while (left := part.first - opened.tell()) > 0:
            before += opened.read(min(left, PART_BYTES)).count(b"\n")
    return f"{source}, line {before + index + 1}"


def located(error: BadRow, part: FilePart) -> DataError:
    """Say where the row is."""
    return DataError(f"{place(part, error.index)}: {error.reason}")


# -- lines ------------------------------------------------------------------------------------------------------------


def _cut_lines(file: RowFile, max_rows: int | None) -> CutFile:
    whole, parts, num_rows = hashlib.sha256(), list[FilePart](), 0
    with open_source(file.source) as opened:
        buffered = io.BufferedReader(opened)
        header = _header(buffered) if file.kind == "csv" else b""
        whole.update(header)
        at = len(header)
        for block in _blocks(buffered, is_csv=file.kind == "csv"):
            whole.update(block)
            taken, count = block, 0
            if max_rows is not None:
                try:
                    taken, count = _first_rows(block, max_rows - num_rows, header)
                except BadRow as e:
                    raise DataError(f"{file.source}: {e.reason}") from e
            if taken.strip():
                parts.append(FilePart(file, hashlib.sha256(header + taken).hexdigest(), at, at + len(taken)))
            num_rows += count
            at += len(block)
    return CutFile(whole.hexdigest(), tuple(parts), None if max_rows is None else num_rows)


def _blocks(file: io.BufferedReader, *, is_csv: bool) -> Iterator[bytes]:
    """The file in whole rows. Where it is cut depends on nothing that comes later."""
    pieces: list[bytes] = []
    is_quoted = False  # what follows the pieces
    while data := file.read(PART_BYTES):
        end = _end_of_csv(data, is_quoted) if is_csv else data.rfind(b"\n") + 1
        if end:
            yield b"".join([*pieces, data[:end]])
            pieces, is_quoted = [], False
        pieces.append(data[end:])
        is_quoted ^= bool(data.count(b'"', end) & 1)
    if last := b"".join(pieces):
        yield last


def _first_rows(block: bytes, count: int, header: bytes) -> tuple[bytes, int]:
    """Cut a block behind its row `count`, where blank lines do not count. Returns it and how many rows it has. With a
    `header` it is CSV, else JSONL. Raises BadRow.
    """
    lines, taken, rows = block.split(b"\n"), list[bytes](), 0
    if header:
        given = islice(_rows_of_csv(header + block), 1, count + 1)
        ends = [end - header.count(b"\n") for _, end, _ in given]
        return (b"\n".join([*lines[: ends[-1]], b""]) if ends else b""), len(ends)
    for line in lines:
        if rows == count:
            break
        taken.append(line)
        rows += bool(line.strip())
    return b"\n".join(taken), rows


def _parsed(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, line in enumerate(data.split(b"\n")):
        if line.strip():
            try:
                yield index, record_of(line)
            except ValueError as e:
                raise BadRow(index, str(e)) from e


# -- CSV --------------------------------------------------------------------------------------------------------------

_MARK = b"\xef\xbb\xbf"  # Excel begins its UTF-8 with it


def _header(file: io.BufferedReader) -> bytes:
    """The first row that is not blank, with what is before it."""
    header = b""
    while line := file.readline():
        header += line
        if header.removeprefix(_MARK).strip() and header.count(b'"') % 2 == 0:
            break
    return header


def _fields(source: object, header: bytes) -> list[str]:
    try:
        return next((row for *_, row in _rows_of_csv(header)), [])
    except BadRow as e:
        raise DataError(f"{source}, line {e.index + 1}: {e.reason}") from e


def _end_of_csv(data: bytes, is_quoted: bool) -> int:
    """Behind the last line end of `data` that is in no quotes, where it begins in quotes or not; 0 where there is none.

    Quotes in quotes are doubled, so that an even number of them is before such a line end.
    """
    is_open, end = is_quoted ^ bool(data.count(b'"') & 1), len(data)
    while (at := data.rfind(b"\n", 0, end)) >= 0:
        is_open ^= bool(data.count(b'"', at, end) & 1)
        if not is_open:
            return at + 1
        end = at
    return 0


def _rows_of_csv(data: bytes) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, line behind it, fields) of rows that are not blank, the header among them. Raises BadRow."""
    try:
        text = data.removeprefix(_MARK).decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadRow(data.count(b"\n", 0, e.start), f"not UTF-8: {e}; write the file as UTF-8") from e
    header, at = text.lstrip().partition("\n")[0], 0
    lines = io.StringIO(text, newline="\n")
    reader = csv.reader(lines, delimiter=max(_DELIMITERS, key=header.count), strict=True)
    try:
        for row in reader:
            if row:
                yield at, reader.line_num, row
            at = reader.line_num
    except csv.Error as e:
        raise BadRow(at, f"not valid CSV: {e}") from e


def _parsed_csv(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The index counts lines behind the header."""
    header = 1
    try:
        rows = _rows_of_csv(data)
        _, header, names = next(rows)
        for first, _, row in rows:
            if len(row) != len(names):
                raise BadRow(
                    first,
                    f"the row has {len(row)} fields and the header {len(names)}: write fields that hold line ends, "
                    "quotes or the delimiter in quotes",
                )
            yield first - header, dict(zip(names, row, strict=True))
    except BadRow as e:
        raise BadRow(e.index - header, e.reason) from e


# -- JSON arrays ------------------------------------------------------------------------------------------------------


def _array(source: SourceFiles, file: Any) -> Iterator[tuple[dict[str, Any], int, int]]:
    """(object, start, stop) of the objects of an array, in bytes. Raises DataError.

    Bytes are parsed as Latin-1, of which each is a character: JSON is known by its ASCII, so places are right, and
    texts are not.
    """
    decoder, number = json.JSONDecoder(), 0
    text, before = file.read(max(PART_BYTES, _BEGINNING)).decode("latin-1"), 0
    at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        problem = "the array does not end: is the file whole?"
        if at < len(text):
            if text[at] == "]":
                return
            try:
                record, stop = decoder.raw_decode(text, at)
            except ValueError as e:
                problem = f"not valid JSON: {getattr(e, 'msg', e)}"
            else:
                number += 1
                if not isinstance(record, dict):
                    raise DataError(f"{source}, row {number}: a row must be an object, not {type(record).__name__}")
                yield record, before + at, before + stop
                at = stop
                continue
        more = file.read(max(PART_BYTES, len(text) - at)).decode("latin-1")
        if not more:
            raise DataError(f"{source}, row {number + 1}: {problem}")
        text, before, at = text[at:] + more, before + at, 0


def _cut_array(file: RowFile, max_rows: int | None) -> CutFile:
    ranges, filled = list[tuple[int, int]](), True
    num_rows = 0
    with open_source(file.source) as opened:
        for _, first, stop in _array(file.source, opened):
            if num_rows == max_rows:
                break
            if filled:
                ranges.append((first, stop))
            else:
                ranges[-1] = ranges[-1][0], stop
            filled = ranges[-1][1] - ranges[-1][0] >= PART_BYTES
            num_rows += 1
    whole, parts = hashlib.sha256(), list[FilePart]()
    with open_source(file.source) as opened:
        while block := opened.read(PART_BYTES):
            whole.update(block)
        for first, stop in ranges:
            opened.seek(first)
            parts.append(FilePart(file, hashlib.sha256(opened.read(stop - first)).hexdigest(), first, stop))
    return CutFile(whole.hexdigest(), tuple(parts), num_rows)


def _parsed_array(data: bytes) -> list[tuple[int, dict[str, Any]]]:
    try:
        return list(enumerate(json.loads(data.decode("utf-8"))))
    except UnicodeDecodeError as e:
        raise BadRow(0, f"holds text that is not UTF-8: {e}; write the file as UTF-8") from e
    except ValueError as e:
        raise BadRow(0, f"not valid JSON: {e}") from e


# -- tables -----------------------------------------------------------------------------------------------------------


def _cut_rows(file: RowFile, max_rows: int | None) -> CutFile:
    digest = hashlib.sha256()
    with open_source(file.source) as opened:
        while block := opened.read(PART_BYTES):
            digest.update(block)
    sha256, parts = digest.hexdigest(), list[FilePart]()
    pieces: Iterator[tuple[int, int]]
    if file.kind == "arrow":
        pieces = ((table.num_rows, table.nbytes) for _, table in _arrow_tables(file))
    else:
        pieces = _parquet_pieces(file)
    for first, stop in _ranges(pieces):
        stop = stop if max_rows is None else min(stop, max_rows)
        if first < stop:
            name = json.dumps([sha256, first, stop, file.columns])
            parts.append(FilePart(file, hashlib.sha256(name.encode()).hexdigest(), first, stop))
    return CutFile(sha256, tuple(parts), parts[-1].stop if parts else 0)


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
            read = [c for c in columns if c.path_in_schema.split(".")[0] in file.read]
            yield group.num_rows, sum(c.total_uncompressed_size for c in read)


def _arrow_tables(file: RowFile) -> Iterator[tuple[int, Any]]:
    """(number of its first row, table)."""
    at = 0
    with open_arrow(file.source) as reader:
        for batch in reader:
            yield at, pa.Table.from_batches([batch]).select(file.read)
            at += batch.num_rows


def _parquet_tables(file: RowFile, parts: Sequence[FilePart]) -> Iterator[tuple[int, Any]]:
    """The same, of those row groups that hold rows of the parts."""
    at = 0
    with open_parquet(file.source) as table:
        for g in range(table.metadata.num_row_groups):
            stop = at + table.metadata.row_group(g).num_rows
            if any(part.first < stop and at < part.stop for part in parts):
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[g], columns=file.read):
                    yield at, pa.Table.from_batches([batch])
                    at += batch.num_rows
            at = stop


def _slices(tables: Iterator[tuple[int, Any]], parts: Sequence[FilePart]) -> Iterator[tuple[FilePart, Any]]:
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
