"""Usage events reach the catalog once: past a database that is away, and a process that is killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loray.catalog import Catalog
from loray.errors import CatalogError
from loray.spec import UsageEvent
from loray.store import LocalStore
from serve_apps.accounting import usage
from serve_apps.accounting.usage import FOLDER, REJECTED, UsageLog, UsageWriter, abandoned
from tests.catalog.test_usage import event
from tests.fixtures.catalogs import new_postgresql
from tests.fixtures.postgres import Postgres
from tests.serve_apps.asking import eventually


def num_requests(url: str) -> int:
    catalog = Catalog(url)
    try:
        return catalog.usage([])[0].num_requests
    finally:
        catalog.close()


def journals(home: Path) -> list[Path]:
    return list((home / FOLDER).glob("*.jsonl"))


def test_all_events_are_there_when_the_writer_is_closed(tmp_path: Path, catalog_url: str) -> None:
    writer = UsageWriter(lambda: Catalog(catalog_url), tmp_path)
    for i in range(1200):
        writer.add(event(i % 1100))
    writer.close()
    assert num_requests(catalog_url) == 1100
    assert journals(tmp_path) == []


def test_events_wait_for_a_database_that_is_away(
    tmp_path: Path, catalog_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "FLUSH_S", 0.01)
    is_away = True

    def open_catalog() -> Catalog:
        if is_away:
            raise CatalogError("away")
        return Catalog(catalog_url)

    writer = UsageWriter(open_catalog, tmp_path)
    writer.add(event(1))
    assert eventually(lambda: any(path.stat().st_size for path in journals(tmp_path)))
    writer.close()  # it is still away
    (left,) = journals(tmp_path)
    with left.open("a") as f:
        f.write('{"request_id": "half a li')  # of a process killed while it wrote
    is_away = False
    writer = UsageWriter(open_catalog, tmp_path)
    writer.add(event(1))  # sent before, as far as anybody knows
    writer.add(event(2))
    writer.close()
    assert num_requests(catalog_url) == 2
    assert journals(tmp_path) == []


def test_nothing_stops_for_good_while_the_database_refuses(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing privilege is neither an error of the connection nor of an event."""
    monkeypatch.setattr(usage, "FLUSH_S", 0.01)
    url = new_postgresql(postgres)
    database, role = url.rpartition("/")[2], "no_usage"
    postgres.execute(database, f"CREATE ROLE {role} LOGIN")
    postgres.execute(database, f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    postgres.execute(database, f"REVOKE INSERT ON usage FROM {role}")
    writer = UsageWriter(lambda: Catalog(f"postgresql://{role}@127.0.0.1:{postgres.port}/{database}"), tmp_path)
    writer.add(event(1))
    assert eventually(lambda: writer._num_failures > 1)
    assert writer.status.is_alive
    assert writer.status.num_bytes
    assert writer.status.oldest_s > 0
    postgres.execute(database, f"GRANT INSERT ON usage TO {role}")
    writer.add(event(2))
    assert eventually(lambda: num_requests(url) == 2)
    assert eventually(lambda: writer.status == (True, 0, 0.0, 0))
    writer.close()
    assert not (tmp_path / FOLDER / REJECTED).exists()


def test_an_event_that_the_database_refuses_does_not_stop_the_others(tmp_path: Path, postgres: Postgres) -> None:
    url = new_postgresql(postgres)
    writer = UsageWriter(lambda: Catalog(url), tmp_path)
    for number, model in ((1, "tone"), (2, "to\0ne"), (3, "tone")):
        writer.add(event(number, model=model))
    writer.close()
    assert num_requests(url) == 2
    refused = (tmp_path / FOLDER / REJECTED).read_bytes()
    assert UsageEvent.from_json(refused).request_id == "cmpl-2"
    assert journals(tmp_path) == []


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write, room = UsageLog.create(tmp_path), os.write, 2000

    def write_some(fd: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "no space left")
        written = write(fd, data[: min(50, room)])
        room -= written
        return written

    monkeypatch.setattr("serve_apps.accounting.usage.os.write", write_some)
    assert journal.append([event(1), event(2)])
    with pytest.raises(OSError, match="no space left"):
        journal.append([event(i) for i in range(3, 20)])
    room = 10_000
    assert journal.append([event(20)])
    events, offset = journal.read(100, 0)
    assert [e.request_id for e in events] == ["cmpl-1", "cmpl-2", "cmpl-20"]
    assert offset == journal.num_bytes
    journal.close(delete=True)


def test_events_outlive_the_disk_while_the_database_is_away(
    tmp_path: Path, catalog_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "FLUSH_S", 0.01)
    monkeypatch.setattr(usage, "STORE_S", 0.01)
    monkeypatch.setattr(usage, "STORE_AFTER_S", 0.05)
    objects = LocalStore(tmp_path / "store")

    def open_catalog() -> Catalog:
        raise CatalogError("away")

    lost = UsageWriter(open_catalog, tmp_path / "lost", open_objects=lambda: objects)
    lost.add(event(1))
    assert eventually(lambda: len([*objects.list("usage/")]) == 1)
    lost.add(event(2))
    assert eventually(lambda: len([*objects.list("usage/")]) == 2)  # what is new alone
    lost.close()
    shutil.rmtree(tmp_path / "lost")
    objects.put_if_absent("usage/torn/000000.jsonl", f"{event(3).to_json()}\n{{".encode())
    UsageWriter(lambda: Catalog(catalog_url), tmp_path / "other", open_objects=lambda: objects).close()
    assert num_requests(catalog_url) == 3
    assert [*objects.list("usage/")] == []


_KILLED = """
import sys
from pathlib import Path
from loray.catalog import Catalog
from serve_apps.accounting.usage import UsageWriter
from tests.catalog.test_usage import event
writer = UsageWriter(lambda: Catalog(sys.argv[1]), Path(sys.argv[2]))
for i in range(100):
    writer.add(event(i))
writer._queue.put(None)
writer._threads[0].join()  # all are in the journal; some may be in the catalog
print("written", flush=True)
sys.stdin.read()
"""


def test_a_killed_writer_loses_nothing_and_counts_nothing_twice(tmp_path: Path, catalog_url: str) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", _KILLED, catalog_url, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None
    assert killed.stdin is not None
    with killed.stdout, killed.stdin:
        assert killed.stdout.readline() == "written\n"
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    for _ in range(2):
        UsageWriter(lambda: Catalog(catalog_url), tmp_path).close()
    assert num_requests(catalog_url) == 100
    assert journals(tmp_path) == []


def test_a_writer_without_events_sleeps(tmp_path: Path, catalog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for what others have left at its start and at its end, and rarely between."""
    monkeypatch.setattr(usage, "FLUSH_S", 0.001)
    looks: list[float] = []

    def looked(home: Path) -> Iterator[UsageLog]:
        looks.append(time.monotonic())
        return abandoned(home)

    monkeypatch.setattr(usage, "abandoned", looked)
    writer = UsageWriter(lambda: Catalog(catalog_url), tmp_path)
    assert eventually(lambda: bool(looks))
    for i in range(3):
        writer.add(event(i))
        assert eventually(lambda: num_requests(catalog_url) == i + 1)  # noqa: B023
    assert len(looks) == 1
    writer.close()
    assert len(looks) == 2
    monkeypatch.setattr(usage, "ABANDONED_S", 0.01)
    writer = UsageWriter(lambda: Catalog(catalog_url), tmp_path)
    left = UsageLog.create(tmp_path)
    left.append([event(7)])
    left.close(delete=False)  # its process is gone
    assert eventually(lambda: num_requests(catalog_url) == 4)
    writer.close()


def test_old_events_are_forgotten(tmp_path: Path, catalog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "FLUSH_S", 0.01)
    writer = UsageWriter(lambda: Catalog(catalog_url), tmp_path, retention_days=1)
    writer.add(event(1))  # of another year
    writer.close()
    UsageWriter(lambda: Catalog(catalog_url), tmp_path, retention_days=1).close()
    assert num_requests(catalog_url) == 0


def test_a_journal_that_is_full_loses_events_and_says_so(
    tmp_path: Path, catalog_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve_apps.accounting.usage.MAX_BYTES", 0)
    writer = UsageWriter(lambda: Catalog(catalog_url), tmp_path)
    writer.add(event(1))
    writer.close()
    assert num_requests(catalog_url) == 0
    assert any("usage events are lost" in record.getMessage() for record in caplog.records)
