"""Names, versions and aliases: concurrent writers, promotion, rollback, resolution, migrations."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog
from loray.catalog.database import HEAD, open_database
from loray.catalog.schema import metadata
from loray.errors import (
    AdapterNotFound,
    ConflictError,
    IntegrityError,
    LorayError,
    SettingsError,
    SpecError,
    UnsupportedError,
)
from loray.spec import AdapterManifest

BASE = "ba5e" * 16


def manifest(number: int = 0) -> AdapterManifest:
    return AdapterManifest(
        method="lora",
        base="smollm2",
        base_fingerprint=BASE,
        rank=8,
        target_modules=("q_proj",),
        num_parameters=100,
        nbytes=400 + number,
        context_length=8192,
        files={"adapter_model.safetensors": digest(number)},
        created_at="2026-01-01T00:00:00+00:00",
    )


def digest(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/home/catalog.db"


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    catalog = Catalog(url)
    yield catalog
    catalog.close()


def publish(catalog: Catalog, name: str, *numbers: int, aliases: tuple[str, ...] = ()) -> None:
    for number in numbers:
        catalog.register(name, digest(number), manifest(number), aliases)


# -- registering ------------------------------------------------------------------------------------------------------


def test_versions_count_up(catalog: Catalog) -> None:
    first = catalog.register("tone", digest(1), manifest(1))
    assert (first.label, first.digest, first.aliases) == ("tone@1", digest(1), ())
    assert first.manifest == manifest(1)
    assert catalog.register("tone", digest(2), manifest(2), ["prod"]).aliases == ("prod",)
    assert catalog.register("other", digest(2), manifest(2)).version == 1
    assert [entry.name for entry in catalog.adapters()] == ["other", "tone"]


def test_same_digest_is_the_same_version(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    again = catalog.register("tone", digest(1), manifest(1), ["canary"])
    assert (again.version, again.aliases) == (1, ("canary",))
    assert list(catalog.adapter("tone").entry.versions) == [1, 2]


@pytest.mark.parametrize("same", [False, True])
def test_concurrent_writers(url: str, same: bool) -> None:
    barrier = threading.Barrier(8)

    def write(i: int) -> int:
        catalog = Catalog(url)
        barrier.wait()
        try:
            return catalog.register("tone", digest(7 if same else i), manifest(i), ["prod"]).version
        finally:
            catalog.close()

    with ThreadPoolExecutor(8) as pool:
        versions = sorted(pool.map(write, range(8)))
    assert versions == ([1] * 8 if same else list(range(1, 9)))


def test_one_namespace_for_bases_and_adapters(catalog: Catalog) -> None:
    publish(catalog, "tone", 1)
    catalog.add_base("smollm2", BASE)
    catalog.add_base("smollm2", BASE)
    with pytest.raises(ConflictError, match="adapter's name"):
        catalog.add_base("tone", BASE)
    with pytest.raises(ConflictError, match="base model's name"):
        publish(catalog, "smollm2", 1)
    with pytest.raises(ConflictError, match="fingerprint"):
        catalog.add_base("smollm2", "0" * 64)
    with pytest.raises(AdapterNotFound, match="is a base model"):
        catalog.resolve("smollm2")
    assert catalog.snapshot().bases == {"smollm2": BASE}


@pytest.mark.parametrize("name", ["", "a b", "a@b", "a/b", "-a", "x" * 97])
def test_bad_names(catalog: Catalog, name: str) -> None:
    with pytest.raises(SpecError, match="not a valid adapter name"):
        publish(catalog, name, 1)


@pytest.mark.parametrize("alias", ["", "3", "3a", "a b", "a.b"])
def test_bad_aliases(catalog: Catalog, alias: str) -> None:
    with pytest.raises(SpecError, match="not a valid alias"):
        publish(catalog, "tone", 1, aliases=(alias,))
    assert catalog.adapters() == ()
    publish(catalog, "tone", 1)
    with pytest.raises(SpecError, match="not a valid alias"):
        catalog.promote("tone", alias, 1)


# -- resolving --------------------------------------------------------------------------------------------------------


def test_resolution(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    assert catalog.resolve("tone").version == 3  # no prod: the newest
    catalog.promote("tone", "prod", 2)
    catalog.promote("tone", "canary", 3)
    publish(catalog, "tone", 4)
    snapshot = catalog.snapshot()
    for source in (catalog, snapshot):
        assert source.resolve("tone").version == 2
        assert source.resolve("tone@1").digest == digest(1)
        assert source.resolve("tone@canary").version == 3
        assert source.resolve("tone@4").label == "tone@4"
        for model, message in [
            ("tone@5", "has no version 5; it has 1 to 4"),
            ("tone@", "no alias ''"),
            ("tone@beta", "no alias 'beta'; its aliases: canary, prod"),
            ("tune", "did you mean 'tone'"),
            ("xyz", "no adapter 'xyz'"),
            ("tone@" + "9" * 30, "no"),
            ("tone@²", "no alias"),
        ]:
            with pytest.raises(AdapterNotFound, match=message):
                source.resolve(model)


def test_snapshot_stays_and_counter_moves(catalog: Catalog, url: str) -> None:
    publish(catalog, "tone", 1)
    before = catalog.snapshot()
    assert catalog.change_counter() == before.counter
    other = Catalog(url)
    publish(other, "tone", 2)
    assert other.change_counter() > before.counter == before.counter
    assert before.resolve("tone").version == 1
    assert catalog.snapshot().resolve("tone").version == 2
    assert [entry.name for entry in before.models(BASE)] == ["tone"]
    assert before.models("0" * 64) == ()


# -- aliases ----------------------------------------------------------------------------------------------------------


def test_promote_and_roll_back(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    for version in (1, 2, 3):
        assert catalog.promote("tone", "prod", version).version == version
    assert catalog.promote("tone", "prod", 3).aliases == ("prod",)  # again: no move
    assert [catalog.rollback("tone", "prod").version for _ in range(2)] == [2, 1]
    assert catalog.resolve("tone").version == 1
    with pytest.raises(ConflictError, match="no earlier target than version 1"):
        catalog.rollback("tone", "prod")
    catalog.promote("tone", "prod", 3)
    assert catalog.rollback("tone").version == 1
    moves = catalog.adapter("tone").moves
    assert [(m.version, m.undone) for m in moves] == [(1, False), (2, True), (3, True), (3, True)]


def test_aliases_have_histories_of_their_own(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, aliases=("prod", "canary"))
    publish(catalog, "other", 1, aliases=("prod",))
    catalog.rollback("tone", "canary")
    assert catalog.adapter("tone").entry.aliases == {"prod": 2, "canary": 1}
    with pytest.raises(ConflictError, match="no earlier target"):
        catalog.rollback("other", "prod")
    with pytest.raises(AdapterNotFound, match="no alias 'beta'"):
        catalog.rollback("tone", "beta")
    with pytest.raises(AdapterNotFound, match="no adapter"):
        catalog.rollback("nothing", "prod")


def test_promotion_can_expect(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    with pytest.raises(ConflictError, match="is not set"):
        catalog.promote("tone", "prod", 1, expected=2)
    catalog.promote("tone", "prod", 1, expected=0)
    with pytest.raises(ConflictError, match="points at version 1"):
        catalog.promote("tone", "prod", 2, expected=0)
    assert catalog.promote("tone", "prod", 2, expected=1).version == 2
    with pytest.raises(AdapterNotFound, match="no version 9"):
        catalog.promote("tone", "prod", 9)


def test_one_of_two_promotions_wins(catalog: Catalog, url: str) -> None:
    publish(catalog, "tone", 1, 2, 3, aliases=())
    catalog.promote("tone", "prod", 1)
    barrier = threading.Barrier(2)

    def promote(version: int) -> bool:
        mine = Catalog(url)
        barrier.wait()
        try:
            mine.promote("tone", "prod", version, expected=1)
        except ConflictError:
            return False
        finally:
            mine.close()
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(promote, (2, 3))) == [False, True]


def test_everything_is_audited(catalog: Catalog, url: str) -> None:
    catalog.add_base("smollm2", BASE)
    publish(catalog, "tone", 1, 2, aliases=("prod",))
    catalog.rollback("tone")
    with sqlite3.connect(url.removeprefix("sqlite:///")) as db:
        rows = db.execute("SELECT action, subject FROM audit_log ORDER BY id").fetchall()
    assert rows == [
        ("add_base", "smollm2"),
        ("register", "tone@1"),
        ("promote", "tone@prod"),
        ("register", "tone@2"),
        ("promote", "tone@prod"),
        ("rollback", "tone@prod"),
    ]


# -- the database -----------------------------------------------------------------------------------------------------


def test_migrations_make_the_tables_of_the_schema(url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    engine = open_database(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    import loray.catalog

    folder = Path(loray.catalog.__file__).parent / "migrations"
    assert ScriptDirectory(str(folder)).get_current_head() == HEAD


def test_processes_create_one_database(url: str) -> None:
    code = f"from loray.catalog import Catalog; print(Catalog({url!r}).change_counter())"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (out, process.returncode) == ("0\n", 0), err


def test_sqlite_is_set_up(url: str) -> None:
    engine = open_database(url)
    with engine.connect() as c:
        for pragma, value in [("journal_mode", "wal"), ("foreign_keys", 1), ("busy_timeout", 30_000)]:
            assert c.execute(sa.text(f"PRAGMA {pragma}")).scalar() == value


def test_a_failure_inside_changes_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(catalog, "tone", 1, aliases=("prod",))
    before = catalog.snapshot()

    def fail(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr("loray.catalog.catalog.count_change", fail)
    for write in (
        lambda: publish(catalog, "tone", 2, aliases=("prod",)),
        lambda: publish(catalog, "new", 3),
        lambda: catalog.promote("tone", "canary", 1),
        lambda: catalog.add_base("base", BASE),
    ):
        with pytest.raises(RuntimeError, match="killed"):
            write()
    assert catalog.snapshot() == before


def test_a_later_catalog_is_refused(url: str, tmp_path: Path) -> None:
    Catalog(url).close()
    with sqlite3.connect(tmp_path / "home" / "catalog.db") as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(UnsupportedError, match="upgrade loray"):
        Catalog(url)


def test_bad_urls(tmp_path: Path) -> None:
    (tmp_path / "junk.db").write_bytes(b"this is not a database, whatever it is called" * 100)
    (tmp_path / "dir.db").mkdir()
    for url, error in [
        ("nonsense", SettingsError),
        ("sqlite://", SettingsError),
        ("oracle://host/db", SettingsError),
        (f"sqlite:///{tmp_path}/junk.db", IntegrityError),
        (f"sqlite:///{tmp_path}/dir.db", LorayError),
    ]:
        with pytest.raises(error):
            Catalog(url)
