"""The command `loray adapters convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loray.adapters.peft_format import WEIGHTS_FILE, read_adapter
from loray.bases.registry import BaseModel, add_base
from loray.store import AdapterStore, open_store
from tests.cli.run import Loray, PeftFolder


@pytest.fixture
def vera(loray: Loray, base: BaseModel, peft_folder: PeftFolder) -> str:
    assert loray("adapters", "import", peft_folder(base, "vera"), "--name", "tone").code == 0
    return "tone@1"


def test_vera_becomes_lora(loray: Loray, base: BaseModel, home: Path, vera: str, tmp_path: Path) -> None:
    done = loray("adapters", "convert", vera, "--to", "lora", "--name", "tone-lora", "--alias", "prod")
    assert (done.code, done.out) == (0, "published tone-lora@1, converted from tone@1\n")
    old, new = (json.loads(loray("adapters", "show", name, "--json").out) for name in ("tone", "tone-lora"))
    assert (new["manifest"]["method"], new["manifest"]["rank"]) == ("lora", 16)
    assert new["manifest"]["derived_from"] == old["digest"]
    assert f"converted from {old['digest'][:12]}" in " ".join(loray("adapters", "show", "tone-lora").out.split())
    AdapterStore(open_store(f"file://{home}/store")).fetch(new["digest"], tmp_path / "lora")
    assert (tmp_path / "lora" / WEIGHTS_FILE).stat().st_size > 1000
    assert read_adapter(tmp_path / "lora", base.config).pair is None
    again = loray("adapters", "convert", "tone-lora", "--to", "lora", "--name", "twice")
    assert (again.code, again.err) == (
        1,
        "error: the adapter is not VeRA; only VeRA adapters are converted to LoRA\n",
    )


def test_merged_is_a_base(loray: Loray, home: Path, vera: str, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    done = loray("adapters", "convert", vera, "--to", "merged", "--folder", target, "--dtype", "bfloat16", "--json")
    assert (done.code, json.loads(done.out)["folder"]) == (0, str(target))
    assert add_base(str(target), home=tmp_path / "other", name="merged").config.hidden_size == 64
    again = loray("adapters", "convert", vera, "--to", "merged", "--folder", target)
    assert (again.code, again.err) == (1, f"error: {target} is not empty; name a new folder\n")
    whole = loray("adapters", "convert", vera, "--to", "merged", "--folder", tmp_path / "new", "--as-trained")
    assert (whole.code, "was not trained on a quantized base" in whole.err) == (1, True)


def test_gguf(loray: Loray, home: Path, vera: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "tone.gguf"
    done = loray("adapters", "convert", vera, "--to", "gguf", "--file", file, "--json")
    assert (done.code, json.loads(done.out)["file"]) == (0, str(file))
    assert file.read_bytes()[:4] == b"GGUF"
    assert "exists already" in loray("adapters", "convert", vera, "--to", "gguf", "--file", file).err
    for form, target in (("peft", "folder"), ("merged", "checkpoint"), ("gguf", "again.gguf")):
        done = loray("adapters", "pull", "tone", tmp_path / target, "--format", form)
        assert done.out == f"downloaded tone@1 to {tmp_path / target}\n", done.err
    assert (tmp_path / "folder" / WEIGHTS_FILE).is_file()
    assert (tmp_path / "checkpoint" / "config.json").is_file()
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "args",
    [
        ("--to", "lora"),
        ("--to", "lora", "--name", "x", "--folder", "y"),
        ("--to", "merged"),
        ("--to", "merged", "--folder", "y", "--name", "x"),
        ("--to", "gguf"),
        ("--to", "gguf", "--folder", "y"),
        ("--to", "gguf", "--file", "x", "--dtype", "float32"),
        ("--to", "gguf", "--file", "x", "--as-trained"),
        ("--to", "merged", "--folder", "y", "--file", "x"),
    ],
)
def test_wrong_usage(loray: Loray, vera: str, args: tuple[str, ...]) -> None:
    assert loray("adapters", "convert", vera, *args).code == 2
