"""Requests of a gateway that was killed are charged with their prompt and what they had delivered."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loray.catalog import Catalog
from loray.settings import Settings
from loray.spec import Delta, GenerateRequest, Principal, SamplingParams
from serve_apps.accounting import usage
from serve_apps.accounting.accounts import RequestUsage, UsageMeter, UsageSink
from serve_apps.accounting.usage import FOLDER, UsageLog, UsageWriter, abandoned
from tests.catalog.test_usage import event
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.asking import eventually

PROMPT = (1,) * 700
AT_ONCE = 256  # tokens
CHOICES = {"long": 2, "bounded": 1, "short": 1}


class Killed(BaseException):
    pass


class NoThread:
    def __init__(self, **_: Any) -> None: ...

    def start(self) -> None: ...


class Gateway:
    """Its requests and its journal, in one thread."""

    def __init__(self, folder: Path, url: str) -> None:
        self.writer = UsageWriter(lambda: Catalog(url), folder)
        books = UsageSink(Settings.from_env({"LORAY_HOME": str(folder), "LORAY_CATALOG": url}))
        books._writer = self.writer
        self.accounts = UsageMeter(sink=books)
        self.delivered: Counter[str] = Counter()

    def run(self) -> None:
        long, bounded = self.open("long", open_ended=True), self.open("bounded")
        for step in range(1, 10):
            for account in (long, bounded):
                for choice in range(CHOICES[account.base]):
                    self.delivered[account.base] += AT_ONCE
                    assert account.tokens_until_asked(choice, step * AT_ONCE) > step * AT_ONCE
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
        account = self.accounts.open(
            Principal(tenant="acme", key_id="k1"),
            requests,
            answer_id=name,
            base=name,
            num_choices=len(requests),
            received_at=0.0,
            open_ended=open_ended,
        )
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
            patched.setattr(usage, "Thread", NoThread)
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
        used = {row.model: row for row in catalog.usage(["model"])}
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


def test_an_open_request_waits_for_nothing(tmp_path: Path, catalog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "FLUSH_S", 0.01)
    writer = UsageWriter(lambda: Catalog(catalog_url), tmp_path)
    writer.note_open(event(1, outcome="abandoned"))
    (path,) = (tmp_path / FOLDER).glob("*.jsonl")
    assert eventually(lambda: path.stat().st_size > 0)
    assert writer.status.num_bytes == 0
    writer.add(event(2))
    catalog = Catalog(catalog_url)
    assert eventually(lambda: catalog.usage([])[0].num_requests == 1)
    assert eventually(lambda: writer.status == (True, 0, 0.0, 0))
    assert b"cmpl-1" in path.read_bytes()
    assert b"cmpl-2" not in path.read_bytes()
    writer.add(event(1))
    writer.close()
    assert catalog.usage([])[0].num_requests == 2
    assert list((tmp_path / FOLDER).iterdir()) == []
    catalog.close()


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
