"""Data sets of the Hugging Face hub, `hf://org/name[/configuration][@revision][:split]`, saved on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from loray.errors import DataError
from loray.train.data.reading.files import READ_COLUMNS

_INSTEAD = "save the data set elsewhere with its save_to_disk, and name that folder"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SOURCE = re.compile(
    rf"hf://(?P<id>{_NAME}/{_NAME})(/(?P<config>{_NAME}))?(@(?P<revision>[A-Za-z0-9._-]+))?(:(?P<split>[^/@]+))?"
)


class HubSource(NamedTuple):
    """`split` is as `datasets` writes them: `train`, `train[:10%]`, `train+validation`."""

    id: str
    config: str | None
    revision: str | None
    split: str


def parse(source: str) -> HubSource:
    """Raises DataError."""
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise DataError(
            f"{source} names no data set of the Hugging Face hub: write hf://org/name, and /CONFIGURATION, @REVISION "
            "or :SPLIT after it where they are not the default ones"
        )
    return HubSource(found["id"], found["config"], found["revision"], found["split"] or "train")


def fetch(source: str, copy: Path) -> None:
    """Save the columns that training reads in the folder `copy`. Raises DataError that says what to do."""
    wanted = parse(source)
    try:
        import datasets
    except ImportError as e:
        raise DataError(
            f"{source} needs the package datasets, which is not installed here: pip install "
            f"'loray[datasets]', or {_INSTEAD}"
        ) from e
    try:
        found: Any = datasets.load_dataset(wanted.id, wanted.config, split=wanted.split, revision=wanted.revision)
        if columns := [column for column in found.column_names if column in READ_COLUMNS]:
            found = found.select_columns(columns)
        found.save_to_disk(str(copy))
    except Exception as e:  # datasets raises any error, of whatever it meets at the hub
        reason = str(e).strip().splitlines()[0].rstrip(".") if str(e).strip() else type(e).__name__
        raise DataError(
            f"{source} cannot be loaded: {reason}. Check the name, the network and HF_TOKEN; without a network, "
            f"{_INSTEAD}"
        ) from e
