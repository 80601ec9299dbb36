"""The catalog's database: SQLite on one machine, PostgreSQL in a cluster; tables are made when it is first opened."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from loray.catalog.schema import changes
from loray.errors import CatalogError, IntegrityError, LorayError, SettingsError, UnsupportedError
from loray.files import file_lock
from loray.spec import Principal

HEAD = "0018"  # the last revision in migrations/versions
OLDEST = "0014"  # those below it were made before the first release

_WRITES = "loray_writes"
_BUSY_TIMEOUT_MS = 30_000
_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_MS = 15_000  # of a statement that only reads
_WRITE_TIMEOUT_MS = 45_000  # of one that writes, which may wait _BUSY_TIMEOUT_MS for another writer
_IDLE_TIMEOUT_MS = 30_000  # of a writer that stops inside its transaction, for which all others wait
# libpq's: a connection whose other end is gone fails after about 25 s. A URL may say otherwise.
_KEEPALIVE = {
    "connect_timeout": _CONNECT_TIMEOUT_S,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
_POOL: dict[str, Any] = {"pool_size": 5, "max_overflow": 15, "pool_timeout": 10.0, "pool_recycle": 1800}
_MIGRATION_LOCK = 0x6C6F726179  # key of a PostgreSQL advisory lock
# InternalError: the server was made read-only, or has ended the transaction. DataError: a value that no column takes.
# ProgrammingError: for instance a missing privilege.
_UNUSABLE = (OperationalError, InterfaceError, InternalError, DataError, ProgrammingError, PoolTimeout)


class Connections:
    """This holds an engine, and closes its connections when no part of a catalog holds it any more: short-lived
    processes and tests open many catalogs.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        weakref.finalize(self, engine.dispose)


@dataclass(frozen=True)
class Database:
    """Each part of the catalog holds this: the connections, the principal that asks, and the settings of the catalog.

    gate_tolerance, gate_trusts_keys  those of `aliases.failures`
    max_snapshot_bytes                what the names may take of each gateway's memory
    """

    connections: Connections
    principal: Principal
    gate_tolerance: float
    gate_trusts_keys: bool
    max_snapshot_bytes: int

    @property
    def engine(self) -> sa.Engine:
        return self.connections.engine

    @property
    def actor(self) -> str:
        return self.principal.actor

    def reading(self) -> AbstractContextManager[sa.Connection]:
        """A transaction with one consistent view of all tables."""
        return reading(self.engine)

    def writing(self) -> AbstractContextManager[sa.Connection]:
        """A transaction that waits for no other writer, but for those of the same rows."""
        return writing(self.engine)

    @contextmanager
    def changing(self) -> Iterator[sa.Connection]:
        """A transaction that has the catalog's lock. On PostgreSQL a row lock makes writers wait for each other, so
        that rows do not change after a writer has read them.
        """
        with writing(self.engine) as c:
            c.execute(sa.select(changes.c.counter).with_for_update())
            yield c


def insert_into(c: sa.Connection, table: sa.Table) -> Any:
    """Return the insert that knows `on_conflict_do_update` and `on_conflict_do_nothing`. Both dialects' statements have
    them; they have no common type. Many rows are given beside the statement, not in it: so it is compiled once, and not
    by a thread that takes the interpreter from a gateway's event loop each time.
    """
    return (sqlite.insert if c.dialect.name == "sqlite" else postgresql.insert)(table)


def upsert(c: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows of the same columns; one whose primary key is there gets the new values."""
    if rows:
        statement = insert_into(c, table)
        keys = [column.name for column in table.primary_key]
        values = {name: statement.excluded[name] for name in rows[0] if name not in keys}
        c.execute(statement.on_conflict_do_update(index_elements=keys, set_=values), rows)


def open_database(url: str) -> sa.Engine:
    """The engine of a database with the tables of `schema`. Several processes may open a new database at once.

    Raises SettingsError where the URL is wrong or its driver is missing, CatalogError where the database cannot be
    reached or was made before the first release, UnsupportedError where a later loray has migrated it, and
    IntegrityError where the file is no database.
    """
    engine = _checked_engine(url)
    try:
        with _creation_lock(engine):
            _migrate(engine)
    except DatabaseError as e:
        engine.dispose()
        reason = str(e.orig).strip()
        if engine.dialect.name == "postgresql":
            raise CatalogError(f"catalog {shown_url(url)} cannot be migrated: {reason}") from e
        raise IntegrityError(f"catalog {shown_url(url)} is damaged: {reason}") from e
    except LorayError:
        engine.dispose()
        raise
    return engine


def revision_of(url: str) -> str | None:
    """The revision of the tables of a database, which is left as it is; None where there are none yet.

    Raises SettingsError, CatalogError and IntegrityError as `open_database`.
    """
    if url.startswith("sqlite:") and (file := sa.make_url(url).database) and not Path(file).exists():
        return None
    engine = _checked_engine(url)
    try:
        with reading(engine) as connection:
            return _revision(connection)
    except DatabaseError as e:
        raise IntegrityError(f"catalog {shown_url(url)} is damaged: {str(e.orig).strip()}") from e
    finally:
        engine.dispose()


def _checked_engine(url: str) -> sa.Engine:
    try:
        return _engine(url)
    except ImportError as e:
        raise SettingsError(f"catalog {shown_url(url)}: {e}; PostgreSQL needs `pip install 'psycopg[binary]'`") from e
    except (ArgumentError, NoSuchModuleError) as e:
        raise SettingsError(f"catalog {shown_url(url)}: {e}") from e
    except ValueError as e:  # its message has the part of the URL that was parsed as a port
        raise SettingsError(f"catalog {shown_url(url)}: not a URL; percent-encode user and password") from e


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction with one consistent view of all tables."""
    with _translate_errors(engine), engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            _set(connection, statement_timeout=_READ_TIMEOUT_MS)
            yield connection


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction, rolled back on any error. On SQLite it locks the database from its beginning."""
    with _translate_errors(engine), engine.connect() as connection:
        connection.execution_options(**{_WRITES: True})
        with connection.begin():
            _set(
                connection,
                lock_timeout=_BUSY_TIMEOUT_MS,
                statement_timeout=_WRITE_TIMEOUT_MS,
                idle_in_transaction_session_timeout=_IDLE_TIMEOUT_MS,
            )
            yield connection


def _set(connection: sa.Connection, **settings: int) -> None:
    """PostgreSQL's settings of this transaction; times are in milliseconds. Those of the session would outlive it in a
    proxy that shares connections.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("; ".join(f"SET LOCAL {name} = {value}" for name, value in settings.items()))


def _engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "postgresql":
        given: dict[str, Any] = {name: value for name, value in _KEEPALIVE.items() if name not in parsed.query}
        # A prepared statement is of a connection to the server, which a proxy (PgBouncer) gives to others.
        given["prepare_threshold"] = None
        return sa.create_engine(
            parsed, pool_pre_ping=True, isolation_level="READ COMMITTED", connect_args=given, **_POOL
        )
    if not parsed.database or parsed.database == ":memory:":
        raise SettingsError(f"catalog {url!r} must name a file: sqlite:////folder/catalog.db")
    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed)
    sa.event.listen(engine, "connect", _configure_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None  # _begin_sqlite begins transactions
    cursor = dbapi_connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    """Writers lock before they read: a transaction that begins as a reader cannot always become a writer."""
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: sa.Engine) -> None:
    with reading(engine) as connection:
        if _revision(connection) == HEAD:
            return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        revision = _revision(connection)
        if revision is not None and revision < OLDEST:
            raise CatalogError(
                f"catalog {shown_url(engine.url)} was made before the first release (revision {revision}): make a new "
                "catalog and import the adapters"
            )
        if revision is not None and revision > HEAD:
            raise UnsupportedError(
                f"the catalog was migrated by a later loray (revision {revision}, this one knows {HEAD}): upgrade loray"
            )
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except ProgrammingError as e:  # for instance a missing privilege
            raise CatalogError(f"catalog {shown_url(engine.url)} cannot be migrated: {str(e.orig).strip()}") from e


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _creation_lock(engine: sa.Engine) -> AbstractContextManager[None]:
    """A lock between processes for SQLite: switching a new file to WAL fails where two do it at the same moment."""
    if engine.dialect.name != "sqlite" or engine.url.database is None:
        return nullcontext()
    return file_lock(Path(engine.url.database + ".lock"))


@contextmanager
def _translate_errors(engine: sa.Engine) -> Iterator[None]:
    """Errors of the database become CatalogError with its own message, without SQLAlchemy's statements and links."""
    try:
        yield
    except _UNUSABLE as e:
        reason = str(e) if isinstance(e, PoolTimeout) else str(e.orig).strip()
        raise CatalogError(f"catalog {shown_url(engine.url)} cannot be used: {reason}") from e


def shown_url(url: str | sa.URL) -> str:
    """The URL, for messages and to name the catalog."""
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        scheme, separator, _ = str(url).partition("://")
        return f"{scheme}://…" if separator else "URL"
    query = {name: value for name, value in parsed.query.items() if "password" not in name.lower()}
    return parsed.set(query=query).render_as_string(hide_password=True)
