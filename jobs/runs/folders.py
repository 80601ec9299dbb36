"""Run folders, and Ray Train's checkpoints in them: `NAME/TIME`, and `_TENANT/NAME/TIME` for another tenant than the
default one (no adapter's name begins with `_`).

step_000100/…     checkpoints; with `checkpoint_manager_snapshot.json` they are Ray Train's
events.jsonl      every event of the run
tensorboard/…     the same for TensorBoard
job_id            of the job that created the run
published.json    what was published from the run, and with which recipe
lock, lock/…      held by the driver that works on the run

Ray Train lists the checkpoints in its snapshot, one file, which it overwrites with each checkpoint. Where that write
was cut off, or somebody has removed a checkpoint by hand, it refuses the whole run; `RunFolder.repair` lists what is
there.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, Literal, TypeVar

from pyarrow import fs as pafs
from ray.train import Result

from jobs.runs.history import PUBLISHED, folder_of
from jobs.runs.leases import leased
from loray.adapters.peft_format import read_tensors
from loray.errors import ConflictError, LorayError, SpecError, StoreError, TrainingError
from loray.files import replacing
from loray.locations import FileLocation, parse_location
from loray.settings import Settings
from loray.spec import Frozen
from loray.store import ObjectStore, open_filesystem
from loray.store.s3 import S3Store
from loray.telemetry import get_logger
from loray.train.checkpoint import ADAPTER, RunState, read_optimizer, read_state

log = get_logger(__name__)
M = TypeVar("M", bound=Frozen)

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train writes it with the first checkpoint
SCORE = "score"  # the metric by which Ray ranks checkpoints
PREFIX = "step_"  # of their folders
BATCH = "batch.json"  # the micro-batches of a run, where they were cut to fit
PART_OF = "part_of"  # in the run of an adapter that a job trains among others: that job's folder, below `many`
_EVENTS = "events.jsonl"
_BOARD = "tensorboard"
_JOB_ID = "job_id"
_LOCK = "lock"


def score(eval_loss: float | None) -> float:
    """Returns the metric that ranks a checkpoint; lower is better.

    It is finite, because Ray writes it into JSON. Checkpoints that were not evaluated come last.
    """
    return sys.float_info.max if eval_loss is None else eval_loss


def metrics_of(step: int, eval_loss: float | None) -> dict[str, Any]:
    return {"event": "checkpoint", "step": step, "eval_loss": eval_loss, SCORE: score(eval_loss)}


def name_of(step: int) -> str:
    return f"{PREFIX}{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def last_step(filesystem: Any, path: str) -> int | None:
    """Reads the step of the last checkpoint that Ray Train lists in the run at `path`; None where there is none."""
    try:
        with filesystem.open_input_stream(f"{path}/{SNAPSHOT}") as file:
            return step_of(Path(json.loads(file.read())["latest_checkpoint_result"]["checkpoint_dir_name"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_sound(snapshot: Path) -> bool:
    """Says whether Ray Train could read its list of checkpoints, and would find all of them."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState  # private

    try:
        known = _CheckpointManagerState.model_validate_json(snapshot.read_bytes())
    except (OSError, ValueError):  # pydantic's errors are ValueErrors
        return False
    return all((snapshot.parent / result.checkpoint_dir_name).is_dir() for result in known.checkpoint_results)


def _snapshot(states: dict[int, RunState]) -> str:
    """Makes the list as Ray Train does: the best checkpoint last where they are ranked, else the latest."""
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager as theirs  # private: no public way

    steps = sorted(states)
    results = {
        step: theirs._TrainingResultState(
            checkpoint_dir_name=name_of(step), metrics=metrics_of(step, states[step].eval_loss)
        )
        for step in steps
    }
    ordered = steps
    if states[steps[-1]].recipe.evaluation.keep_best:
        ordered = sorted(steps, key=lambda step: score(states[step].eval_loss), reverse=True)
    made = theirs._CheckpointManagerState(
        checkpoint_results=[results[step] for step in ordered],
        checkpoint_report_indices=[steps.index(step) for step in ordered],
        latest_checkpoint_result=results[steps[-1]],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(steps),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    return str(made.model_dump_json())


@dataclass(frozen=True)
class RunFolder:
    """A run on this machine's disk: `path` in `filesystem`. Raises StoreError if it cannot be read or written."""

    filesystem: Any
    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        """The last part of its path: the time at which it began."""
        return self.path.rpartition("/")[2]

    @property
    def storage(self) -> dict[str, Any]:
        """The arguments of Ray Train's RunConfig that make it this run."""
        parent = self.path.rpartition("/")[0]
        return {"name": self.name, "storage_path": parent, "storage_filesystem": self.filesystem}

    @property
    def job_id(self) -> str | None:
        """Id of the job that created the run. It is part of the adapter's identity, so resuming does not change it."""
        data = self.read(_JOB_ID)
        return None if data is None else data.decode() or None

    @property
    def has_checkpoint(self) -> bool:
        with _translate_errors(self):
            return self._has(SNAPSHOT)

    def read(self, name: str) -> bytes | None:
        with _translate_errors(self):
            if not self._has(name):
                return None
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
                return bytes(file.read())

    def write(self, name: str, data: bytes) -> None:
        """Writes in one step: a driver that dies, or a full disk, leaves what was there before."""
        with _translate_errors(self), replacing(Path(self.path, name)) as file:
            file.write(data)

    def read_model(self, kind: type[M], name: str) -> M | None:
        """Returns what a file of JSON holds; None where there is none, or it was not written to its end."""
        data = self.read(name)
        try:
            return None if data is None else kind.parse(json.loads(data), source=f"{name} of {self}")
        except ValueError as e:  # and SpecError
            log.warning("%s is left out: %s", name, e)
            return None

    def write_model(self, name: str, model: Frozen) -> None:
        self.write(name, model.model_dump_json(indent=2).encode() + b"\n")

    def keep(self, folder: Path, name: str) -> None:
        """Moves a folder of this machine into the run, where it appears whole, instead of one that has this name."""
        with _translate_errors(self):
            into, partial = Path(self.path, name), Path(self.path, f".{name}")
            for old in (partial, into):
                shutil.rmtree(old, ignore_errors=True)
            shutil.move(folder, partial)
            partial.rename(into)

    def names(self) -> list[str]:
        """Lists the files of the folder, without folders in it."""
        with _translate_errors(self):
            found = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.is_file)

    def folders(self, prefix: str = "") -> list[str]:
        """Lists the folders in the folder whose names begin so."""
        with _translate_errors(self):
            found = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
            kind = pafs.FileType.Directory
            return sorted(info.base_name for info in found if info.type == kind and info.base_name.startswith(prefix))

    def remove(self, name: str) -> None:
        """Removes a file of the folder."""
        with _translate_errors(self):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def remove_folder(self, name: str) -> None:
        """Removes a folder in the folder."""
        with _translate_errors(self):
            self.filesystem.delete_dir(f"{self.path}/{name}")

    def remove_all(self) -> None:
        """Removes the folder with all that is in it."""
        with _translate_errors(self):
            self.filesystem.delete_dir(self.path)

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Yields a folder of the run as one of this machine."""
        yield Path(self.path, name)

    def repair(self) -> None:
        """Lists the run's checkpoints that are whole anew for Ray Train, where it could not read the list or would miss
        one that it names. Nothing changes where the list is sound, or there is no checkpoint.
        """
        with _translate_errors(self):
            snapshot = Path(self.path, SNAPSHOT)
            if _is_sound(snapshot):
                return
            whole = {}
            for checkpoint in Path(self.path).glob(f"{PREFIX}*"):
                try:  # a file may be missing, or not written to its end
                    read_optimizer(checkpoint)
                    read_tensors(checkpoint / ADAPTER)
                    whole[step_of(checkpoint)] = read_state(checkpoint)
                except LorayError as e:
                    log.warning("%s is left out: %s", checkpoint, e)
            if whole:
                steps = ", ".join(map(str, sorted(whole)))
                log.warning(
                    "the list of checkpoints in %s is missing or damaged; it is made anew, of steps %s", self, steps
                )
                with replacing(snapshot) as file:
                    file.write(_snapshot(whole).encode())

    def result(self) -> Result:
        """Returns Ray Train's Result of the run, finished or not. TrainingError if the run has no checkpoint."""
        self.repair()
        if not self.has_checkpoint:
            raise TrainingError(f"the run in {self} has no checkpoint to publish; train it with --resume")
        with _translate_errors(self):
            return Result.from_path(self.path, storage_filesystem=self.filesystem)

    @contextmanager
    def locked(self, job_id: str, lost: Callable[[str], None]) -> Iterator[None]:
        """Locks the run for one driver. The lock ends with the driver's process.

        ConflictError if another driver holds it. If the lock is lost before the block ends, `lost(reason)` is called
        from another thread.
        """
        with Path(self.path, _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise ConflictError(f"another driver is at work on the run in {self}; wait for it, or stop it") from e
            yield

    @contextmanager
    def history(self) -> Iterator[tuple[Path, Path]]:
        """Yields a file of this machine to append events to, one a line, and TensorBoard's folder. When the block ends,
        the run contains what was appended.
        """
        yield Path(self.path, _EVENTS), Path(self.path, _BOARD)

    def _has(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(f"{self.path}/{name}").is_file)


@dataclass(frozen=True)
class SharedRunFolder(RunFolder):
    """A run in a bucket, which any machine can resume; a lease at `key` in `objects` locks it.

    `scratch` holds the history while a driver of this machine works on the run.
    """

    objects: ObjectStore
    key: str
    scratch: Path
    _lost: Event = field(default_factory=Event, compare=False, repr=False)

    def __str__(self) -> str:
        return f"s3://{self.path}"

    def write(self, name: str, data: bytes) -> None:
        """Writes an object, which appears whole."""
        with _translate_errors(self), self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
            file.write(data)

    def keep(self, folder: Path, name: str) -> None:
        """Copies a folder into the run, file by file; the last one is that without which it is not whole."""
        with _translate_errors(self):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.suffix == ".json" and path.parent == folder):
                at = f"{self.path}/{name}/{path.relative_to(folder)}"
                pafs.copy_files(str(path), at, destination_filesystem=self.filesystem)

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="loray-run-") as here, _translate_errors(self):
            pafs.copy_files(f"{self.path}/{name}", here, source_filesystem=self.filesystem)
            yield Path(here)

    def repair(self) -> None:
        """Does nothing: a bucket has an object whole, or as it was before."""

    @contextmanager
    def locked(self, job_id: str, lost: Callable[[str], None]) -> Iterator[None]:
        def on_loss(why: str) -> None:
            self._lost.set()
            lost(why)

        with leased(self.objects, f"{self.key}/{_LOCK}/", job_id=job_id, lost=on_loss):
            yield

    @contextmanager
    def history(self) -> Iterator[tuple[Path, Path]]:
        self.scratch.mkdir(parents=True, exist_ok=True)
        path, board = self.scratch / _EVENTS, self.scratch / _BOARD
        known = self.read(_EVENTS) or b""
        # A killed driver of this machine leaves a longer history here, which begins with the bucket's.
        if not path.is_file() or not path.read_bytes().startswith(known):
            path.write_bytes(known)
        try:
            yield path, board
        finally:
            try:
                if self._lost.is_set():
                    log.warning("the run in %s is another driver's now; this one's history stays in %s", self, path)
                else:
                    for file in (path, *board.glob("*")):
                        self.write(str(file.relative_to(self.scratch)), file.read_bytes())
            except StoreError as e:  # raising it would hide an error that ended the run
                log.warning("%s; its history stays in %s", e, path)


@dataclass(frozen=True)
class Runs:
    """All runs below `root`; `make(name/time)` returns one.

    `folder` holds the runs of a store that is a folder. They stay there if the store becomes a bucket.
    """

    filesystem: Any
    root: str
    make: Callable[[str], RunFolder]
    folder: Path

    def new(self, name: str, job_id: str) -> RunFolder:
        """Makes a run. `name`: of the adapter, as `spec.qualified_name` makes it."""
        return self.open(f"{folder_of(name)}/{datetime.now(UTC).strftime('%Y%m%d-%H%M%S-%f')}", job_id)

    def open(self, at: str, job_id: str) -> RunFolder:
        """Opens the run at `name/time`, or below a sweep's; makes it for this job if there is none yet."""
        run = self.make(at)
        if run.job_id is None:
            with _translate_errors(run):
                self.filesystem.create_dir(run.path)
            run.write(_JOB_ID, job_id.encode())
        return run

    def latest(self, name: str) -> RunFolder:
        """Returns the last run of this adapter. SpecError if there is none."""
        return self._newest_first(name)[0]

    def resumable(self, name: str) -> RunFolder:
        """Finds the run of this adapter to go on with: of those since the last published one the last that has a
        checkpoint, else the last run. SpecError if there is none.
        """
        found: list[RunFolder] = []
        for run in self._newest_first(name):
            if found and run.read(PUBLISHED) is not None:
                break
            if run.has_checkpoint:
                return run
            found.append(run)
        return found[0]

    def newest_first(self, name: str) -> list[RunFolder]:
        """Returns all runs of this adapter."""
        at = folder_of(name)
        return [self.make(f"{at}/{time}") for time in reversed(self.make(at).folders())]

    def _newest_first(self, name: str) -> list[RunFolder]:
        """Returns at least one run. SpecError if there is none."""
        found = self.newest_first(name)
        if not found:
            raise SpecError(
                f"there is no run of {name!r} in {self.make(folder_of(name))} to go on with; train it without --resume"
                + self._of_the_folder_store(name)
            )
        return found

    def _of_the_folder_store(self, name: str) -> str:
        folder = self.folder / folder_of(name)
        found = any(folder.glob(f"*/{_JOB_ID}"))  # a run in a bucket has no job_id there
        hint = f", or set LORAY_STORE to the folder store: its runs in {folder} are not looked at now"
        return hint if found else ""


def open_runs(settings: Settings, kind: Literal["runs", "sweeps", "many", "trainers", "states"] = "runs") -> Runs:
    """Opens the runs, or the folders of sweeps or of jobs of several adapters. Raises SettingsError if the store's URL
    is wrong. Reads and writes nothing yet.
    """
    here = settings.home / kind
    location = parse_location(settings.store)
    if isinstance(location, FileLocation):
        disk = pafs.LocalFileSystem()
        return Runs(disk, str(here), lambda run: RunFolder(disk, str(here / run)), here)
    bucket, prefix = open_filesystem(settings.store)
    objects = S3Store(location, quick=True)
    return Runs(
        bucket,
        f"{prefix}/{kind}",
        lambda run: SharedRunFolder(bucket, f"{prefix}/{kind}/{run}", objects, f"{kind}/{run}", here / run),
        here,
    )


@contextmanager
def _translate_errors(run: RunFolder) -> Iterator[None]:
    """Turns pyarrow's errors, which are OSErrors, into StoreError."""
    try:
        yield
    except OSError as e:
        raise StoreError(f"the run in {run} cannot be read or written: {e}") from e
