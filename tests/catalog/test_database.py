"""The catalog's databases: their tables, processes that create one together, failures, wrong URLs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

import loray.catalog
from loray.catalog import Catalog
from loray.catalog.database import HEAD, open_database, reading, writing
from loray.catalog.schema import metadata
from loray.errors import CatalogError, IntegrityError, LorayError, SettingsError, UnsupportedError
from tests.fixtures.calls import refused
from tests.fixtures.catalogs import new_postgresql
from tests.fixtures.cluster import free_port
from tests.fixtures.postgres import Postgres
from tests.fixtures.versions import BASE, publish

MIGRATIONS = Path(loray.catalog.__file__).parent / "migrations"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, sqlite_url: str) -> str:
    """Of a database that has no tables yet."""
    return sqlite_url if request.param == "sqlite" else request.getfixturevalue("postgres").new_database()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/home/catalog.db"


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    catalog = Catalog(url)
    yield catalog
    catalog.close()


def test_the_migration_makes_the_tables_of_the_schema(url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    engine = open_database(url)
    with engine.connect() as connection:
        options = {"include_name": lambda name, kind, parents: name != "ix_adapters_trigrams"}  # of PostgreSQL alone
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
    engine.dispose()
    assert ScriptDirectory(str(MIGRATIONS)).get_current_head() == HEAD


def test_no_statement_is_prepared(postgres: Postgres) -> None:
    """A proxy gives each transaction another connection. And each statement is planned for its values: some searches
    match all names, some none.
    """
    engine = open_database(new_postgresql(postgres))
    for _ in range(10):  # more than psycopg waits for
        with reading(engine) as c:
            c.execute(sa.text("SELECT counter FROM changes"))
    with reading(engine) as c:
        assert c.execute(sa.text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() == 0
    engine.dispose()


# Forks of a process that has imported what they need and opened nothing: imports take longer than the rest.
FORKS = """
import sys
from multiprocessing import get_context

import alembic.command
import psycopg

from loray.catalog import Catalog
from tests.fixtures.versions import digest, manifest

number, url = int(sys.argv[1]), sys.argv[2]
fork = get_context("fork")
begin = fork.Barrier(number).wait


def create(i):
    begin()
    print(f"{Catalog(url).change_counter()}\\n", end="", flush=True)  # one write, also where output is not buffered


def register(i):
    catalog = Catalog(url)
    begin()
    for n in range(10 * i, 10 * i + 5):
        catalog.adapters.register("tone", digest(n), manifest(n), ["prod"])


processes = [fork.Process(target=globals()[sys.argv[3]], args=(i,)) for i in range(number)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(max(abs(process.exitcode) for process in processes))
"""


def in_processes(number: int, url: str, function: str) -> list[str]:
    """The lines that so many processes print, each of which calls a function of FORKS."""
    command = [sys.executable, "-c", FORKS, str(number), url, function]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_processes_create_one_database(url: str) -> None:
    assert in_processes(4, url, "create") == ["0"] * 4


def test_a_failure_inside_changes_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(catalog, "tone", 1, aliases=("prod",))
    before = catalog.snapshot()

    def fail(*_: object) -> None:
        raise RuntimeError("killed")

    for module in ("adapters", "aliases"):
        monkeypatch.setattr(f"loray.catalog.{module}.count_change", fail)
    for write in (
        lambda: publish(catalog, "tone", 2, aliases=("prod",)),
        lambda: publish(catalog, "new", 3),
        lambda: catalog.aliases.move("tone", "canary", 1),
        lambda: catalog.aliases.delete("tone", "prod"),
        lambda: catalog.bases.add("base", BASE),
    ):
        refused(RuntimeError, "killed", write)
    assert catalog.snapshot() == before


@pytest.mark.parametrize(
    ("revision", "error", "advice"),
    [
        ("0013", CatalogError, "before the first release.*import the adapters"),
        ("9999", UnsupportedError, "upgrade loray"),
    ],
)
def test_a_catalog_of_another_revision_is_refused(
    url: str, revision: str, error: type[LorayError], advice: str
) -> None:
    engine = open_database(url)
    with writing(engine) as c:
        c.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    engine.dispose()
    refused(error, advice, Catalog, url)


def test_bad_urls(tmp_path: Path) -> None:
    (tmp_path / "junk.db").write_bytes(b"this is not a database, whatever it is called" * 100)
    (tmp_path / "dir.db").mkdir()
    for url, error in [
        ("nonsense", SettingsError),
        ("sqlite://", SettingsError),
        ("oracle://host/db", SettingsError),
        (f"sqlite:///{tmp_path}/junk.db", IntegrityError),
        (f"sqlite:///{tmp_path}/dir.db", LorayError),
        (f"postgresql://nobody@127.0.0.1:{free_port()}/none", CatalogError),
    ]:
        refused(error, "", Catalog, url)


def test_passwords_are_not_told() -> None:
    port = free_port()
    for url, shown in (
        (f"postgresql://loray:hush@127.0.0.1:{port}/a", f"postgresql+psycopg://loray:***@127.0.0.1:{port}/a "),
        (f"postgresql://127.0.0.1:{port}/a?password=hush&sslpassword=hush&sslmode=allow", "/a?sslmode=allow "),
        ("postgresql://loray:hu/sh@host:hush/a", "postgresql://…"),
        ("postgresql+nothing://loray:hush@host/a", r"postgresql+nothing://loray:***@host/a"),
    ):
        with pytest.raises(LorayError, match=re.escape(shown)) as error:
            Catalog(url)
        assert "hush" not in str(error.value)


def test_what_postgres_refuses_is_told_without_the_password(postgres: Postgres) -> None:
    url = postgres.new_database()
    refused(CatalogError, 'database "absent" does not exist', Catalog, url.rpartition("/")[0] + "/absent")
    postgres.execute(url.rpartition("/")[2], "CREATE ROLE guest LOGIN")
    with pytest.raises(CatalogError, match="cannot be migrated: permission denied for schema public") as e:
        Catalog(url.replace("loray@", "guest:secret@"))
    assert "secret" not in str(e.value)


def test_processes_register_one_name_at_once(url: str) -> None:
    """Separate processes, each with connections of its own, as drivers of several jobs are."""
    in_processes(3, url, "register")
    catalog = Catalog(url)
    assert sorted(catalog.adapters.get("tone").versions) == list(range(1, 16))
    assert catalog.adapters.resolve("tone@prod").version == 15  # every registration moved it to the version it made
    assert catalog.change_counter() == 15
    catalog.close()


def test_a_connection_that_was_lost_is_made_again(postgres: Postgres) -> None:
    catalog = Catalog(postgres.new_database())
    publish(catalog, "tone", 1)
    postgres.execute("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test_%'")
    assert catalog.adapters.resolve("tone").version == 1
    catalog.close()


def test_a_server_that_takes_no_writes_or_ends_them_cannot_be_used(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL calls these internal errors: of a standby, and of a writer that stopped in its transaction."""
    url = postgres.new_database()
    catalog = Catalog(url)
    monkeypatch.setattr("loray.catalog.database._IDLE_TIMEOUT_MS", 1)
    refused(CatalogError, "cannot be used", stop_in_a_transaction, catalog, postgres)
    monkeypatch.undo()
    catalog.bases.add("base", BASE)
    postgres.execute("postgres", f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_read_only = on")
    catalog.close()
    refused(CatalogError, "read-only", catalog.bases.add, "other", BASE)
    catalog.close()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [("SELECT CAST(4294967296 AS integer)", "out of range"), ("SELECT * FROM not_granted", "does not exist")],
)
def test_a_statement_that_the_server_refuses_is_the_catalogs_error(
    postgres: Postgres, statement: str, reason: str
) -> None:
    catalog = Catalog(postgres.new_database())
    with pytest.raises(CatalogError, match=reason), writing(catalog._db.engine) as c:
        c.exec_driver_sql(statement)
    catalog.close()


def test_statements_and_connections_of_postgresql_have_limits(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_database(postgres.new_database())
    with reading(engine) as c:
        assert c.exec_driver_sql("SHOW statement_timeout").scalar() == "15s"
        parameters = c.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
        assert (parameters["keepalives_idle"], parameters["tcp_user_timeout"]) == ("10", "25000")
    with writing(engine) as c:
        shown = {name: c.exec_driver_sql(f"SHOW {name}").scalar() for name in ("statement_timeout", "lock_timeout")}
        assert shown == {"statement_timeout": "45s", "lock_timeout": "30s"}
    monkeypatch.setattr("loray.catalog.database._READ_TIMEOUT_MS", 20)
    with pytest.raises(CatalogError, match="statement timeout"), reading(engine) as c:
        c.exec_driver_sql("SELECT pg_sleep(60)")
    with engine.connect() as c:  # the session's own limits are as they were
        assert c.exec_driver_sql("SHOW statement_timeout").scalar() == "0"
    engine.dispose()
    engine = open_database(f"{postgres.new_database()}?tcp_user_timeout=7000")
    with reading(engine) as c:
        assert c.connection.driver_connection.info.get_parameters()["tcp_user_timeout"] == "7000"  # type: ignore[union-attr]
    engine.dispose()


def stop_in_a_transaction(catalog: Catalog, postgres: Postgres) -> None:
    with writing(catalog._db.engine) as c, psycopg.connect(postgres.url("postgres"), autocommit=True) as other:
        pid = c.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        while other.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone() is not None:
            time.sleep(0.01)
        c.exec_driver_sql("SELECT 1")
