"""Opens JSONL, Parquet and shards of saved data sets: a file's format, its columns, and what is wrong with a row.

A source is a path, or a URI that pyarrow supports (`file://`, `s3://`), or a local copy of one. Every failure is a
DataError that names the source and the wrong line or row.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as papq

from loray.errors import DataError
from loray.recipes.sources import ARROW, Source

FileKind = Literal["jsonl", "parquet", "arrow"]
DataFormat = Literal["chat", "prompt_completion", "text", "preference"]

_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
}
_TOOLS = "tools"  # of chats, where the file has that column
_WITH_CHATS: tuple[DataFormat, ...] = ("chat", "preference")
READ_COLUMNS = frozenset({column for columns in _COLUMNS.values() for column in columns} | {_TOOLS})
_EXPECTED = {
    False: "loray reads `messages` (chat), `prompt` and `completion`, or `text`",
    True: "DPO reads `prompt`, `chosen` and `rejected`, all texts or all lists of messages",
}


class Head(NamedTuple):
    """What a file is, and the columns of its rows."""

    kind: FileKind
    names: tuple[str, ...]


class RowFile(NamedTuple):
    """A file of rows. `columns` are those that its format reads."""

    source: Source
    format: DataFormat
    kind: FileKind
    columns: tuple[str, ...]


def read_head(source: Source) -> Head:
    """Raises DataError."""
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
    source: Source, head: Head, format: DataFormat | Literal["auto"] = "auto", *, paired: bool = False
) -> RowFile:
    """The rows of the source that begins with `head`. `paired`: they must be preference pairs. Raises DataError."""
    kind, names = head
    found = detect(source, names, format, paired=paired)
    tools = (_TOOLS,) if found in _WITH_CHATS and _TOOLS in names else ()
    return RowFile(source, found, kind, _COLUMNS[found] + tools)


def read_columns(name: str, path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """These columns, of any types, of all rows of a local file. Raises DataError."""
    source = Source(name, str(path))
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
    """The text of a local file. Raises DataError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{name} is not UTF-8: {e}; write it as UTF-8") from e


def detect(source: Source, names: Sequence[str], format: DataFormat | Literal["auto"], *, paired: bool) -> DataFormat:
    """The format for the columns `names`. If several fit: chat before prompt/completion before text. Pairs are read
    where `paired` says so, and only there.
    """
    known: list[DataFormat] = [f for f, columns in _COLUMNS.items() if set(columns) <= set(names)]
    fitting = [f for f in known if (f == "preference") == paired]
    if format == "auto":
        if not fitting:
            hint = "; pairs are for objective: {type: dpo}" if known and not paired else ""
            raise DataError(f"{source} has columns {', '.join(names) or '(none)'}; {_EXPECTED[paired]}{hint}")
        return fitting[0]
    if format not in fitting:
        wanted = " and ".join(f"`{n}`" for n in _COLUMNS[format])
        raise DataError(
            f"{source} has columns {', '.join(names) or '(none)'}, but data.format {format} needs {wanted}; "
            "set data.format to auto or rename the columns"
        )
    return format


def problem(record: Mapping[str, Any], format: DataFormat) -> str | None:
    """What is wrong with one row, or None. What a chat holds is checked where it is read, in `chats`."""
    if format == "chat" or (format == "preference" and all(isinstance(record.get(n), list) for n in _COLUMNS[format])):
        return None
    for name in _COLUMNS[format]:
        if not isinstance(text := record.get(name), str):
            others = ", or all three lists of messages" if format == "preference" else ""
            return f"`{name}` must be a string{others}, not {type(text).__name__}"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"`{name}` holds half of a surrogate pair, which is no text"
    return None


def record_of(line: bytes, *, unreadable: str | None = None) -> dict[str, Any]:
    """The object in a line of JSONL. Raises ValueError; `unreadable` begins its message for what is not JSON."""
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as e:
        if unreadable is None and isinstance(e, UnicodeDecodeError):
            raise ValueError(f"not UTF-8: {e}; write the file as UTF-8") from e
        raise ValueError(f"{unreadable or 'not valid JSON'}: {e}") from e
    if not isinstance(record, dict):
        raise ValueError(f"a row must be an object, not {type(record).__name__}")
    return record


def open_source(source: Source) -> Any:
    """A pyarrow file. Use it in a `with` block."""
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


def _kind(source: Source) -> FileKind:
    if source.path.endswith(ARROW):
        return "arrow"
    with open_source(source) as file:
        return "parquet" if file.read(4) == b"PAR1" else "jsonl"


@contextmanager
def open_arrow(source: Source) -> Iterator[Any]:
    """The stream of batches that `datasets` writes a shard as."""
    try:
        with open_source(source) as file, pa.ipc.open_stream(file) as reader:
            yield reader
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{source} is not a readable Arrow file: {e}") from e


@contextmanager
def open_parquet(source: Source) -> Iterator[Any]:
    """A ParquetFile."""
    try:
        with open_source(source) as file:
            yield papq.ParquetFile(file)
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{source} is not a readable Parquet file: {e}") from e


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of lines that are not blank."""
    with open_source(source) as file:
        for number, line in enumerate(io.BufferedReader(file), start=1):
            if line.strip():
                yield number, line


def _first_names(source: Source) -> list[str]:
    for number, line in _lines(source):
        if line.lstrip().startswith(b"["):
            raise DataError(f"{source} starts with a JSON array; write one object per line instead (JSONL)")
        return list(_record(source, number, line, unreadable="neither JSON nor Parquet"))
    raise DataError(f"{source} is empty; give a file with at least one row")


def _record(source: Source, number: int, line: bytes, *, unreadable: str | None = None) -> dict[str, Any]:
    try:
        return record_of(line, unreadable=unreadable)
    except ValueError as e:
        raise DataError(f"{source}, line {number}: {e}") from e


def _check_columns(source: str, names: Sequence[str], columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in names]:
        raise DataError(f"{source} has no column {missing[0]!r} but {', '.join(names) or 'none'}")
