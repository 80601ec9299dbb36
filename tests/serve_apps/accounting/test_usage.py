"""Usage events reach the catalog once: past a database that is away, and a process that is killed."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from loray.catalog import Catalog
from loray.errors import CatalogError
from loray.spec import Delta, GenerateRequest, Principal, SamplingParams, UsageEvent
from loray.store import LocalStore
from serve_apps.accounting import usage
from serve_apps.accounting.accounts import RequestUsage, UsageMeter
from serve_apps.accounting.usage import FOLDER, REJECTED, UsageLog, UsageWriter, abandoned
from tests.fixtures.asking import eventually
from tests.fixtures.catalogs import new_postgresql, sqlite_catalog
from tests.fixtures.figures import event
from tests.fixtures.postgres import Postgres


class Books:
    """A catalog that can be away, and a home whose writers tell it at once what they have."""

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home, self.is_away = url, home, False

    def open(self) -> Catalog:
        if self.is_away:
            raise CatalogError("away")
        return Catalog(self.url)

    def writer(self, home: Path | None = None, **fields: Any) -> UsageWriter:
        return UsageWriter(self.open, home or self.home, **fields)

    @property
    def num_requests(self) -> int:
        with closing(Catalog(self.url)) as catalog:
            return catalog.usage.sums([])[0].num_requests

    @property
    def journals(self) -> list[Path]:
        return list((self.home / FOLDER).glob("*.jsonl"))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "FLUSH_S", 0.01)


@pytest.fixture
def books(catalog_url: str, tmp_path: Path) -> Books:
    return Books(catalog_url, tmp_path)


def test_all_events_are_there_when_the_writer_is_closed(books: Books) -> None:
    writer = books.writer()
    for i in range(1200):
        writer.add(event(i % 1100))
    writer.close()
    assert (books.num_requests, books.journals) == (1100, [])


def test_events_wait_for_a_database_that_is_away(books: Books) -> None:
    books.is_away = True
    writer = books.writer()
    writer.add(event(1))
    assert eventually(lambda: any(path.stat().st_size for path in books.journals))
    writer.close()  # it is still away
    (left,) = books.journals
    with left.open("a") as f:
        f.write('{"request_id": "half a li')  # of a process killed while it wrote
    books.is_away = False
    writer = books.writer()
    writer.add(event(1))  # sent before, as far as anybody knows
    writer.add(event(2))
    writer.close()
    assert (books.num_requests, books.journals) == (2, [])


def test_nothing_stops_for_good_while_the_database_refuses(tmp_path: Path, postgres: Postgres) -> None:
    """A missing privilege is neither an error of the connection nor of an event."""
    books = Books(new_postgresql(postgres), tmp_path)
    database, role = books.url.rpartition("/")[2], "no_usage"
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
    assert eventually(lambda: books.num_requests == 2)
    assert eventually(lambda: writer.status == (True, 0, 0.0, 0))
    writer.close()
    assert not (tmp_path / FOLDER / REJECTED).exists()


def test_an_event_that_the_database_refuses_does_not_stop_the_others(tmp_path: Path, postgres: Postgres) -> None:
    books = Books(new_postgresql(postgres), tmp_path)
    writer = books.writer()
    for number, model in ((1, "tone"), (2, "to\0ne"), (3, "tone")):
        writer.add(event(number, model=model))
    writer.close()
    assert (books.num_requests, books.journals) == (2, [])
    assert UsageEvent.from_json((tmp_path / FOLDER / REJECTED).read_bytes()).request_id == "cmpl-2"


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


def test_events_outlive_the_disk_while_the_database_is_away(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "STORE_S", 0.01)
    monkeypatch.setattr(usage, "STORE_AFTER_S", 0.05)
    objects = LocalStore(books.home / "store")
    books.is_away = True
    lost = books.writer(books.home / "lost", open_objects=lambda: objects)
    for number in (1, 2):
        lost.add(event(number))
        assert eventually(lambda: len([*objects.list("usage/")]) == number)  # noqa: B023 - what is new alone
    lost.close()
    shutil.rmtree(books.home / "lost")
    objects.put_if_absent("usage/torn/000000.jsonl", f"{event(3).to_json()}\n{{".encode())
    books.is_away = False
    books.writer(books.home / "other", open_objects=lambda: objects).close()
    assert (books.num_requests, [*objects.list("usage/")]) == (3, [])


_KILLED = """
import sys
from pathlib import Path
from loray.catalog import Catalog
from serve_apps.accounting.usage import UsageWriter
from tests.fixtures.figures import event
writer = UsageWriter(lambda: Catalog(sys.argv[1]), Path(sys.argv[2]))
for i in range(100):
    writer.add(event(i))
writer._queue.put(None)
writer._threads[0].join()  # all are in the journal; some may be in the catalog
print("written", flush=True)
sys.stdin.read()
"""


def test_a_killed_writer_loses_nothing_and_counts_nothing_twice(books: Books) -> None:
    command = [sys.executable, "-c", _KILLED, books.url, str(books.home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "written\n"
        os.kill(killed.pid, signal.SIGKILL)
    for _ in range(2):
        books.writer().close()
    assert (books.num_requests, books.journals) == (100, [])


def test_a_writer_without_events_sleeps(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for what others have left at its start and at its end, and rarely between."""
    monkeypatch.setattr(usage, "FLUSH_S", 0.001)
    looked = Mock(side_effect=abandoned)
    monkeypatch.setattr(usage, "abandoned", looked)
    writer = books.writer()
    assert eventually(lambda: looked.call_count > 0)
    for i in range(3):
        writer.add(event(i))
        assert eventually(lambda: books.num_requests == i + 1)  # noqa: B023
    assert looked.call_count == 1
    writer.close()
    assert looked.call_count == 2
    monkeypatch.setattr(usage, "ABANDONED_S", 0.01)
    writer = books.writer()
    left = UsageLog.create(books.home)
    left.append([event(7)])
    left.close(delete=False)  # its process is gone
    assert eventually(lambda: books.num_requests == 4)
    writer.close()


def test_old_events_are_forgotten(books: Books) -> None:
    for events in ([event(1)], []):  # of another year
        writer = books.writer(retention_days=1)
        for old in events:
            writer.add(old)
        writer.close()
    assert books.num_requests == 0


def test_a_journal_that_is_full_loses_events_and_says_so(
    books: Books, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve_apps.accounting.usage.MAX_BYTES", 0)
    writer = books.writer()
    writer.add(event(1))
    writer.close()
    assert books.num_requests == 0
    assert "usage events are lost" in caplog.text


def test_an_open_request_waits_for_nothing(books: Books) -> None:
    writer = books.writer()
    writer.note_open(event(1, outcome="abandoned"))
    (path,) = books.journals
    assert eventually(lambda: path.stat().st_size > 0)
    assert writer.status.num_bytes == 0
    writer.add(event(2))
    assert eventually(lambda: books.num_requests == 1)
    assert eventually(lambda: writer.status == (True, 0, 0.0, 0))
    assert b"cmpl-1" in path.read_bytes()
    assert b"cmpl-2" not in path.read_bytes()
    writer.add(event(1))
    writer.close()
    assert books.num_requests == 2
    assert list((books.home / FOLDER).iterdir()) == []


def test_a_journal_that_is_replaced_meanwhile_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, flock = UsageLog.create(tmp_path), fcntl.flock
    journal.append([event(1)], [event(2)])

    def late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        journal.clear([event(2)])
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert [*abandoned(tmp_path)] == []
    assert journal.unsettled() == [event(2)]
    journal.close(delete=True)


PROMPT = (1,) * 700
AT_ONCE = 256  # tokens
CHOICES = {"long": 2, "bounded": 1, "short": 1}


class Killed(BaseException):
    pass


class Gateway:
    """Its requests and its journal, in one thread."""

    def __init__(self, folder: Path, url: str) -> None:
        self.writer = UsageWriter(lambda: Catalog(url), folder)
        self.accounts = UsageMeter()
        self.accounts._writer = self.writer
        self.delivered: Counter[str] = Counter()

    def run(self) -> None:
        long, bounded = self.open("long", open_ended=True), self.open("bounded")
        for step in range(1, 10):
            for account in (long, bounded):
                for choice in range(CHOICES[account.base]):
                    self.delivered[account.base] += AT_ONCE
                    assert account.asked_again_at(choice, step * AT_ONCE) > step * AT_ONCE
                    self.write()
            if step == 5:
                short = self.open("short")
                self.delivered["short"] = 3
                self.close(short, 3)
            if step % 3 == 0:
                self.writer._send(self.writer._wal)
        self.close(long, step * AT_ONCE)
        self.writer._send(self.writer._wal)
        self.close(bounded, step * AT_ONCE)
        self.writer._send(self.writer._wal)

    def open(self, name: str, *, open_ended: bool = False) -> RequestUsage:
        params = SamplingParams(max_tokens=8000)
        requests = [GenerateRequest(f"{name}-{i}", PROMPT, params) for i in range(CHOICES[name])]
        told: dict[str, Any] = {"answer_id": name, "base": name, "num_choices": len(requests), "received_at": 0.0}
        account = self.accounts.open(Principal(tenant="acme", key_id="k1"), requests, open_ended=open_ended, **told)
        self.write()
        return account

    def close(self, account: RequestUsage, num_tokens: int) -> None:
        last = Delta("", (), None, "stop", len(PROMPT), num_tokens)
        account.close("ok", [last] * CHOICES[account.base])
        self.write()

    def write(self) -> None:
        self.writer._queue.put(None)
        self.writer._append_all()


def dying(call: Callable[..., Any], at: int, calls: Counter[str]) -> Callable[..., Any]:
    """`call`, during whose `at`-th call of all the process ends; of what it writes then the half is written."""

    def counted(*given: Any) -> Any:
        calls["all"] += 1
        if calls["all"] == at:
            if isinstance(given[1], memoryview):
                call(given[0], given[1][: len(given[1]) // 2])
            raise Killed
        return call(*given)

    return counted


def test_whatever_write_a_gateway_is_killed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in itertools.count(1):
        folder, calls, was_killed = tmp_path / str(at), Counter[str](), False
        folder.mkdir()
        url = sqlite_catalog(folder)
        with monkeypatch.context() as patched:
            patched.setattr(usage, "Thread", Mock())
            gateway = Gateway(folder, url)
            for name in ("write", "replace", "ftruncate"):
                patched.setattr(os, name, dying(getattr(os, name), at, calls))
            try:
                gateway.run()
            except Killed:
                was_killed = True
            os.close(gateway.writer._wal._fd)
        for _ in range(2):  # the second finds nothing
            UsageWriter(lambda url=url: Catalog(url), folder).close()
        catalog = Catalog(url)
        used = {row.model: row for row in catalog.usage.sums(["model"])}
        catalog.close()
        for name, num_tokens in gateway.delivered.items():
            assert used[name].num_requests == 1, at
            assert used[name].num_prompt_tokens == len(PROMPT), at
            assert num_tokens - 1024 * CHOICES[name] <= used[name].num_output_tokens <= num_tokens, (at, name)
        assert list((folder / FOLDER).iterdir()) == [], at
        if not was_killed:
            assert {name: row.num_output_tokens for name, row in used.items()} == gateway.delivered
            break
    assert at > 15
