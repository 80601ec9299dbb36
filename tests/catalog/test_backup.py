"""Backups: all rows come back, on either kind of database; what is damaged or of another revision is refused whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog
from loray.catalog.backup import Line, table_lines
from loray.catalog.database import reading, writing
from loray.catalog.schema import audit_log, changes, metadata
from loray.errors import ConflictError, DataError, IntegrityError, LorayError, UnsupportedError
from loray.files import read_json_lines, write_json_lines
from loray.spec import Evaluation, Limits
from tests.fixtures.calls import refused
from tests.fixtures.catalogs import new_postgresql, sqlite_catalog
from tests.fixtures.versions import BASE, digest, manifest, publish, vera_manifest

Rows = dict[str, list[tuple[object, ...]]]


@pytest.fixture
def filled(catalog_url: str) -> Iterator[Catalog]:
    """With rows in most of its tables."""
    catalog = Catalog(catalog_url)
    catalog.bases.add("base", BASE)
    publish(catalog, "tone", 1, 2, aliases=("prod",))
    publish(catalog, "gone", 3)
    catalog.adapters.register("vera", digest(4), vera_manifest(4, key=0))
    catalog.removal.delete_adapter("gone")
    catalog.aliases.rollback("tone")
    catalog.tenants.create("acme", Limits(rpm_limit=600))
    catalog.adapters.share("tone", "shared", ["acme"])
    catalog.evaluations.record(digest(1), [Evaluation(metric="loss", value=1.5, dataset="docs")])
    catalog.adapters.record_upload(digest(1))
    catalog.tags.set("tone", "team", "search")
    yield catalog
    catalog.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Catalog]:
    is_file = request.param == "sqlite"
    url = sqlite_catalog(tmp_path / "empty") if is_file else new_postgresql(request.getfixturevalue("postgres"))
    with closing(Catalog(url)) as catalog:
        yield catalog


def rows_of(catalog: Catalog) -> Rows:
    """Of all tables, but those that restoring changes."""
    with reading(catalog._db.engine) as c:
        tables = [table for table in metadata.sorted_tables if table not in (changes, audit_log)]
        return {
            table.name: [
                tuple(v.astimezone(UTC) if isinstance(v, datetime) else v for v in row)
                for row in c.execute(sa.select(table).order_by(*table.primary_key))
            ]
            for table in tables
        }


def test_all_comes_back(filled: Catalog, empty: Catalog, tmp_path: Path) -> None:
    made = filled.backup.write(tmp_path / "backup")
    assert (made.num_names, made.num_versions) == (3, 4)
    assert (tmp_path / "backup").stat().st_mode & 0o077 == 0
    publish(filled, "later", 9)
    assert empty.backup.read(tmp_path / "backup") == made
    assert empty.aliases.get("tone", "prod") == filled.aliases.get("tone", "prod")
    assert [entry.name for entry in empty.snapshot().models()] == ["tone", "vera"]
    empty.removal.restore("gone")
    assert empty.adapters.get("gone").versions.keys() == {1}


def test_rows_are_equal_and_others_follow_them(filled: Catalog, empty: Catalog, tmp_path: Path) -> None:
    filled.backup.write(tmp_path / "backup")
    empty.backup.read(tmp_path / "backup")
    assert rows_of(empty) == rows_of(filled)
    assert all(rows_of(filled)[name] for name in ("versions", "alias_moves", "evaluations", "shares", "uploads"))
    before = filled.aliases.get("tone", "prod").revision
    empty.adapters.register("tone", digest(7), manifest(7), ["prod"])  # ids and revisions that nobody has had
    assert empty.adapters.get("tone").versions.keys() == {1, 2, 3}
    assert empty.aliases.get("tone", "prod").revision > before + 1000
    refused(ConflictError, "not empty", empty.backup.read, tmp_path / "backup")


DAMAGES: tuple[Callable[[list[bytes]], list[bytes]], ...] = (
    lambda lines: lines[:-1],
    lambda lines: [line.replace(b"tone", b"tune") for line in lines],
    lambda lines: [],
    lambda lines: [b"nothing of ours\n"],
)


def test_a_damaged_backup_changes_nothing(filled: Catalog, empty: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    filled.backup.write(file)
    whole, before = file.read_bytes(), rows_of(empty)
    for damage in DAMAGES:
        file.write_bytes(b"".join(damage(whole.splitlines(keepends=True))))
        refused(IntegrityError, "nothing was restored", empty.backup.read, file)
        assert rows_of(empty) == before
    file.write_bytes(whole)
    empty.backup.read(file)


def test_backups_of_others_are_refused(filled: Catalog, empty: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    filled.backup.write(file)
    with file.open("rb") as f:
        first, *rest = read_json_lines(f)
    for changed, error in [
        (first | {"revision": "9999"}, UnsupportedError),
        (first | {"format": 9}, UnsupportedError),
        ({"table": "keys", "columns": []}, IntegrityError),
        (["row"], IntegrityError),
    ]:
        with file.open("wb") as f:
            write_json_lines(f, [changed, *rest])
        refused(error, "", empty.backup.read, file)
    for missing in (tmp_path / "missing", tmp_path):
        refused(DataError, "cannot be read", empty.backup.read, missing)
    refused((LorayError, OSError), "", filled.backup.write, tmp_path / "no folder" / "backup")


def test_a_backup_is_of_one_moment(filled: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others write while it is made."""
    numbers = count(100)

    def interrupted(*args: Any) -> Iterator[Line]:
        publish(filled, "concurrent", next(numbers))
        return table_lines(*args)

    monkeypatch.setattr("loray.catalog.backup.table_lines", interrupted)
    before = rows_of(filled)
    filled.backup.write(tmp_path / "backup")
    assert "concurrent" not in (tmp_path / "backup").read_text()
    monkeypatch.undo()
    num_tables = (
        len(metadata.sorted_tables) - 6
    )  # without claims, clusters, leases, logins, owners and levels of quotas
    assert len(rows_of(filled)["versions"]) == len(before["versions"]) + num_tables


def test_a_row_of_time_is_kept_exactly(filled: Catalog, empty: Catalog, tmp_path: Path) -> None:
    with writing(filled._db.engine) as c:
        moment = datetime(2026, 11, 26, 12, 0, 0, 123456, tzinfo=UTC)
        c.execute(audit_log.update().values(created_at=moment))
    filled.backup.write(tmp_path / "backup")
    empty.backup.read(tmp_path / "backup")
    with reading(empty._db.engine) as c:
        assert {t.astimezone(UTC) for t in c.scalars(sa.select(audit_log.c.created_at).limit(3))} == {moment}
