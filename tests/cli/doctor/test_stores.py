"""Checks of catalog, store and clock, against databases and servers that are as wrong as they say."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loray.catalog import Catalog
from loray.cli import doctor
from loray.local.processes import free_ports
from tests.cli.doctor.conftest import Situations


def set_revision(file: Path, revision: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_a_catalog_of_another_version(situation: Situations, tmp_path: Path) -> None:
    s, file = situation(), tmp_path / "home" / "catalog.db"
    assert doctor.catalog(s).message == "the catalog is empty; its tables are made at first use"
    assert not file.exists()
    Catalog(s.settings.catalog).close()
    assert doctor.catalog(s).severity == "ok"
    set_revision(file, "0003")
    older = doctor.catalog(s)
    assert (older.severity, "before the first release (revision 0003)" in older.message) == ("error", True)
    assert "loray adapters import" in (older.mend or "")
    set_revision(file, "9999")
    newer = doctor.catalog(s)
    assert (newer.severity, newer.mend) == ("error", "pip install --upgrade loray")
    with closing(sqlite3.connect(file)) as database:  # the check migrates nothing
        assert database.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


def test_a_catalog_that_cannot_be_read(situation: Situations, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "catalog.db").write_bytes(b"no database" * 1000)
    damaged = doctor.catalog(situation())
    assert damaged.severity == "error"
    assert "is damaged" in damaged.message
    assert "loray catalog restore" in (damaged.mend or "")
    (port,) = free_ports(1)
    away = doctor.catalog(situation(env={"LORAY_CATALOG": f"postgresql://loray:secret@127.0.0.1:{port}/loray"}))
    assert away.severity == "error"
    assert "LORAY_CATALOG" in (away.mend or "")
    assert "secret" not in away.message


def test_a_store_that_cannot_be_written_to(situation: Situations) -> None:
    assert doctor.store(situation()).severity == "ok"
    finding = doctor.store(situation(env={"LORAY_STORE": "file:///proc/nowhere/store"}))
    assert finding.severity == "error"
    assert "cannot be written to" in finding.message


@contextmanager
def server(ahead: timedelta = timedelta()) -> Iterator[str]:
    """Refuses every request, and has a clock that is ahead."""

    class Handler(BaseHTTPRequestHandler):
        def _refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response_only(403)
            self.send_header("Date", format_datetime(datetime.now(UTC) + ahead, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = do_HEAD = _refuse

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_port}"
        finally:
            made.shutdown()
            thread.join()


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    return file


def test_a_bucket_that_refuses_or_is_away(situation: Situations, credentials: Path) -> None:
    def found(endpoint: str) -> tuple[str, str]:
        url = f"s3://bucket?endpoint_url={endpoint}&credentials_file={credentials}"
        finding = doctor.store(situation(env={"LORAY_STORE": url}))
        assert "LORAY_STORE" in (finding.mend or "")
        return finding.severity, finding.message

    with server() as url:
        assert found(url)[0] == "error"
    (port,) = free_ports(1)
    severity, message = found(f"http://127.0.0.1:{port}")
    assert severity == "error"
    assert str(port) in message


@pytest.mark.parametrize(
    ("minutes", "severity", "message"),
    [
        (0, "ok", "agree"),
        (20, "error", "behind the store's"),
        (-20, "error", "ahead of the store's"),
        (1, "warning", "behind"),
    ],
)
def test_clocks(minutes: int, severity: str, message: str, situation: Situations) -> None:
    with server(timedelta(minutes=minutes)) as url:
        finding = doctor.clock(situation(env={"LORAY_STORE": f"s3://bucket?endpoint_url={url}"}))
    assert finding.severity == severity
    assert message in finding.message


def test_the_clock_of_a_folder(situation: Situations, tmp_path: Path) -> None:
    assert "could not be compared" in doctor.clock(situation()).message
    (tmp_path / "home" / "store").mkdir(parents=True)
    assert "agree" in doctor.clock(situation()).message
