"""Data files that cannot be read: every error names the file, and the line or row at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loray.errors import DataError
from loray.spec import DataSpec
from loray.train.data.rows import load_data
from tests.fixtures.tiny import byte_tokenizer
from tests.train.data.test_data import jsonl, load


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl does not exist"):
        load(str(tmp_path / "no.jsonl"))
    with pytest.raises(DataError, match=r"has no data file: a folder holds \.jsonl"):
        load(str(tmp_path))


def test_an_unknown_scheme_is_a_data_error() -> None:
    with pytest.raises(DataError, match="cannot open data file"):
        load("nowhere://bucket/data.jsonl")


def test_unknown_columns_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="columns question, answer; loray reads `messages`"):
        load(jsonl(tmp_path, {"question": "a", "answer": "b"}))
    with pytest.raises(DataError, match=r"data\.format chat needs `messages`"):
        load(jsonl(tmp_path, {"text": "a"}), format="chat")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="is empty"):
        load(str(tmp_path / "empty.jsonl"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="has no rows"):
        load(str(tmp_path / "empty.parquet"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"data\.jsonl, line 4: not valid JSON"),
        ("[1]", r"data\.jsonl, line 4: a row must be an object, not list"),
        ('{"text": 3}', r"data\.jsonl, line 4: `text` must be a string, not int"),
        ('{"other": "a"}', r"data\.jsonl, line 4: `text` must be a string, not NoneType"),
    ],
)
def test_a_bad_line_is_numbered(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        load(str(path))


def test_a_line_that_is_not_utf8_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl, line 3: not UTF-8: .* write the file as UTF-8"):
        load(str(path))


def test_binary_garbage_and_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="neither JSON nor Parquet"):
        load(str(tmp_path / "x"))
    (tmp_path / "x").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load(str(tmp_path / "x"))
    (tmp_path / "x").write_text('[{"text": "a"}]')
    with pytest.raises(DataError, match="one object per line"):
        load(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        ([{"role": "assistant", "content": "a"}], "starts with the assistant"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
            "a string or a list of text parts",
        ),
    ],
)
def test_bad_conversations(tmp_path: Path, messages: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(jsonl(tmp_path, {"messages": messages}))


def test_chat_without_a_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    path = jsonl(tmp_path, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(DataError, match="no chat template"):
        load_data(DataSpec(train=path), tokenizer, max_length=64, max_eval_rows=1, seed=0)
