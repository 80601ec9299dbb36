"""Writes the golden files: `python -m tests.golden.write` all of them, with names of files those alone.

The published adapters (`adapters`) and the backup (`catalog.backup`) are kept as they are, since later code must read
them: they are written where they are missing or named.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.golden import exact
from tests.golden.frozen import FOLDER, TEXTS, as_rows, versions


def write(names: set[str]) -> None:
    """Write the files of these names, all without any."""

    def is_wanted(*files: str) -> bool:
        return not names or not names.isdisjoint(files)

    def put(name: str, text: str) -> None:
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"wrote {name}")

    kept = [path for path in (exact.ADAPTERS, exact.BACKUP) if path.name in names or not path.exists()]
    for name, text in TEXTS.items():
        if is_wanted(name):
            put(name, text())
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = exact.make_base(folder / "base")
        if kept or is_wanted("adapters.json", "forms.json"):
            with exact.published(base, folder / "published") as made:
                if is_wanted("adapters.json"):
                    put("adapters.json", exact.adapters_text(made))
                if is_wanted("forms.json"):
                    put("forms.json", as_rows(exact.forms(made, folder)))
                if exact.ADAPTERS in kept:
                    exact.keep_adapters(folder / "published")
                if exact.BACKUP in kept:
                    exact.write_backup(made, exact.BACKUP)
                print(*(f"wrote {path.name}" for path in kept), sep="\n", end="\n" * bool(kept))
        if is_wanted("tokens.json"):
            put("tokens.json", as_rows(exact.tokens(base)))
        if is_wanted("steps.json"):
            weak = exact.make_base(folder / "weak", std=0.05)
            put("steps.json", as_rows(exact.steps(weak, folder / "steps")))
    put("versions.json", versions())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write(set(sys.argv[1:]))
