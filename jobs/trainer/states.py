"""Saved states of a trainer's models: folders in the format of checkpoints, below `states` of the home or store.

adapter/       PEFT's format
optimizer.pt   masters and AdamW's moments
state.json     SavedState
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import torch

from jobs.runs.folders import RunFolder, Runs, SharedRunFolder
from loray.adapters.peft_format import AdapterFiles, write_folder
from loray.errors import IntegrityError, SpecError
from loray.spec import AdapterSpec, Frozen, Sha256
from loray.train.checkpoint import ADAPTER, OPTIMIZER, read_optimizer
from loray.train.optimizer import OptimizerState


class SavedState(Frozen):
    """Says what a saved state is of: a model's adapter after `step` updates, and the fingerprint of its base."""

    FILE: ClassVar[str] = "state.json"

    adapter: AdapterSpec
    base: str
    base_fingerprint: Sha256
    step: int
    num_tokens: int
    saved_at: datetime


def as_folder(name: str) -> str:
    """Write a name so that it is one folder's, whatever is in it. Raises SpecError for no name."""
    if not name:
        raise SpecError("a name is empty; give it one character at least")
    return quote(name, safe="") if name.strip(".") else name.replace(".", "%2E")


def save_state(
    states: Runs, place: tuple[str, str, str], adapter: AdapterFiles, optimizer: OptimizerState, state: SavedState
) -> tuple[str, int]:
    """Write a state at `place`, base, model and name, where another one is replaced. Returns its folder, and its bytes.
    It appears whole. Raises StoreError.
    """
    folder = states.make("/".join(map(as_folder, place)))
    with tempfile.TemporaryDirectory(prefix="loray-state-") as scratch:
        made = Path(scratch)
        write_folder(made / ADAPTER, *adapter)
        torch.save(optimizer._asdict(), made / OPTIMIZER)
        (made / SavedState.FILE).write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
        nbytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if not isinstance(folder, SharedRunFolder):
            _put_in_place(made, Path(folder.path))
            return folder.path, nbytes
        for path in sorted(made.rglob("*"), key=lambda path: path.name == SavedState.FILE):  # which comes last
            if path.is_file():
                folder.write(path.relative_to(made).as_posix(), path.read_bytes())
    return str(folder), nbytes


def delete_state(states: Runs, path: str) -> None:
    """Delete a state by the folder that `save_state` has returned. Raises SpecError for another folder."""
    folder = _found(states, path)
    if folder.read(SavedState.FILE) is not None:
        folder.remove_all()


def _found(states: Runs, path: str) -> RunFolder:
    root = str(states.make("x")).removesuffix("x")
    if not path.startswith(root) or ".." in path.split("/"):
        raise SpecError(f"{path!r} is no saved state of a model; name the folder that a save has returned")
    return states.make(path.removeprefix(root))


def load_state(states: Runs, path: str) -> tuple[SavedState, OptimizerState]:
    """Read a state by the folder that `save_state` has returned. Raises SpecError where there is none, and
    IntegrityError where it is damaged.
    """
    folder = _found(states, path)
    content = folder.read(SavedState.FILE)
    if content is None:
        raise SpecError(f"there is no saved state in {path}; it was deleted, or never written to its end")
    try:
        state = SavedState.model_validate_json(content)
    except ValueError as e:
        raise IntegrityError(f"{SavedState.FILE} in {path} is damaged: {e}") from e
    with _local(folder) as local:
        read = read_optimizer(local)
        # Out of a mapped file, which may be gone when they are used.
        masters, exp_avg, exp_avg_sq = ({n: t.clone() for n, t in part.items()} for part in read[:3])
    return state, OptimizerState(masters, exp_avg, exp_avg_sq, read.num_updates)


@contextmanager
def _local(folder: RunFolder) -> Iterator[Path]:
    if not isinstance(folder, SharedRunFolder):
        yield Path(folder.path)
        return
    with tempfile.TemporaryDirectory(prefix="loray-state-") as scratch:
        (Path(scratch) / OPTIMIZER).write_bytes(folder.read(OPTIMIZER) or b"")
        yield Path(scratch)


def _put_in_place(made: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder.parent) as scratch:
        beside = Path(scratch) / "new"
        shutil.copytree(made, beside)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        beside.rename(folder)
