"""A run's events, read without Ray: each once, and of many a bounded part."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Literal, NamedTuple

from pyarrow import fs as pafs

from loray.errors import StoreError
from loray.locations import FileLocation, parse_location
from loray.settings import Settings
from loray.spec import split_qualified
from loray.store import open_filesystem

MAX_BYTES = 4 << 20  # of one read
_PARTS = 16  # of what is longer, evenly spread: its beginning and its end are among them
_MOST_RUNS = 16  # of one adapter that are looked at for one job
_SKEW = timedelta(minutes=5)  # between the clocks of the catalog and of the driver
_MARK_BYTES = 64
PUBLISHED = "published.json"


def folder_of(name: str) -> str:
    """Returns where the runs of an adapter are: `NAME`, or `_TENANT/NAME`."""
    tenant, bare = split_qualified(name)
    return bare if tenant is None else f"_{tenant}/{bare}"


class Appended(NamedTuple):
    """Whole lines of `events.jsonl`, in their order. `is_anew`: they begin the file, and earlier ones count no more."""

    lines: list[str]
    is_anew: bool


class RunFinder:
    """Finds the run, or the sweep, that one job began, by the job's id among those of its adapter.

    `name` is the adapter's, and `began_at` when the job was submitted. Not thread-safe.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        job_id: str,
        began_at: datetime,
        kind: Literal["runs", "sweeps"] = "runs",
    ) -> None:
        self._settings, self._job_id = settings, job_id
        self._earliest = (began_at.astimezone(UTC) - _SKEW).strftime("%Y%m%d-%H%M%S")
        self._folder = f"{kind}/{folder_of(name)}"
        self._found: str | None = None
        self._others: set[str] = set()  # runs of other jobs

    @cached_property
    def places(self) -> list[tuple[Any, str]]:
        """Filesystems and their roots: this machine's, then the bucket's where there is one."""
        places: list[tuple[Any, str]] = [(pafs.LocalFileSystem(), str(self._settings.home))]
        if not isinstance(parse_location(self._settings.store), FileLocation):
            places.append(open_filesystem(self._settings.store))
        return places

    def find(self) -> str | None:
        """Returns its folder below the root of the last place; None where there is none yet. Raises OSError."""
        if self._found is None:
            self._found = self._search()
        return self._found

    def _search(self) -> str | None:
        """Looks through the folders, which are called by the time at which they began."""
        filesystem, root = self.places[-1]
        folder = f"{root}/{self._folder}"
        found = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        later = sorted(info.base_name for info in found if info.base_name >= self._earliest)
        for run in later[:_MOST_RUNS]:
            path = f"{folder}/{run}/job_id"
            if run in self._others or not filesystem.get_file_info(path).is_file:
                continue
            with filesystem.open_input_stream(path) as file:
                job_id = file.read(256).decode(errors="replace")
            if job_id == self._job_id:
                return f"{self._folder}/{run}"
            if job_id:
                self._others.add(run)
        return None


class RunEvents:
    """The events of the run that one job began; each `read` returns those that were appended since the one before.

    While a driver works on a run in a bucket, its events are in the driver's LORAY_HOME; where both places have some,
    the longer file is read, since a driver may have gone on elsewhere. Not thread-safe.
    """

    def __init__(self, settings: Settings, name: str, job_id: str, began_at: datetime) -> None:
        self._name, self._run = name, RunFinder(settings, name, job_id, began_at)
        self._path, self._size = "", -1  # of the file that was read last
        self._offset, self._mark = 0, b""  # where the next line begins, and the bytes before it

    def read(self) -> Appended:
        """Returns at most `MAX_BYTES`. No lines where no run is found yet. Raises StoreError."""
        try:
            found = self._run.find()
            return Appended([], is_anew=False) if found is None else self._read(f"{found}/events.jsonl")
        except OSError as e:
            raise StoreError(f"the runs of {self._name!r} cannot be read: {e}") from e

    def published(self) -> dict[str, Any] | None:
        """Returns the event of the version that the run has published; None where there is none. Raises StoreError."""
        try:
            found, (filesystem, root) = self._run.find(), self._run.places[-1]
            path = f"{root}/{found}/{PUBLISHED}"
            if found is None or not filesystem.get_file_info(path).is_file:
                return None
            with filesystem.open_input_stream(path) as file:
                event = json.loads(file.read())["event"]
            return dict(event)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise StoreError(f"what the run of {self._name!r} has published cannot be read: {e}") from e

    def _read(self, name: str) -> Appended:
        found = [(where, where.get_file_info(f"{root}/{name}")) for where, root in self._run.places]
        filesystem, longest = max(found, key=lambda item: item[1].size or 0)
        if not longest.is_file or (longest.path, longest.size) == (self._path, self._size):
            return Appended([], is_anew=False)
        with filesystem.open_input_file(longest.path) as file:
            size, begin, mark = file.size(), self._offset, self._mark
            is_same = longest.path == self._path and size >= begin
            is_anew = not (is_same and bytes(file.read_at(len(mark), begin - len(mark))) == mark)
            if is_anew:
                begin, mark = 0, b""
            lines, end, mark = _lines(file, begin, size, mark)
        self._path, self._size, self._offset, self._mark = longest.path, size, end, mark  # not where a read failed
        return Appended(lines, is_anew)


def _lines(file: Any, begin: int, size: int, mark: bytes) -> tuple[list[str], int, bytes]:
    """Returns the whole lines from `begin` on; of more than MAX_BYTES, those in parts of it. With them, where the next
    line begins, and the bytes before it: `begin` and `mark` where there is no whole line.
    """
    num_bytes, length = size - begin, MAX_BYTES // _PARTS
    parts = [(begin, num_bytes)]
    if num_bytes > MAX_BYTES:
        parts = [(begin + part * (num_bytes - length) // (_PARTS - 1), length) for part in range(_PARTS)]
    lines: list[str] = []
    end = begin
    for number, (at, part_bytes) in enumerate(parts):
        whole = _whole_lines(file, at, part_bytes)
        if whole:
            end, mark = at + len(whole), whole[-_MARK_BYTES:]
        lines += whole.decode(errors="replace").splitlines()[1 if number else 0 :]
    return lines, end, mark


def _whole_lines(file: Any, at: int, num_bytes: int) -> bytes:
    """Returns these bytes, without what comes after the last end of a line."""
    data = bytes(file.read_at(num_bytes, at))
    return data[: data.rfind(b"\n") + 1]
