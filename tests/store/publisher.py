"""A publisher as a process of its own, which the test kills: `python -m tests.store.publisher ARGUMENTS`."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path

from loray.bases.registry import get_base
from loray.catalog import Catalog
from loray.publishing import Destination, import_folder
from loray.store import AdapterStore, open_store

WEIGHTS = "adapter_model.safetensors"


def write_adapter(template: Path, folder: Path, number: int) -> None:
    """The template with another last value."""
    shutil.copytree(template, folder)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-4] + struct.pack("<f", number / 1000))
    os.utime(folder / WEIGHTS, (number, number))  # becomes its created_at: again the same digest


def main() -> None:
    options = json.loads(sys.argv[1])
    catalog = Catalog(options["catalog"], actor=f"publisher {options['first']}")
    store = AdapterStore(open_store(options["store"]))
    base = get_base(Path(options["home"]), options["base"])
    for number in range(options["first"], options["count"], options["step"]):
        with tempfile.TemporaryDirectory() as scratch:
            write_adapter(Path(options["template"]), Path(scratch) / "a", number)
            import_folder(Path(scratch) / "a", base, Destination(f"a{number % 20}", store, catalog, aliases=["prod"]))


if __name__ == "__main__":
    main()
