"""A run whose list of checkpoints was left damaged can be resumed and published again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pyarrow import fs as pafs

from jobs.runs.folders import SNAPSHOT, RunFolder, metrics_of, name_of
from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loray.errors import IntegrityError, StoreError, TrainingError
from loray.recipes.load import load_recipe
from loray.train.checkpoint import ADAPTER, RunState, Snapshot, read_optimizer, write
from loray.train.optimizer import OptimizerState

LOSSES = {2: 3.0, 4: 2.0, 10: 2.5}


def save(run: RunFolder, step: int, eval_loss: float | None) -> Path:
    spec = load_recipe("lora_smollm2").spec
    state = RunState(
        recipe=spec,
        base_fingerprint="0" * 64,
        data_fingerprint="1" * 64,
        step=step,
        eval_loss=eval_loss,
        row_length=64,
    )
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
    optimizer = OptimizerState({"a": torch.ones(64)}, {"a": torch.ones(64)}, {"a": torch.ones(64)}, step)
    folder = Path(run.path, name_of(step))
    folder.mkdir()
    write(folder, Snapshot(AdapterFiles({"peft_type": "LORA", "r": 2}, weights), optimizer, state))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Three checkpoints and no list of them."""
    (tmp_path / "run").mkdir()
    run = RunFolder(pafs.LocalFileSystem(), str(tmp_path / "run"))
    for step, loss in LOSSES.items():
        save(run, step, loss)
    return run


def steps(run: RunFolder) -> tuple[list[int], int]:
    """(steps that Ray Train knows, the best last; the latest)."""
    found = run.result()
    assert found.best_checkpoints is not None
    assert all(metrics == metrics_of(metrics["step"], LOSSES[metrics["step"]]) for _, metrics in found.best_checkpoints)
    return [metrics["step"] for _, metrics in found.best_checkpoints], int(found.checkpoint.path[-6:])


@pytest.mark.parametrize("left", [None, b"", b'{"ray_version": "2', b"{}"], ids=["none", "empty", "half", "other"])
def test_a_damaged_list_is_made_anew(run: RunFolder, left: bytes | None) -> None:
    if left is not None:
        Path(run.path, SNAPSHOT).write_bytes(left)
    assert steps(run) == ([2, 10, 4], 10)
    made = Path(run.path, SNAPSHOT).stat().st_ino
    assert steps(run) == ([2, 10, 4], 10)
    assert Path(run.path, SNAPSHOT).stat().st_ino == made  # a sound one is left as it is


def test_a_checkpoint_that_was_removed_is_forgotten(run: RunFolder) -> None:
    run.repair()
    Path(run.path, name_of(4)).rename(Path(run.path, "elsewhere"))
    assert steps(run) == ([2, 10], 10)


@pytest.mark.parametrize("name", ["optimizer.pt", f"{ADAPTER}/{WEIGHTS_FILE}", RunState.FILE])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_checkpoint_that_is_not_whole_is_left_out(run: RunFolder, name: str, share: float) -> None:
    path = Path(run.path, name_of(10), name)
    os.truncate(path, int(path.stat().st_size * share))
    assert steps(run) == ([2, 4], 4)


def test_there_may_be_nothing_to_list(run: RunFolder) -> None:
    for step in LOSSES:
        Path(run.path, name_of(step), ADAPTER, CONFIG_FILE).parent.rename(Path(run.path, f"gone-{step}"))
    with pytest.raises(TrainingError, match="has no checkpoint to publish"):
        run.result()


def test_a_file_of_a_run_is_replaced_whole(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write("published.json", b"first")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            run.write("published.json", b"second")
    assert run.read("published.json") == b"first"
    assert not list(Path(run.path).glob(".published*"))
    assert Path(run.path, "published.json").stat().st_mode & 0o077 == 0o666 & ~mask() & 0o077


def mask() -> int:
    os.umask(found := os.umask(0))
    return found


def test_half_an_optimizer_is_an_integrity_error(run: RunFolder) -> None:
    folder = Path(run.path, name_of(2))
    for content in (b"", b"PK", (folder / "optimizer.pt").read_bytes()[:700]):
        (folder / "optimizer.pt").write_bytes(content)
        with pytest.raises(IntegrityError, match="missing, damaged"):
            read_optimizer(folder)
