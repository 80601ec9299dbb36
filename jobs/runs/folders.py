"""Run folders: beside a store on S3 (`PREFIX/runs/NAME/TIME`), else in `LORAY_HOME/runs/NAME/TIME` on this machine.

step_000100/…     checkpoints, and `checkpoint_manager_snapshot.json`: Ray Train's
events.jsonl      the run's history
tensorboard/…     the same for TensorBoard
job_id            of the job that created the run
published.json    what was published from it, and by which recipe
lock, lock/…      held by the driver at work
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from pyarrow import fs as pafs
from ray.train import Result

from jobs.runs.leases import leased
from loray.errors import ConflictError, SpecError, StoreError, TrainingError
from loray.locations import FileLocation, parse_location
from loray.settings import Settings
from loray.store import ObjectStore, open_filesystem
from loray.store.s3 import S3Store
from loray.telemetry import get_logger

log = get_logger(__name__)

_EVENTS = "events.jsonl"
_BOARD = "tensorboard"
_JOB_ID = "job_id"
_LOCK = "lock"
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train writes it with the first checkpoint


class History(NamedTuple):
    """Files of this machine: `events`, one a line, and `board`, the folder of TensorBoard's."""

    events: Path
    board: Path

    @classmethod
    def below(cls, folder: Path) -> History:
        return cls(folder / _EVENTS, folder / _BOARD)


@dataclass(frozen=True)
class RunFolder:
    """A run on this machine's disk: `path` in `filesystem`. Raises StoreError where it cannot be read or written."""

    filesystem: Any
    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        """When it began: the last part of its path."""
        return self.path.rpartition("/")[2]

    @property
    def storage(self) -> dict[str, Any]:
        """The arguments of Ray Train's RunConfig that make it this run."""
        parent = self.path.rpartition("/")[0]
        return {"name": self.name, "storage_path": parent, "storage_filesystem": self.filesystem}

    @property
    def job_id(self) -> str | None:
        """Of the job that created the run: part of the adapter's identity, so a resumed job must not bring its own."""
        data = self.read(_JOB_ID)
        return None if data is None else data.decode() or None

    def read(self, name: str) -> bytes | None:
        with _clear_errors(self):
            if not self._has(name):
                return None
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
                return bytes(file.read())

    def write(self, name: str, data: bytes) -> None:
        with _clear_errors(self), self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
            file.write(data)

    def result(self) -> Any:
        """Ray Train's Result of the run, finished or not. TrainingError where it has no checkpoint."""
        with _clear_errors(self):
            if not self._has(_RAY_SNAPSHOT):
                raise TrainingError(f"the run in {self} has no checkpoint to publish; train it with --resume")
            return Result.from_path(self.path, storage_filesystem=self.filesystem)

    @contextmanager
    def locked(self, job_id: str, lost: Callable[[str], None]) -> Iterator[None]:
        """One driver a run; the lock ends with its process. Raises ConflictError.

        `lost` is called from a thread where the lock had to be given up meanwhile.
        """
        with Path(self.path, _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise ConflictError(f"another driver is at work on the run in {self}; wait for it, or stop it") from e
            yield

    @contextmanager
    def history(self) -> Iterator[History]:
        """To be added to on this machine; it is the run's when the block ends."""
        yield History.below(Path(self.path))

    def _has(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(f"{self.path}/{name}").is_file)


@dataclass(frozen=True)
class SharedRunFolder(RunFolder):
    """A run that other machines can go on with: in a bucket, locked by a lease at `key` in `objects`.

    `scratch` is where its history lies while a driver of this machine is at work.
    """

    objects: ObjectStore
    key: str
    scratch: Path
    _lost: Event = field(default_factory=Event, compare=False, repr=False)

    def __str__(self) -> str:
        return f"s3://{self.path}"

    @contextmanager
    def locked(self, job_id: str, lost: Callable[[str], None]) -> Iterator[None]:
        def on_loss(why: str) -> None:
            self._lost.set()
            lost(why)

        with leased(self.objects, f"{self.key}/{_LOCK}/", job_id=job_id, lost=on_loss):
            yield

    @contextmanager
    def history(self) -> Iterator[History]:
        self.scratch.mkdir(parents=True, exist_ok=True)
        history = History.below(self.scratch)
        path = history.events
        known = self.read(_EVENTS) or b""
        if not path.is_file() or not path.read_bytes().startswith(known):  # else a driver of this machine was killed
            path.write_bytes(known)
        try:
            yield history
        finally:
            try:
                if self._lost.is_set():
                    log.warning("the run in %s is another driver's now; this one's history stays in %s", self, path)
                else:
                    for file in (path, *history.board.glob("*")):
                        self.write(str(file.relative_to(self.scratch)), file.read_bytes())
            except StoreError as e:  # an error that ended the run says more
                log.warning("%s; its history stays in %s", e, path)


@dataclass(frozen=True)
class Runs:
    """All runs below `root`. `make(name/time)` is the folder of one.

    `folder`: where runs lie while the store is a folder. They stay there when the store becomes a bucket.
    """

    filesystem: Any
    root: str
    make: Callable[[str], RunFolder]
    folder: Path

    def new(self, name: str, job_id: str) -> RunFolder:
        run = self.make(f"{name}/{datetime.now(UTC).strftime('%Y%m%d-%H%M%S-%f')}")
        with _clear_errors(run):
            self.filesystem.create_dir(run.path)
        run.write(_JOB_ID, job_id.encode())
        return run

    def latest(self, name: str) -> RunFolder:
        """SpecError where there is none."""
        folder = pafs.FileSelector(f"{self.root}/{name}", allow_not_found=True)
        with _clear_errors(self.make(name)):
            found = self.filesystem.get_file_info(folder)
        times = sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)
        if not times:
            raise SpecError(
                f"there is no run of {name!r} in {self.make(name)} to go on with; train it without --resume"
                + self._of_the_folder_store(name)
            )
        return self.make(f"{name}/{times[-1]}")

    def _of_the_folder_store(self, name: str) -> str:
        found = any((self.folder / name).glob(f"*/{_JOB_ID}"))  # of a run in a bucket its history alone may lie there
        hint = f", or set LORAY_STORE to the folder store: its runs in {self.folder / name} are not looked at now"
        return hint if found else ""


def open_runs(settings: Settings) -> Runs:
    """Raises SettingsError where the store's URL is wrong. Nothing is read or written yet."""
    here = settings.home / "runs"
    location = parse_location(settings.store)
    if isinstance(location, FileLocation):
        disk = pafs.LocalFileSystem()
        return Runs(disk, str(here), lambda run: RunFolder(disk, str(here / run)), here)
    bucket, prefix = open_filesystem(settings.store)
    objects = S3Store(location, quick=True)
    return Runs(
        bucket,
        f"{prefix}/runs",
        lambda run: SharedRunFolder(bucket, f"{prefix}/runs/{run}", objects, f"runs/{run}", here / run),
        here,
    )


@contextmanager
def _clear_errors(run: RunFolder) -> Iterator[None]:
    """Of pyarrow, whose errors are OSErrors."""
    try:
        yield
    except OSError as e:
        raise StoreError(f"the run in {run} cannot be read or written: {e}") from e
