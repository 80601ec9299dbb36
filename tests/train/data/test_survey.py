"""A look at data: counts of all rows, lengths of a sample for the others, duplicates, and what is in both splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loray.errors import DataError
from loray.spec import DataSpec, DpoSpec, SftSpec
from loray.train.data import read, survey
from loray.train.data.survey import Piece, Survey
from tests.fixtures.training_data import END, TOKENIZER, jsonl, load


def look(train: Any, *, max_length: int = 512, num_shown: int = 1, **fields: Any) -> Survey:
    formats = fields.pop("formats", SftSpec.formats)
    spec = DataSpec(train=train, **fields)
    return survey.survey(spec, TOKENIZER, max_length=max_length, seed=3, formats=formats, num_shown=num_shown)


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": "p" * (i % 9), "completion": f"{i:04}" + "c" * (i * 7 % 61)} for i in range(count)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_small_file_is_counted_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As a run has it, in any number of parts, in processes too."""
    monkeypatch.setattr(read, "PART_BYTES", 1000 if kind == "jsonl" else 8 << 20)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    path = jsonl(tmp_path, *rows(60))
    if kind == "parquet":
        path = str(tmp_path / "data.parquet")
        pq.write_table(pa.Table.from_pylist(rows(60)), path, row_group_size=7)
    found, data = look(path, max_length=60), load(path, max_length=60)
    assert (found.num_rows, found.num_sampled) == (60, 60)
    assert found.cut == data.report.cut
    assert found.cut.rows > 0
    assert found.rendering == data.report.rendering
    assert found.lengths_R.tolist() == load(path, max_length=9999).train.lengths.tolist()
    assert found.learned == pytest.approx(load(path).report.num_targets / load(path).report.num_tokens)
    assert (found.num_duplicates, found.num_held_out, found.num_in_both) == (0, 3, 0)


def test_of_many_rows_a_sample_is_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path, *rows(500))
    exact = look(path)
    monkeypatch.setattr(read, "PART_BYTES", 2000)
    monkeypatch.setattr(survey, "_SAMPLE_ROWS", 60)
    monkeypatch.setattr(survey, "_FEW_PARTS", 100)
    found = look(path)
    assert found.num_sampled < 100
    np.testing.assert_allclose(found.lengths_R, exact.lengths_R, atol=1)  # a byte is a token here
    assert found.num_rows == 500


@pytest.mark.slow
def test_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path, *rows(300), *rows(5))
    monkeypatch.setattr(read, "PART_BYTES", 2000)
    alone, together = (
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, n=n: set(range(n))) or look(path)  # type: ignore[func-returns-value]
        for n in (1, 2)
    )
    assert alone.lengths_R.tolist() == together.lengths_R.tolist()
    assert alone._replace(lengths_R=together.lengths_R) == together
    jsonl(tmp_path, *rows(300), {"prompt": "a"})
    with pytest.raises(DataError, match=r"data\.jsonl, line 301: the row has no `completion`"):
        look(path)


def test_duplicates_and_rows_of_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # no processes for three parts
    path = jsonl(tmp_path, *({"id": i, **row} for i, row in enumerate([*rows(6), *rows(2), *rows(1)])))
    found = look(path, eval_fraction=0)
    assert (found.num_duplicates, found.num_held_out) == (3, 0)
    assert found.duplicates == (survey.Duplicate(f"{path}, line 1", 3), survey.Duplicate(f"{path}, line 2", 2))
    held_out = jsonl(tmp_path, *rows(8)[4:], name="eval.jsonl")
    found = look(path, eval=held_out)
    assert (found.num_held_out, found.num_in_both) == (4, 2)
    again = look((path, held_out, path), eval=path, eval_fraction=0)
    assert (again.num_rows, again.num_duplicates, again.num_held_out, again.num_in_both) == (22, 14, 9, 9)
    same = jsonl(tmp_path, *(rows(1) * 20), name="same.jsonl")
    found = look(same, eval_fraction=0.25)  # as a run with this seed
    assert (found.num_held_out, found.num_in_both) == (5, 5)


def test_pieces_say_what_is_learned_and_what_is_cut(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "ab", "completion": "cdefgh"})
    ((sequence,),) = look(path, format="raw", max_length=5, eval_fraction=0).shown
    assert sequence == (Piece("ab", False, False), Piece("cde", True, False), Piece(f"fgh{END}", True, True))


def test_pairs_are_known_by_their_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "cc"})
    for formats in (SftSpec.formats, DpoSpec.formats):
        found = look(path, formats=formats, format="raw")
        ((chosen, rejected),) = found.shown
        assert ("".join(p.text for p in chosen), "".join(p.text for p in rejected)) == (f"ab{END}", f"acc{END}")
        assert found.lengths_R.tolist() == [4]


def test_texts_lose_nothing(tmp_path: Path) -> None:
    found = look(jsonl(tmp_path, {"text": "a" * 100}), max_length=10)
    assert (found.cut.rows, found.lengths_R.tolist(), found.rendering) == (0.0, [101], "texts as they stand")
