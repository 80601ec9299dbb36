"""Processes that make the forms of a version: what they say, and when they end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from loray.catalog import AdapterVersion
from loray.errors import DeadlineExceeded, LorayError, RateLimited, UnsupportedError
from loray.publishing.convert import command_of, environment_of, raise_failure
from serve_apps.api import conversions
from serve_apps.api.conversions import Conversions
from tests.conftest import compute_in_background
from tests.fixtures.api import Api

STILL_THERE = 'import os, sys; open(sys.argv[1], "w").write(str(os.getpid())); sys.stdin.read()'


@pytest.mark.parametrize(
    ("code", "output", "error", "said"),
    [
        (1, b'noise\n{"kind": "UnsupportedError", "message": "no"}\n', UnsupportedError, "no"),
        (-9, b"", LorayError, "ended without an answer"),
        (1, b'{"kind": "os", "message": "x"}', LorayError, "x"),
        (1, b"[]", LorayError, "ended without an answer"),
    ],
)
def test_what_a_process_says(code: int, output: bytes, error: type[LorayError], said: str) -> None:
    with pytest.raises(error, match=said):
        raise_failure(code, output)


def test_a_process_ends_with_its_server(api: Api, tone: AdapterVersion, tmp_path: Path) -> None:
    command = command_of("merged", tone.ref, tmp_path / "merged")
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, env=environment_of(api.settings), check=False)
    assert ended.returncode == 1
    assert not (tmp_path / "merged").exists()
    env = environment_of(replace(api.settings, catalog="postgresql://user:secret@host/x", api_key="sk-lr-secret"))
    assert {name for name in env if name.startswith("LORAY_")} == {"LORAY_HOME", "LORAY_STORE", "LORAY_LOG_LEVEL"}


class Client:
    """`leaves`: as soon as there is that file."""

    def __init__(self, leaves: Path | None = None) -> None:
        self._leaves = leaves

    async def is_disconnected(self) -> bool:
        return self._leaves is not None and is_written(self._leaves)


@pytest.fixture
def make(api: Api, tone: AdapterVersion, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`make(target, tenant=…, client=…)` begins a conversion whose process writes its id to `target`, and waits."""
    monkeypatch.setattr(
        conversions, "command_of", lambda form, ref, target, max_bytes: [sys.executable, "-c", STILL_THERE, str(target)]
    )
    monkeypatch.setattr(conversions, "num_cores", lambda: 8)
    made = Conversions(api.settings, lambda: 20 << 30)  # of which 16 are for two of 8

    async def begin(target: Path, tenant: str = "acme", client: Client | None = None) -> None:
        with made.place(tenant):
            asked: Any = client or Client()
            await made.make("gguf", tone.ref, target, client=asked)

    return begin


def is_written(pid: Path) -> bool:
    return pid.is_file() and pid.read_text() != ""


def has_ended(pid: Path) -> bool:
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_client_that_leaves_ends_the_process(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ClientDisconnect):
        asyncio.run(make(tmp_path / "pid", client=Client(tmp_path / "pid")))
    assert has_ended(tmp_path / "pid")


@pytest.mark.skipif(sys.platform != "linux", reason="processes have no such priority")
def test_a_process_computes_in_the_background_from_its_start(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_apps.api.conversions.compute_in_background", compute_in_background)

    async def run() -> int:
        running = asyncio.ensure_future(make(tmp_path / "pid"))
        while not is_written(tmp_path / "pid"):
            await asyncio.sleep(0.01)
        policy = os.sched_getscheduler(int((tmp_path / "pid").read_text()))
        running.cancel()
        await asyncio.wait({running})
        return policy

    assert asyncio.run(run()) == os.SCHED_IDLE


def test_a_deadline_ends_the_process(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversions, "DEADLINE_S", 0.0)
    with pytest.raises(DeadlineExceeded, match="longer than 0 s"):
        asyncio.run(make(tmp_path / "pid"))
    monkeypatch.setattr(conversions, "DEADLINE_S", 60.0)
    with pytest.raises(ClientDisconnect):  # its place is free
        asyncio.run(make(tmp_path / "pid", client=Client(tmp_path / "pid")))


def test_few_at_once_and_one_of_a_tenant(make: Callable[..., Any], tmp_path: Path) -> None:
    async def run() -> list[str]:
        running = [asyncio.ensure_future(make(tmp_path / tenant, tenant=tenant)) for tenant in ("acme", "beta")]
        while not all(is_written(tmp_path / tenant) for tenant in ("acme", "beta")):
            await asyncio.sleep(0.01)
        refused = []
        for tenant in ("acme", "gamma"):
            with pytest.raises(RateLimited) as error:
                await make(tmp_path / "more", tenant=tenant)
            refused.append(str(error.value))
        for task in running:
            task.cancel()
        assert [type(e) for e in await asyncio.gather(*running, return_exceptions=True)] == [asyncio.CancelledError] * 2
        return refused

    of_tenant, of_all = asyncio.run(run())
    assert "of this tenant" in of_tenant
    assert "2 conversions" in of_all
    assert all(has_ended(tmp_path / tenant) for tenant in ("acme", "beta"))
