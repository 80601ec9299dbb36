"""The one file of a base's tokenizer, and what loads without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loray.bases import tokenizer
from loray.bases.registry import BaseModel, add_base
from loray.errors import IntegrityError, UnsupportedError
from tests.fixtures.tiny import write_checkpoint

TEXTS = ("", " a", "naïve café → 日本語 😀\n\n  x", "<|im_start|>user\nhi<|im_end|>", "a<|extra|>b", "\x00\ufffd")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def assert_same_ids(base: BaseModel) -> None:
    ours, theirs = tokenizer.load(base.path), AutoTokenizer.from_pretrained(base.path)
    for text in TEXTS:
        for special in (False, True):
            assert ours.encode(text, add_special_tokens=special).ids == theirs.encode(text, add_special_tokens=special)


def test_ids_are_those_of_transformers(smollm2: BaseModel) -> None:
    assert_same_ids(smollm2)


def test_what_other_files_say_is_in_the_one_file(checkpoint: Path, tmp_path: Path) -> None:
    config = checkpoint / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"additional_special_tokens": ["<|extra|>"]}))
    base = add_base(str(checkpoint), home=tmp_path / "home")
    assert_same_ids(base)
    assert tokenizer.load(base.path).token_to_id("<|extra|>") == 259
    assert json.loads(tokenizer.read(base.path))["added_tokens"][-1]["content"] == "<|extra|>"


def test_a_base_without_it_is_to_be_added_again(checkpoint: Path, tmp_path: Path) -> None:
    base = add_base(str(checkpoint), home=tmp_path / "home")
    file = base.path / tokenizer.FILE
    written = file.read_bytes()
    file.unlink()
    with pytest.raises(IntegrityError, match=f"lacks {tokenizer.FILE}: add the base again"):
        tokenizer.load(base.path)
    add_base(str(checkpoint), home=tmp_path / "home")
    assert file.read_bytes() == written


def test_a_tokenizer_that_cannot_be_loaded_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="cannot be loaded"):
        add_base(str(checkpoint), home=tmp_path / "home")
