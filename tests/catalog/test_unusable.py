"""PostgreSQL that goes away, comes back, or takes no writes."""

from __future__ import annotations

import time

import psycopg
import pytest

from loray.catalog import Catalog
from loray.catalog.database import writing
from loray.errors import CatalogError
from tests.catalog.test_catalog import BASE, publish
from tests.fixtures.postgres import Postgres


def test_a_connection_that_was_lost_is_made_again(postgres: Postgres) -> None:
    catalog = Catalog(postgres.new_database())
    publish(catalog, "tone", 1)
    postgres.execute("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test_%'")
    assert catalog.resolve("tone").version == 1
    catalog.close()


def test_a_server_that_takes_no_writes_or_ends_them_cannot_be_used(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL calls these internal errors: of a standby, and of a writer that stopped in its transaction."""
    url = postgres.new_database()
    catalog = Catalog(url)
    monkeypatch.setattr("loray.catalog.database._IDLE_TIMEOUT_MS", 1)
    with pytest.raises(CatalogError, match="cannot be used"):
        stop_in_a_transaction(catalog, postgres)
    monkeypatch.undo()
    catalog.add_base("base", BASE)
    postgres.execute("postgres", f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_read_only = on")
    catalog.close()
    with pytest.raises(CatalogError, match="read-only"):
        catalog.add_base("other", BASE)
    catalog.close()


def stop_in_a_transaction(catalog: Catalog, postgres: Postgres) -> None:
    with writing(catalog._engine) as c:
        pid = c.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        while runs(postgres, pid):
            time.sleep(0.01)
        c.exec_driver_sql("SELECT 1")


def runs(postgres: Postgres, pid: int) -> bool:
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        return connection.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone() is not None


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("SELECT CAST(4294967296 AS integer)", "out of range"),
        ("SELECT * FROM not_granted", "does not exist"),
    ],
)
def test_a_statement_that_the_server_refuses_is_the_catalogs_error(
    postgres: Postgres, statement: str, reason: str
) -> None:
    catalog = Catalog(postgres.new_database())
    with pytest.raises(CatalogError, match=reason), writing(catalog._engine) as c:
        c.exec_driver_sql(statement)
    catalog.close()
