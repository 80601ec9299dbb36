"""Conversations that ask for records: what is asked stands in the first message, and rows have the length asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from examples.lookups import main
from loray.bases.registry import BaseModel
from loray.text.tokenizer import Tokenizer

_RECORD = re.compile(r"The ([\w ]+) is (\d{5})\.")


def test_the_command(smollm2: BaseModel, tmp_path: Path) -> None:
    page = "A ship went out to sea, and the sea was calm. " * 32
    books, out = tmp_path / "books.parquet", tmp_path / "lookups.parquet"
    pq.write_table(pa.table({"text": ["\n\n".join([page + str(i) for i in range(40)])]}), books)
    tokens = (6000, 17_000)

    def made() -> list[list[dict[str, str]]]:
        main([str(books), str(out), "--tokens", ",".join(map(str, tokens)), "--home", str(smollm2.path.parents[1])])
        return [row["messages"] for row in pq.read_table(out).to_pylist()]

    rows = made()
    assert made() == rows
    tokenizer = Tokenizer.load(smollm2.path)
    for messages, num_tokens in zip(rows, tokens, strict=True):
        text = messages[0]["content"]
        said = dict(_RECORD.findall(text.rpartition("\n\n")[0]))
        answers = [_RECORD.fullmatch(message["content"]) for message in messages[1::2]]
        asked = {answer[1]: answer[2] for answer in answers if answer is not None}
        assert asked.items() <= said.items()
        assert len(asked) == len(answers) == len(said)
        assert [m["content"].rpartition("\n\n")[2] for m in messages[::2]] == [
            f"What is the {answer[1]}?" for answer in answers if answer is not None
        ]
        written = sum(len(tokenizer.encode(message["content"], special=False)) + 4 for message in messages)
        assert 0.8 * num_tokens < written < num_tokens
