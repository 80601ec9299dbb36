"""Rows of JSONL, Parquet and shards of saved data sets, and files cut into parts of a few megabytes.

A source is a path, or a URI that pyarrow supports (`file://`, `s3://`), or a local copy of one. Every failure is a
DataError that names the source and the wrong line or row.

Parts are tokenised one by one. A file is cut at the same places under the same digests whenever it is read, and reading
it for that parses nothing. A part of JSONL is named by its bytes, so that lines added at a file's end leave the parts
before them as they are.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as papq

from loray.errors import DataError
from loray.recipes.sources import ARROW, SourceFiles
from loray.spec import OBJECTIVES, SftSpec

FileKind = Literal["jsonl", "parquet", "arrow"]
DataFormat = Literal["chat", "prompt_completion", "text", "preference", "unpaired_preference"]

_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "label"),
}
Formats = frozenset[str]
_TOOLS = "tools"  # of chats, where the file has that column
_WITH_CHATS: tuple[DataFormat, ...] = ("chat", "preference")
READ_COLUMNS = frozenset({column for columns in _COLUMNS.values() for column in columns} | {_TOOLS})


class Head(NamedTuple):
    """The kind of a file, and the columns of its rows."""

    kind: FileKind
    names: tuple[str, ...]


class RowFile(NamedTuple):
    """A file of rows. `columns` are those that its format reads."""

    source: SourceFiles
    format: DataFormat
    kind: FileKind
    columns: tuple[str, ...]


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
        case "jsonl":
            names = _first_names(source)
    return Head(kind, tuple(names))


def rows_of(
    source: SourceFiles, head: Head, format: DataFormat | Literal["auto"] = "auto", formats: Formats = SftSpec.formats
) -> RowFile:
    """Find the rows of the source that begins with `head`: of one of `formats`. Raises DataError."""
    kind, names = head
    found = detect(source, names, format, formats)
    tools = (_TOOLS,) if found in _WITH_CHATS and _TOOLS in names else ()
    return RowFile(source, found, kind, _COLUMNS[found] + tools)


def read_columns(name: str, path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read these columns, of any types, of all rows of a local file. Raises DataError."""
    source = SourceFiles(name, str(path))
    kind = _kind(source)
    if kind == "parquet":
        with open_parquet(source) as table:
            _check_columns(str(source), table.schema_arrow.names, columns)
            records: list[dict[str, Any]] = table.read(columns=list(columns)).to_pylist()
        return records
    if kind == "arrow":
        with open_arrow(source) as reader:
            _check_columns(str(source), reader.schema.names, columns)
            return reader.read_all().select(list(columns)).to_pylist()  # type: ignore[no-any-return]
    records = []
    for number, line in _lines(source):
        record = _record(source, number, line)
        _check_columns(f"{source}, line {number}", list(record), columns)
        records.append({column: record[column] for column in columns})
    return records


def read_text(name: str, path: Path) -> str:
    """Read the text of a local file. Raises DataError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{name} is not UTF-8: {e}; write it as UTF-8") from e


def detect(
    source: SourceFiles, names: Sequence[str], format: DataFormat | Literal["auto"], formats: Formats
) -> DataFormat:
    """Choose the format for the columns `names`, of `formats`. If several fit: chat before prompt/completion before
    text.
    """
    known: list[DataFormat] = [f for f, columns in _COLUMNS.items() if set(columns) <= set(names)]
    fitting = [f for f in known if f in formats]
    if format == "auto":
        if not fitting:
            raise DataError(f"{source} has columns {', '.join(names) or '(none)'}; {_expected(known, formats)}")
        return fitting[0]
    if format not in fitting:
        wanted = " and ".join(f"`{n}`" for n in _COLUMNS[format])
        raise DataError(
            f"{source} has columns {', '.join(names) or '(none)'}, but data.format {format} needs {wanted}; "
            "set data.format to auto or rename the columns"
        )
    return format


def _expected(known: Sequence[DataFormat], formats: Formats) -> str:
    """Say what columns rows of `formats` have, and which objectives learn from the `known` ones."""
    wanted = (", ".join(f"`{name}`" for name in columns) for f, columns in _COLUMNS.items() if f in formats)
    others = [name for name, spec in OBJECTIVES.items() if spec.formats & set(known)]
    hint = f"; these are for objective.type {' or '.join(others)}" if others else ""
    return f"this objective reads {', or '.join(wanted)}{hint}"


def problem(record: Mapping[str, Any], format: DataFormat) -> str | None:
    """Say what is wrong with one row; None: nothing. What a chat holds is checked where it is tokenised."""
    if format == "chat" or (format == "preference" and all(isinstance(record.get(n), list) for n in _COLUMNS[format])):
        return None
    for name in _COLUMNS[format]:
        if name == "label":
            if not isinstance(record.get(name), bool):
                return f"`label` must be true, where the answer is desirable, or false, not {record.get(name)!r}"
            continue
        if not isinstance(text := record.get(name), str):
            others = ", or all three lists of messages" if format == "preference" else ""
            return f"`{name}` must be a string{others}, not {type(text).__name__}"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"`{name}` holds half of a surrogate pair, which is no text"
    return None


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
    with open_source(source) as file:
        return "parquet" if file.read(4) == b"PAR1" else "jsonl"


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


def _lines(source: SourceFiles) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of lines that are not blank."""
    with open_source(source) as file:
        for number, line in enumerate(io.BufferedReader(file), start=1):
            if line.strip():
                yield number, line


def _first_names(source: SourceFiles) -> list[str]:
    for number, line in _lines(source):
        if line.lstrip().startswith(b"["):
            raise DataError(f"{source} starts with a JSON array; write one object per line instead (JSONL)")
        return list(_record(source, number, line, unreadable="neither JSON nor Parquet"))
    raise DataError(f"{source} is empty; give a file with at least one row")


def _record(source: SourceFiles, number: int, line: bytes, *, unreadable: str | None = None) -> dict[str, Any]:
    try:
        return record_of(line, unreadable=unreadable)
    except ValueError as e:
        raise DataError(f"{source}, line {number}: {e}") from e


def _check_columns(source: str, names: Sequence[str], columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in names]:
        raise DataError(f"{source} has no column {missing[0]!r} but {', '.join(names) or 'none'}")


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
    """Cut all rows, or the first `max_rows`, into parts. Raises DataError."""
    found = _cut_lines(file, max_rows) if file.kind == "jsonl" else _cut_rows(file, max_rows)
    if not found.parts and max_rows != 0:
        raise DataError(f"{file.source} has no rows; give a file with at least one")
    return found


def read_parts(parts: Sequence[FilePart]) -> Iterator[tuple[FilePart, Content]]:
    """Read the content of parts of one file, which are in order."""
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
    """Parse all rows into (index as in BadRow, row). Raises BadRow for the first that is malformed."""
    if content.is_lines:
        found = list(_parsed(content.data))
    else:
        try:
            found = list(enumerate(pa.ipc.open_stream(content.data).read_all().to_pylist()))
        except UnicodeDecodeError as e:  # pyarrow does not check it when it reads
            raise BadRow(0, f"holds text that is not UTF-8: {e}; write it as UTF-8") from e
    for index, record in found:
        if wrong := problem(record, content.format):
            raise BadRow(index, wrong)
    return found


def place(part: FilePart, index: int) -> str:
    """Name the place of a row in its file, for people."""
    if part.file.kind != "jsonl":
        return f"{part.file.source}, row {part.first + index + 1}"
    before = 0
    with open_source(part.file.source) as opened:
        while (left := part.first - opened.tell()) > 0:
            before += opened.read(min(left, PART_BYTES)).count(b"\n")
    return f"{part.file.source}, line {before + index + 1}"


# -- lines ------------------------------------------------------------------------------------------------------------


def _cut_lines(file: RowFile, max_rows: int | None) -> CutFile:
    whole, parts, at, num_rows = hashlib.sha256(), list[FilePart](), 0, 0
    with open_source(file.source) as opened:
        for block in _blocks(opened):
            whole.update(block)
            taken = block if max_rows is None else _first_lines(block, max_rows - num_rows)
            if taken.strip():
                parts.append(FilePart(file, hashlib.sha256(taken).hexdigest(), at, at + len(taken)))
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
    """Cut a block behind its line `count`, where blank lines do not count."""
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
            read = [c for c in columns if c.path_in_schema.split(".")[0] in file.columns]
            yield group.num_rows, sum(c.total_uncompressed_size for c in read)


def _arrow_tables(file: RowFile) -> Iterator[tuple[int, Any]]:
    """(number of its first row, table)."""
    at = 0
    with open_arrow(file.source) as reader:
        for batch in reader:
            yield at, pa.Table.from_batches([batch]).select(file.columns)
            at += batch.num_rows


def _parquet_tables(file: RowFile, parts: Sequence[FilePart]) -> Iterator[tuple[int, Any]]:
    """The same, of those row groups that hold rows of the parts."""
    at = 0
    with open_parquet(file.source) as table:
        for g in range(table.metadata.num_row_groups):
            stop = at + table.metadata.row_group(g).num_rows
            if any(part.first < stop and at < part.stop for part in parts):
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[g], columns=list(file.columns)):
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
