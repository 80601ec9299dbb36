"""`loray base add --quantise` and `--of`, and what is told of quantised bases."""

from __future__ import annotations

from pathlib import Path

import pytest

from loray.bases.registry import BaseModel, get_base
from tests.cli.run import Loray


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a text that nobody has seen before. " * 60)
    return path


def test_a_form_is_added_with_what_it_costs(loray: Loray, base: BaseModel, home: Path, text: Path) -> None:
    made = loray("base", "add", "tiny", "--quantise", "int8", "--data", text, "--json").json
    form = get_base(home, "tiny-int8")
    assert (made["name"], made["fingerprint"], made["of"]) == ("tiny-int8", form.fingerprint, base.fingerprint)
    assert made["quantization"] == "int8 (compressed-tensors)"
    whole, named = (
        next(b for b in loray("base", "ls", "--json").json if b["name"] == n) for n in ("tiny", "tiny-int8")
    )
    assert named["num_parameters"] == whole["num_parameters"]
    assert named["nbytes"] < whole["nbytes"]
    assert [e["layer"] for e in made["errors"]] == [0, 1]
    assert all(0 < e["error"] <= e["worst"] < 0.02 for e in made["errors"])
    perplexity = made["perplexity"]
    assert perplexity["before"] != perplexity["after"]
    assert perplexity["after"] == pytest.approx(perplexity["before"], rel=0.02)
    again = loray("base", "add", "tiny", "--quantise", "int8", "--data", text)
    assert "perplexity on text.txt: " in again.out
    assert "LAYER" in again.out
    assert loray("base", "verify", "tiny-int8").out == "tiny-int8: ok\n"


def test_a_form_is_made_of_a_checkpoint_that_is_added_first(
    loray: Loray, checkpoint: Path, home: Path, tmp_path: Path, text: Path
) -> None:
    assert loray("base", "add", checkpoint, "--quantise", "int4", "--name", "small", "--data", text).code == 0
    assert get_base(home, "small").of == get_base(home, "tiny").fingerprint
    assert loray("base", "add", get_base(home, "small").path, "--name", "again", "--of", "tiny").code == 0
    assert get_base(home, "again").of == get_base(home, "tiny").fingerprint


def test_wrong_use_is_told(loray: Loray, base: BaseModel, text: Path) -> None:
    assert "--data is for --quantise" in loray("base", "add", "tiny", "--data", text).err
    assert "leave out --of" in loray("base", "add", "tiny", "--quantise", "int8", "--of", "tiny").err
    assert "no base model 'nobody'" in loray("base", "add", base.path, "--name", "x", "--of", "nobody").failed
    refused = loray("base", "add", base.path, "--name", "x", "--of", "tiny").failed
    assert "x is not quantised, so it is no quantised form of tiny" in refused
