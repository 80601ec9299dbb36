"""Reading JSONL and Parquet through pyarrow: which format a file has, its rows, and its SHA-256.

A source is a path or a URI that pyarrow knows (`file://`, `s3://`), or a file that was fetched from one. Every failure
is a DataError that names the source, and the line or row at fault.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.json as pajson
import pyarrow.parquet as papq

from loray.errors import DataError

DataFormat = Literal["chat", "prompt_completion", "text"]

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_SCHEMAS: dict[DataFormat, pa.Schema] = {
    "chat": pa.schema([("messages", pa.list_(_MESSAGE))]),
    "prompt_completion": pa.schema([("prompt", pa.string()), ("completion", pa.string())]),
    "text": pa.schema([("text", pa.string())]),
}
_EXPECTED = "`messages` (chat), `prompt` and `completion`, or `text`"


class Source(NamedTuple):
    """`name` is what errors call it, `path` where it is read."""

    name: str
    path: str

    def __str__(self) -> str:
        return self.name


class Rows(NamedTuple):
    """`records` hold the format's columns only; `sha256` is over the whole file as it lies on disk."""

    source: str
    format: DataFormat
    records: list[dict[str, Any]]
    sha256: str


def read_rows(
    name: str,
    format: DataFormat | Literal["auto"] = "auto",
    max_rows: int | None = None,
    *,
    fetched: Path | None = None,
) -> Rows:
    """All rows of the source called `name`, or the first `max_rows`; from `fetched`, a copy, where there is one.

    Raises DataError.
    """
    source = Source(name, name if fetched is None else str(fetched))
    with _open(source) as file:
        is_parquet = file.read(4) == b"PAR1"
        file.seek(0)
        digest = _sha256(file)
    if is_parquet:
        found, table = _read_parquet(source, format)
    else:
        found, table = _read_jsonl(source, format)
    if max_rows is not None:
        table = table.slice(0, max_rows)
    if table.num_rows == 0:
        raise DataError(f"{source} has no rows; give a file with at least one")
    try:
        records = table.to_pylist()
    except UnicodeDecodeError as e:  # pyarrow reads such bytes without a word
        if not is_parquet:
            _explain(source, found)
        raise DataError(f"{source} holds text that is not UTF-8: {e}; write it as UTF-8") from e
    return Rows(name, found, records, digest)


def detect(source: Source, names: list[str], format: DataFormat | Literal["auto"]) -> DataFormat:
    """The format that the columns `names` allow; chat before prompt/completion before text where several do."""
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


def problem(record: object, format: DataFormat) -> str | None:
    """What is wrong with one row, or None."""
    if not isinstance(record, dict):
        return f"a row must be an object, not {type(record).__name__}"
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
    """A pyarrow file, to be used in a `with` block."""
    try:
        if "://" in source.path:
            filesystem, path = pafs.FileSystem.from_uri(source.path)
        else:
            filesystem, path = pafs.LocalFileSystem(), source.path
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            raise DataError(f"data file {source} does not exist; relative paths start at the recipe's folder")
        if kind == pafs.FileType.Directory:
            raise DataError(f"{source} is a folder; name one JSONL or Parquet file")
        return filesystem.open_input_file(path)
    except (OSError, ValueError, pa.ArrowException) as e:
        raise DataError(f"cannot open data file {source}: {e}") from e


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_parquet(source: Source, format: DataFormat | Literal["auto"]) -> tuple[DataFormat, Any]:
    with _open(source) as file:
        try:
            parquet = papq.ParquetFile(file)
            found = detect(source, parquet.schema_arrow.names, format)
            return found, parquet.read(columns=_SCHEMAS[found].names)
        except (OSError, pa.ArrowException) as e:
            raise DataError(f"{source} is not a readable Parquet file: {e}") from e


def _read_jsonl(source: Source, format: DataFormat | Literal["auto"]) -> tuple[DataFormat, Any]:
    """The columns are declared: left to guess, pyarrow makes timestamps of strings that look like dates."""
    found = detect(source, _first_names(source), format)
    options = pajson.ParseOptions(explicit_schema=_SCHEMAS[found], unexpected_field_behavior="ignore")
    with _open(source) as file:
        # A row must fit into one block, and documents can be long: one block holds the file, up to 1 GiB.
        block = min(max(file.size(), 1), 1 << 30)
        try:
            table = pajson.read_json(file, pajson.ReadOptions(block_size=block), options)
        except pa.ArrowInvalid as e:
            _explain(source, found)
            raise DataError(f"{source} cannot be read: {e}") from e
    if any(column.null_count for column in table.columns):
        _explain(source, found)
    return found, table


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, counted from one."""
    with _open(source) as file:
        for number, line in enumerate(io.BufferedReader(file), start=1):
            if line.strip():
                yield number, line


def _first_names(source: Source) -> list[str]:
    for number, line in _lines(source):
        if line.lstrip().startswith(b"["):
            raise DataError(f"{source} starts with a JSON array; write one object per line instead (JSONL)")
        try:
            record = json.loads(line)
        except ValueError as e:
            raise DataError(f"{source}, line {number}: neither JSON nor Parquet: {e}") from e
        if not isinstance(record, dict):
            raise DataError(f"{source}, line {number}: a row must be an object, not {type(record).__name__}")
        return list(record)
    raise DataError(f"{source} is empty; give a file with at least one row")


def _explain(source: Source, format: DataFormat) -> None:
    """Raise a DataError for the first bad line, which pyarrow counts by block and not by file."""
    for number, line in _lines(source):
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise DataError(f"{source}, line {number}: not UTF-8: {e}; write the file as UTF-8") from e
        except ValueError as e:
            raise DataError(f"{source}, line {number}: not valid JSON: {e}") from e
        if wrong := problem(record, format):
            raise DataError(f"{source}, line {number}: {wrong}")
