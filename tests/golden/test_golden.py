"""Nothing that others hold on to has changed: every golden file is what the code makes now, and is still read."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.files import canonical_json
from loray.store import AdapterStore, open_store
from tests.golden import exact
from tests.golden.frozen import FOLDER, TEXTS, versions

_ADVICE = "run python -m tests.golden.write after a change that is meant"
_SHOWN = 40  # lines of a difference


def kept(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def fail(name: str, difference: str) -> None:
    """The test fails; with other libraries than those that wrote the file, which may be the reason, it is skipped."""
    written, here = json.loads(kept("versions.json")), json.loads(versions())
    others = [
        f"{library} {version}, not {here[library]}" for library, version in written.items() if here[library] != version
    ]
    if others:
        pytest.skip(f"tests/golden/{name} was written with {', '.join(others)}")
    pytest.fail(f"tests/golden/{name} has changed: {_ADVICE}\n{difference}", pytrace=False)


def compare(name: str, text: str) -> None:
    """The text is that of the file."""
    expected = kept(name)
    if text != expected:
        lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), "kept", "now", lineterm="", n=1)
        fail(name, "\n".join([*lines][:_SHOWN]))


def compare_numbers(name: str, found: dict[str, Any], *, rel: float, abs: float = 0.0) -> None:
    """The file's values, of which numbers with a point may differ so much."""
    expected = json.loads(kept(name))
    differences = [*_differences(name, json.loads(json.dumps(found)), expected, rel, abs)]
    if differences:
        fail(name, "\n".join(differences[:_SHOWN]))


def _differences(where: str, found: Any, expected: Any, rel: float, abs: float) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        for key in found:
            yield from _differences(f"{where} {key}", found[key], expected[key], rel, abs)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, pair in enumerate(zip(found, expected, strict=True)):
            yield from _differences(f"{where} [{i}]", *pair, rel, abs)
    elif isinstance(found, float) and isinstance(expected, float):
        if found != pytest.approx(expected, rel=rel, abs=abs):
            yield f"{where}: {found}, not {expected}"
    elif found != expected:
        yield f"{where}: {found}, not {expected}"


# -- what is seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_what_others_hold_on_to_stays(name: str) -> None:
    compare(name, TEXTS[name]())


# -- what is published ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return exact.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def made(base: BaseModel, folder: Path) -> Iterator[exact.Published]:
    with exact.published(base, folder) as made:
        yield made


def test_adapters_are_published_as_before(made: exact.Published) -> None:
    compare("adapters.json", exact.adapters_text(made))


def test_other_forms_are_made_as_before(made: exact.Published, tmp_path: Path) -> None:
    compare_numbers("forms.json", exact.forms(made, tmp_path), rel=1e-5)


def test_adapters_that_were_published_are_read(
    made: exact.Published, folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    """They keep their digests, and have the values of those that are made now."""
    store = AdapterStore(open_store(f"file://{tmp_path}/store"))
    with closing(Catalog(f"sqlite:///{tmp_path}/catalog.db")) as catalog:
        read = exact.read_kept(base, store, catalog)
    assert read.keys() == made.versions.keys()
    for method, version in read.items():
        manifest = json.loads((exact.ADAPTERS / method / "loray.json").read_bytes())
        assert version.digest == hashlib.sha256(canonical_json(manifest).encode()).hexdigest()
        ours, theirs = (load_file(path / method / "adapter_model.safetensors") for path in (folder, exact.ADAPTERS))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_backup_comes_back(tmp_path: Path) -> None:
    """All its rows, whatever comes after them: restoring is an entry of the audit log, and a change. Columns and tables
    that later revisions have added are empty.
    """
    with closing(Catalog(f"sqlite:///{tmp_path}/catalog.db")) as catalog:
        catalog.backup.read(exact.BACKUP)
        catalog.backup.write(tmp_path / "again")
    before, after = exact.backup_rows(exact.BACKUP), exact.backup_rows(tmp_path / "again")
    assert not before.keys() - after.keys()
    assert not [row for name in after.keys() - before.keys() for row in after[name]]
    for table, column in (("bases", "of"), ("jobs", "part_of")):
        for row in after[table]:
            assert row.pop(column) is None
    assert {name: after[name][: len(rows)] for name, rows in before.items() if name != "changes"} == {
        name: rows for name, rows in before.items() if name != "changes"
    }


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_requests_get_the_same_tokens(base: BaseModel, num_ranks: int) -> None:
    compare_numbers("tokens.json", exact.tokens(base, num_ranks=num_ranks), rel=0)


def test_steps_have_the_same_losses(tmp_path: Path) -> None:
    weak = exact.make_base(tmp_path / "weak", std=0.05)
    compare_numbers("steps.json", exact.steps(weak, tmp_path / "steps"), rel=1e-4, abs=1.1e-5)
