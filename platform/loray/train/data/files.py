"""Reads JSONL, Parquet and shards of saved data sets with pyarrow: a file's format, its rows in parts, its SHA-256.

A source is a path, or a URI that pyarrow supports (`file://`, `s3://`), or a local copy of one. Every failure is a
DataError that names the source and the wrong line or row.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.json as pajson
import pyarrow.parquet as papq

from loray.errors import DataError
from loray.recipes.sources import ARROW, Source

FileKind = Literal["jsonl", "parquet", "arrow"]
DataFormat = Literal["chat", "prompt_completion", "text"]

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_SCHEMAS: dict[DataFormat, pa.Schema] = {
    "chat": pa.schema([("messages", pa.list_(_MESSAGE))]),
    "prompt_completion": pa.schema([("prompt", pa.string()), ("completion", pa.string())]),
    "text": pa.schema([("text", pa.string())]),
}
_EXPECTED = "`messages` (chat), `prompt` and `completion`, or `text`"
_PART_BYTES = 16 << 20  # of a JSONL file that are read at once; more where a single line is longer
_PART_ROWS = 256  # of a Parquet file that are read at once


class RowFile(NamedTuple):
    """A file of rows. `sha256` is that of the whole file; `max_rows` None means all rows."""

    source: Source
    format: DataFormat
    sha256: str
    kind: FileKind
    max_rows: int | None

    def parts(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(number of rows before the part, rows with the columns of the format) for each part of the file, which may be
        larger than memory. Raises DataError.
        """
        done = 0
        read = {"parquet": _parquet_parts, "arrow": _arrow_parts, "jsonl": _jsonl_parts}[self.kind]
        for table in read(self):
            if self.max_rows is not None:
                table = table.slice(0, self.max_rows - done)
            if table.num_rows:
                yield done, self._records(table)
            done += table.num_rows
            if done == self.max_rows:
                break
        if done == 0:
            raise DataError(f"{self.source} has no rows; give a file with at least one")

    def _records(self, table: Any) -> list[dict[str, Any]]:
        try:
            records: list[dict[str, Any]] = table.to_pylist()
        except UnicodeDecodeError as e:  # pyarrow does not check it when it reads
            if self.kind == "jsonl":
                _raise_for_line(self.source, self.format)
            raise DataError(f"{self.source} holds text that is not UTF-8: {e}; write it as UTF-8") from e
        return records


def open_rows(
    name: str,
    format: DataFormat | Literal["auto"] = "auto",
    max_rows: int | None = None,
    *,
    fetched: Path | None = None,
) -> RowFile:
    """The rows of the source called `name`, or the first `max_rows`, read from its local copy `fetched` where given.

    Raises DataError.
    """
    source = Source(name, name if fetched is None else str(fetched))
    kind = _kind(source)
    with _open(source) as file:
        digest = _sha256(file)
    match kind:
        case "parquet":
            names = _parquet_names(source)
        case "arrow":
            with _arrow(source) as reader:
                names = reader.schema.names
        case "jsonl":
            names = _first_names(source)
    return RowFile(source, detect(source, names, format), digest, kind, max_rows)


def read_columns(name: str, path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """These columns, of any types, of all rows of a local file. Raises DataError."""
    source = Source(name, str(path))
    kind = _kind(source)
    if kind == "parquet":
        with _open(source) as file, _parquet_errors(source):
            table = papq.ParquetFile(file)
            _check_columns(str(source), table.schema_arrow.names, columns)
            records: list[dict[str, Any]] = table.read(columns=list(columns)).to_pylist()
        return records
    if kind == "arrow":
        with _arrow(source) as reader:
            _check_columns(str(source), reader.schema.names, columns)
            return reader.read_all().select(list(columns)).to_pylist()  # type: ignore[no-any-return]
    records = []
    for number, line in _lines(source):
        record = _record(source, number, line)
        _check_columns(f"{source}, line {number}", list(record), columns)
        records.append({column: record[column] for column in columns})
    return records


def read_text(name: str, path: Path) -> str:
    """The text of a local file. Raises DataError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{name} is not UTF-8: {e}; write it as UTF-8") from e


def detect(source: Source, names: list[str], format: DataFormat | Literal["auto"]) -> DataFormat:
    """The format for the columns `names`. If several fit: chat before prompt/completion before text."""
    fitting: list[DataFormat] = [f for f, schema in _SCHEMAS.items() if set(schema.names) <= set(names)]
    if format == "auto":
        if not fitting:
            raise DataError(f"{source} has columns {', '.join(names) or '(none)'}; loray reads {_EXPECTED}")
        return fitting[0]
    if format not in fitting:
        wanted = " and ".join(f"`{n}`" for n in _SCHEMAS[format].names)
        raise DataError(
            f"{source} has columns {', '.join(names) or '(none)'}, but data.format {format} needs {wanted}; "
            "set data.format to auto or rename the columns"
        )
    return format


def problem(record: Mapping[str, Any], format: DataFormat) -> str | None:
    """What is wrong with one row, or None."""
    if format != "chat":
        for name in _SCHEMAS[format].names:
            if not isinstance(record.get(name), str):
                return f"`{name}` must be a string, not {type(record.get(name)).__name__}"
        return None
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return "`messages` must be a list of at least one message"
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return "every message needs `role` and `content`, both strings (tool calls are not supported)"
    return None


def _open(source: Source) -> Any:
    """A pyarrow file. Use it in a `with` block."""
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


def _kind(source: Source) -> FileKind:
    if source.path.endswith(ARROW):
        return "arrow"
    with _open(source) as file:
        return "parquet" if file.read(4) == b"PAR1" else "jsonl"


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _parquet_names(source: Source) -> list[str]:
    with _open(source) as file, _parquet_errors(source):
        names: list[str] = papq.ParquetFile(file).schema_arrow.names
        return names


def _parquet_parts(rows: RowFile) -> Iterator[Any]:
    with _open(rows.source) as file, _parquet_errors(rows.source):
        for batch in papq.ParquetFile(file).iter_batches(_PART_ROWS, columns=_SCHEMAS[rows.format].names):
            yield pa.Table.from_batches([batch])


def _arrow_parts(rows: RowFile) -> Iterator[Any]:
    with _arrow(rows.source) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, _PART_ROWS):
                part = pa.Table.from_batches([batch.slice(start, _PART_ROWS)])
                yield part.select(_SCHEMAS[rows.format].names)


@contextmanager
def _arrow(source: Source) -> Iterator[Any]:
    """The stream of batches that `datasets` writes a shard as."""
    try:
        with _open(source) as file, pa.ipc.open_stream(file) as reader:
            yield reader
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{source} is not a readable Arrow file: {e}") from e


@contextmanager
def _parquet_errors(source: Source) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{source} is not a readable Parquet file: {e}") from e


def _jsonl_parts(rows: RowFile) -> Iterator[Any]:
    """Tables with declared columns: without a schema, pyarrow converts strings that look like dates to timestamps."""
    options = pajson.ParseOptions(explicit_schema=_SCHEMAS[rows.format], unexpected_field_behavior="ignore")
    for block in _blocks(rows.source):
        # pyarrow needs each row in one of its blocks, and documents can be long: so the part is one block.
        try:
            table = pajson.read_json(io.BytesIO(block), pajson.ReadOptions(block_size=len(block)), options)
        except pa.ArrowInvalid as e:
            _raise_for_line(rows.source, rows.format)
            raise DataError(f"{rows.source} cannot be read: {e}") from e
        if any(column.null_count for column in table.columns):
            _raise_for_line(rows.source, rows.format)
        yield table


def _blocks(source: Source) -> Iterator[bytes]:
    """Parts of whole lines, each of about `_PART_BYTES`."""
    lines: list[bytes] = []
    size = 0
    for _, line in _lines(source):
        lines.append(line)
        size += len(line)
        if size >= _PART_BYTES:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of lines that are not blank."""
    with _open(source) as file:
        for number, line in enumerate(io.BufferedReader(file), start=1):
            if line.strip():
                yield number, line


def _first_names(source: Source) -> list[str]:
    for number, line in _lines(source):
        if line.lstrip().startswith(b"["):
            raise DataError(f"{source} starts with a JSON array; write one object per line instead (JSONL)")
        return list(_record(source, number, line, unreadable="neither JSON nor Parquet"))
    raise DataError(f"{source} is empty; give a file with at least one row")


def _raise_for_line(source: Source, format: DataFormat) -> None:
    """Raise DataError for the first malformed line. pyarrow's errors count lines in a block, not in the file."""
    for number, line in _lines(source):
        if wrong := problem(_record(source, number, line), format):
            raise DataError(f"{source}, line {number}: {wrong}")


def _record(source: Source, number: int, line: bytes, *, unreadable: str | None = None) -> dict[str, Any]:
    """The object in a line. `unreadable` replaces the message for a line that is not JSON."""
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as e:
        if unreadable is None and isinstance(e, UnicodeDecodeError):
            raise DataError(f"{source}, line {number}: not UTF-8: {e}; write the file as UTF-8") from e
        raise DataError(f"{source}, line {number}: {unreadable or 'not valid JSON'}: {e}") from e
    if not isinstance(record, dict):
        raise DataError(f"{source}, line {number}: a row must be an object, not {type(record).__name__}")
    return record


def _check_columns(source: str, names: Sequence[str], columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in names]:
        raise DataError(f"{source} has no column {missing[0]!r} but {', '.join(names) or 'none'}")
