"""The files of a recipe's data sources. It is quick to import: the command that submits a job uses it, too.

A source is a file, a glob, a folder, or a data set that Hugging Face's `datasets` has saved with `save_to_disk`. An
s3:// source is the same in a bucket, a hf:// source a data set of the Hugging Face hub, a files:// source a file that
was uploaded to `/v1/files`; they are read from a copy on this machine.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from loray.errors import DataError

# Of the files that a folder stands for.
SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".json", ".csv", ".tsv")
HUB = "hf://"  # of data sets of the Hugging Face hub
UPLOADED = "files://"  # of files of `/v1/files`, by their ids
ARROW = ".arrow"  # a shard of a saved data set
# What `save_to_disk` writes beside the shards, and above the splits.
_INFO, _STATE, _SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"
_NOTES = (_INFO, _STATE, _SPLITS, "dataset_infos.json")  # which are no data
_SPLIT = "train"


class RemoteFile:
    """A file elsewhere. Its copy on this machine is empty until `fetch` is called.

    `state` names its content, as JSON: another content has another state. `read` writes it to the path of the copy.
    """

    def __init__(self, copy: Path, state: tuple[str | int, ...], read: Callable[[Path], None]) -> None:
        self.state = state
        self._copy, self._read, self._is_here = copy, read, False

    def fetch(self) -> None:
        """Read the copy, once. Raises DataError."""
        if not self._is_here:
            self._read(self._copy)
            self._is_here = True


class Copy(NamedTuple):
    """The copy of a source elsewhere: a file or a folder, and the files of it that are fetched when they are read."""

    path: Path
    remote: Mapping[Path, RemoteFile] = MappingProxyType({})


class SourceFiles(NamedTuple):
    """Errors use `name`; the file is read from `path`, of a remote one when it has been fetched."""

    name: str
    path: str
    remote: RemoteFile | None = None

    def __str__(self) -> str:
        return self.name

    def fetched(self) -> str:
        """Fetch the content, and return its path. Raises DataError."""
        if self.remote is not None:
            self.remote.fetch()
        return self.path


def find_files(source: str, copy: Copy | None = None) -> tuple[SourceFiles, ...]:
    """Find the files of `source`, sorted by path. `copy` is of a remote one.

    Raises DataError where a folder or a glob has none. That a single file exists is not checked.
    """
    if copy is None and "://" in source:
        return (SourceFiles(source, source),)
    root, remote = (Path(source).expanduser(), {}) if copy is None else copy
    if root.is_dir():
        for path, file in remote.items():
            if path.name in (_STATE, _SPLITS):
                file.fetch()
        files, name = list(_in_folder(source, root)), fixed_part(without_options(source)).rstrip("/")
        found = tuple(
            SourceFiles(f"{name}/{file.relative_to(root).as_posix()}", str(file), remote.get(file)) for file in files
        )
    elif copy is None and is_glob(source) and not root.is_file():
        matches = map(Path, sorted(glob.glob(str(root), recursive=True)))
        found = tuple(SourceFiles(str(file), str(file)) for file in matches if file.is_file())
    else:
        return (SourceFiles(source, str(root), remote.get(root)),)
    if not found:
        raise DataError(
            f"{source} has no data file: a folder holds {', '.join(SUFFIXES)} or a data set saved by datasets, a glob "
            "matches files"
        )
    return found


def uploaded_files(source: str) -> tuple[Path, ...]:
    """List all local files that `source` is read from: data files, and what describes a saved data set."""
    files = [Path(found.path) for found in find_files(source)]
    folders = {folder for file in files if file.suffix == ARROW for folder in (file.parent, file.parent.parent)}
    notes = (folder / name for folder in folders for name in (_INFO, _STATE, _SPLITS))
    return tuple(sorted({*files, *(note for note in notes if note.is_file())}))


def is_glob(source: str) -> bool:
    """True for a pattern. `?` begins the options of a URL, so it is no wildcard there. A split of the hub may have a
    slice.
    """
    return not source.startswith(HUB) and any(char in source for char in ("*[" if "://" in source else "*?["))


def without_options(source: str) -> str:
    return source.partition("?")[0] if "://" in source else source


def fixed_part(source: str) -> str:
    """Cut a glob to the folder above its first wildcard, with a slash; any other source stays as it is."""
    if not is_glob(source):
        return source
    parts = source.split("/")
    first = next(i for i, part in enumerate(parts) if is_glob(part))
    return "/".join(parts[:first]) + "/"


def matches(path: str, pattern: str) -> bool:
    """Match a relative path with a glob, in which `**` is any number of folders. Hidden files match nothing."""
    return _matches(PurePosixPath(path).parts, PurePosixPath(pattern).parts)


def _matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return _matches(parts, patterns[1:]) or (bool(parts) and _is_shown(parts[0]) and _matches(parts[1:], patterns))
    return (
        bool(parts) and _is_shown(parts[0]) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])
    )


def _is_shown(name: str) -> bool:
    return not name.startswith((".", "_"))


def is_read(path: str) -> bool:
    """True where a file somewhere in a folder can be part of a source: data that is shown, or notes of a data set."""
    parts = PurePosixPath(path)
    named = parts.suffix in (*SUFFIXES, ARROW)  # notes are .json
    return named and all(map(_is_shown, parts.parts))


def _in_folder(source: str, folder: Path) -> Iterator[Path]:
    if (folder / _SPLITS).is_file():
        splits = _read(source, folder / _SPLITS).get("splits")
        if not (folder / _SPLIT / _STATE).is_file():
            raise DataError(f"{source} has splits {', '.join(splits or ())} but no {_SPLIT}: name the folder of one")
        folder = folder / _SPLIT
    if (folder / _STATE).is_file():
        state = _read(source, folder / _STATE)
        if state.get("_indices_data_files"):
            raise DataError(f"{source} is a selection of rows: save it after flatten_indices()")
        try:
            names = [str(shard["filename"]) for shard in state["_data_files"]]
        except (KeyError, TypeError) as e:
            raise DataError(f"{source} is no data set that datasets saved: {_STATE} lists no _data_files") from e
        if outside := [name for name in names if Path(name).name != name]:
            raise DataError(f"{source}: {_STATE} names {outside[0]!r}, which is no file of that folder")
        yield from (folder / name for name in names)
        return
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        is_data = file.suffix in SUFFIXES and file.name not in _NOTES
        if is_data and all(map(_is_shown, relative.parts)) and file.is_file():
            yield file


def _read(source: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{source}: {path.name} cannot be read: {e}") from e
    return data if isinstance(data, dict) else {}
