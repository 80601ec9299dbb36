"""What a run wrote of itself, read without Ray: its events, a bounded part of them where there are many."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from pyarrow import fs as pafs

from loray.errors import StoreError
from loray.locations import FileLocation, parse_location
from loray.settings import Settings
from loray.spec import split_qualified
from loray.store import open_filesystem

MAX_BYTES = 4 << 20
_PARTS = 16  # of a longer file, evenly spread: its beginning and its end are among them
_MOST_RUNS = 16  # of one adapter that are looked at for one job
_SKEW = timedelta(minutes=5)  # between the clocks of the catalog and of the driver


def read_events(settings: Settings, name: str, job_id: str, began_at: datetime) -> list[str]:
    """Lines of `events.jsonl` of the run that this job began, in their order; none where no run is found.

    `name` is the adapter's, and `began_at` when the job was submitted. At most `MAX_BYTES` are read. While a driver
    works on a run in a bucket, its events are in the driver's LORAY_HOME; where both places have some, the longer
    file is read, since a driver may have gone on elsewhere. Raises StoreError.
    """
    tenant, bare = split_qualified(name)
    place = f"runs/{bare}" if tenant is None else f"runs/_{tenant}/{bare}"
    here: Any = pafs.LocalFileSystem()
    filesystem, root = here, str(settings.home)
    if not isinstance(parse_location(settings.store), FileLocation):
        filesystem, root = open_filesystem(settings.store)
    try:
        run = _run_of(filesystem, f"{root}/{place}", job_id, began_at)
        if run is None:
            return []
        places = ((here, str(settings.home)), (filesystem, root))
        found = [(where, where.get_file_info(f"{at}/{place}/{run}/events.jsonl")) for where, at in places]
        where, longest = max(found, key=lambda item: item[1].size or 0)
        return _lines(where, longest.path) if longest.is_file else []
    except OSError as e:
        raise StoreError(f"the runs of {name!r} cannot be read: {e}") from e


def _run_of(filesystem: Any, folder: str, job_id: str, began_at: datetime) -> str | None:
    """The name of the run's folder, which is the time at which it began."""
    earliest = (began_at.astimezone(UTC) - _SKEW).strftime("%Y%m%d-%H%M%S")
    found = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    later = sorted(info.base_name for info in found if info.base_name >= earliest)
    for run in later[:_MOST_RUNS]:
        path = f"{folder}/{run}/job_id"
        if filesystem.get_file_info(path).is_file:
            with filesystem.open_input_stream(path) as file:
                if file.read(256).decode(errors="replace") == job_id:
                    return str(run)
    return None


def _lines(filesystem: Any, path: str) -> list[str]:
    """All lines; of a file longer than MAX_BYTES, the whole lines in parts of it."""
    with filesystem.open_input_file(path) as file:
        size = file.size()
        if size <= MAX_BYTES:
            return bytes(file.read()).decode(errors="replace").splitlines()
        lines: list[str] = []
        length = MAX_BYTES // _PARTS
        for part in range(_PARTS):
            begin = part * (size - length) // (_PARTS - 1)
            whole = bytes(file.read_at(length, begin)).decode(errors="replace").splitlines()
            lines += whole[1 if part else 0 : -1 if part < _PARTS - 1 else None]
        return lines
