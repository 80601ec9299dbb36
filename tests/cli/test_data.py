"""The command `loray data show`: rows as a model sees them, and what is in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from tests.cli.run import Loray


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"question": f"{i} + 1?", "answer": f"[{i + 1}]" * (1 + 20 * (i % 9 == 0))} for i in range(20)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, rows[1]]))
    return path


COLUMNS = ("--set", "data.columns.prompt=question", "--set", "data.columns.completion=answer")


def test_rows_and_figures(loray: Loray, base: BaseModel, file: Path) -> None:
    code, out, err = loray("data", "show", file, "--base", base.name, *COLUMNS, "--set", "data.max_length=40")
    assert (code, err) == (0, "")
    assert "<|im_start|>user\n0 + 1?<|im_end|>\n<|im_start|>assistant\n⟦[1][1]" in out
    assert "assistant\n⟦[2]<|im_end|>⟧" in out
    assert "⟧✂⟦" in out
    for words in (
        "21, ",
        "prompt_completion rows through the base's chat template",
        "14.3% of the rows, ",
        "at 40 tokens; data.max_length=",
        "1 rows stand there before",
        "sums.jsonl, line 2: 2 times",
        "1 rows",
        "warning: 14% of the rows are longer than 40 tokens",
    ):
        assert words in out
    assert "█" in out


def test_json(loray: Loray, base: BaseModel, file: Path) -> None:
    code, out, _ = loray("data", "show", file, "--base", base.name, *COLUMNS, "--rows", "1", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["num_rows"], found["num_sampled"], found["num_duplicates"], found["max_length"]) == (21, 21, 1, 512)
    assert sum(bar["rows"] for bar in found["histogram"]) == 21
    ((sequence,),) = found["shown"]
    assert [piece["is_learned"] for piece in sequence] == [False, True]
    assert found["duplicates"][0]["times"] == 2


def test_colours_of_a_terminal(loray: Loray, base: BaseModel, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = loray("data", "show", file, "--base", base.name, *COLUMNS).out
    assert "\x1b[32m[2]<|im_end|>" in out
    assert "⟦" not in out


def test_the_data_of_a_recipe(loray: Loray, base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nbase: {base.name}\nobjective: {{type: dpo}}\ndata: {{train: pairs.jsonl}}\n")
    code, out, _ = loray("data", "show", recipe)
    assert code == 0
    assert "row 1 rejected" in out
    refused = loray("data", "show", recipe, "--set", "objective.type=sft", "--set", "batch.order=concat")
    assert (refused.code, "take --set batch.order=packed" in refused.err) == (1, True)


def test_what_is_missing_is_named(loray: Loray, base: BaseModel, tmp_path: Path) -> None:
    missing = loray("data", "show", tmp_path / "no.jsonl", "--base", base.name)
    assert (missing.code, "no.jsonl does not exist" in missing.err) == (1, True)
