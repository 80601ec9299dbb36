"""Run folders on disk and in a bucket: runs, files and locks; and the lease of a run's driver."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jobs.runs import leases
from jobs.runs.folders import PUBLISHED, SNAPSHOT, RunFolder, Runs, SharedRunFolder, open_runs
from jobs.runs.leases import leased
from loray.errors import ConflictError, SpecError, StoreError, TrainingError
from loray.settings import Settings
from loray.store import LocalStore, open_store


@pytest.fixture(params=["file", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    env = {"LORAY_HOME": str(tmp_path / "home")}
    if request.param == "s3":
        env["LORAY_STORE"] = request.getfixturevalue("s3_server").url("runs", prefix="some/where")
    return Settings.from_env(env)


@pytest.fixture
def runs(settings: Settings) -> Runs:
    return open_runs(settings)


def run_in_bucket(server: Any, tmp_path: Path) -> RunFolder:
    env = {"LORAY_HOME": str(tmp_path / "home"), "LORAY_STORE": server.url("runs")}
    return open_runs(Settings.from_env(env)).new("arithmetic", "job")


def no_loss(why: str) -> None:
    raise AssertionError(f"lost: {why}")


def test_runs_are_found_again(settings: Settings, runs: Runs) -> None:
    with pytest.raises(SpecError, match=r"no run of 'arithmetic' in .*runs/arithmetic to go on with"):
        runs.latest("arithmetic")
    runs.new("arithmetic", "job-1")
    second = runs.new("arithmetic", "job-2")
    runs.new("other", "job-3")
    found = open_runs(settings).latest("arithmetic")
    assert (str(found), found.job_id) == (str(second), "job-2")
    assert str(found).startswith(("s3://runs-", str(settings.home / "runs")))
    assert found.read("published.json") is None
    found.write("published.json", b"1")
    found.write("published.json", b"2")
    assert second.read("published.json") == b"2"
    with pytest.raises(TrainingError, match="has no checkpoint to publish"):
        found.result()


def test_adapters_and_runs_share_a_bucket(settings: Settings, runs: Runs) -> None:
    store = open_store(settings.store)
    store.put_if_absent("blobs/ab/abc", b"x")
    run = runs.new("arithmetic", "job")
    keys = list(store.list())
    assert "blobs/ab/abc" in keys
    assert any(key.startswith("runs/arithmetic/") for key in keys) == str(run).startswith("s3://")


def test_every_driver_appends_to_the_history(settings: Settings, runs: Runs, tmp_path: Path) -> None:
    run = runs.new("arithmetic", "job")
    with run.history() as (path, _), path.open("a") as file:
        file.write("first\n")
    with suppress(RuntimeError), open_runs(settings).latest("arithmetic").history() as (path, _):
        assert path.read_text() == "first\n"
        with path.open("a") as file:
            file.write("second\n")
        raise RuntimeError("the run failed")
    assert run.read("events.jsonl") == b"first\nsecond\n"
    if str(run).startswith("s3://"):  # from another machine
        elsewhere = Settings.from_env(settings.to_env() | {"LORAY_HOME": str(tmp_path / "elsewhere")})
        with open_runs(elsewhere).latest("arithmetic").history() as (path, _):
            assert path.read_text() == "first\nsecond\n"


def test_a_local_history_that_differs_from_the_buckets_is_replaced(s3_server: Any, tmp_path: Path) -> None:
    run = run_in_bucket(s3_server, tmp_path)
    with run.history() as (path, _):
        path.write_text("here\n")
    run.write("events.jsonl", b"elsewhere\n")
    with run.history() as (path, _):
        assert path.read_text() == "elsewhere\n"
        path.write_text("elsewhere\nand a killed driver of this machine\n")
    run.write("events.jsonl", b"elsewhere\n")
    with run.history() as (path, _):
        assert path.read_text() == "elsewhere\nand a killed driver of this machine\n"


def test_a_driver_that_lost_its_lease_does_not_overwrite_the_history(
    s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    run = run_in_bucket(s3_server, tmp_path)
    assert isinstance(run, SharedRunFolder)
    lost: list[str] = []
    with run.locked("slow", lost.append), run.history() as (path, _):
        path.write_text("of the slow driver\n")
        other = leases._Lease(run.objects, f"{run.key}/lock/", "next")
        until(lambda: other._write(max(other._numbers()) + 1, other._ours))
        run.write("events.jsonl", b"of the next driver\n")
        until(lambda: bool(lost))
    assert run.read("events.jsonl") == b"of the next driver\n"
    assert path.read_text() == "of the slow driver\n"


def test_the_error_names_runs_of_the_folder_store(s3_server: Any, tmp_path: Path) -> None:
    before = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    open_runs(before).new("arithmetic", "job")
    runs = open_runs(replace(before, store=s3_server.url("runs")))
    with pytest.raises(SpecError, match=rf"set LORAY_STORE to the folder store: its runs in {tmp_path}/runs/arith"):
        runs.latest("arithmetic")
    with pytest.raises(SpecError, match=r"train it without --resume$"):
        runs.latest("other")


# Takes the run of each environment that it reads, and leaves it at the next line.
DRIVER = """
import json
import sys

from jobs.runs import folders, leases
from loray.settings import Settings

leases.BEAT_S = 0.1
while line := sys.stdin.readline():
    with folders.open_runs(Settings.from_env(json.loads(line))).latest("arithmetic").locked("job-1", print):
        print("has it", flush=True)
        sys.stdin.readline()
    print("left it", flush=True)
"""


@pytest.fixture(scope="module")
def other_driver() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate(timeout=60)


def test_a_run_has_one_driver(
    settings: Settings, runs: Runs, other_driver: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    run = runs.new("arithmetic", "job")
    assert other_driver.stdin is not None
    assert other_driver.stdout is not None
    other_driver.stdin.write(f"{json.dumps(settings.to_env())}\n")
    other_driver.stdin.flush()
    assert other_driver.stdout.readline() == "has it\n"
    with pytest.raises(ConflictError, match="at work on th"), run.locked("job-2", no_loss):
        pass
    other_driver.stdin.write("\n")
    other_driver.stdin.flush()
    assert other_driver.stdout.readline() == "left it\n"
    for job in ("job-2", "job-3"):
        with run.locked(job, no_loss):
            pass


def test_a_missing_bucket_is_a_store_error(s3_server: Any, tmp_path: Path) -> None:
    url = s3_server.url("runs").replace("s3://runs-", "s3://no-such-bucket-")
    with pytest.raises(StoreError, match="cannot be read or written"):
        open_runs(Settings.from_env({"LORAY_HOME": str(tmp_path), "LORAY_STORE": url})).new("a", "job")


# -- leases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_WATCH_S", 0.02)


def entries(store: LocalStore) -> list[dict[str, Any]]:
    return [json.loads(store.get(key)) for key in store.list("lock/")]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_released_lease_is_free_at_once(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STALE_S", 3600)
    for job in ("a", "b"):
        with leased(store, "lock/", job_id=job, lost=no_loss):
            (entry,) = entries(store)
            assert (entry["job"], entry["holder"] is None) == (job, False)
        (entry,) = entries(store)  # one object remains
        assert entry["holder"] is None


def test_a_dead_driver_is_replaced_and_a_living_one_is_not(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 3600)  # sends no heartbeat
    monkeypatch.setattr(leases, "STALE_S", 0.2)
    lost: list[str] = []
    with leased(store, "lock/", job_id="dead", lost=lost.append):
        monkeypatch.setattr(leases, "BEAT_S", 0.05)
        with leased(store, "lock/", job_id="next", lost=no_loss):
            monkeypatch.setattr(leases, "STALE_S", 30)
            with (
                pytest.raises(ConflictError, match=r"the driver of job next .* is at work"),
                leased(store, "lock/", job_id="third", lost=no_loss),
            ):
                pass
    assert lost == []


def test_a_replaced_driver_is_informed(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STALE_S", 0.1)
    monkeypatch.setattr(leases, "BEAT_S", 3.0)
    lost: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(leased(store, "lock/", job_id="slow", lost=lost.append))
        monkeypatch.setattr(leases, "BEAT_S", 0.02)
        stack.enter_context(leased(store, "lock/", job_id="next", lost=no_loss))
        until(lambda: bool(lost))
        assert "job next" in lost[0]
    assert [e["job"] for e in entries(store)] == ["next"]  # the slow driver did not release the next one's lease


def test_of_many_drivers_one_wins(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STALE_S", 30)
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    outcomes: list[str] = []
    start, everybody_tried = threading.Barrier(8), threading.Event()

    def contend(number: int) -> None:
        start.wait()
        try:
            with leased(store, "lock/", job_id=f"job-{number}", lost=no_loss):
                outcomes.append("won")
                everybody_tried.wait(30)
        except ConflictError:
            outcomes.append("lost")
        if len(outcomes) == 8:
            everybody_tried.set()

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(outcomes) == 8)
    everybody_tried.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]


class Flaky(LocalStore):
    """Carries out every request, and loses as many responses as `failures` says."""

    failures: ClassVar[dict[str, int]] = {}

    def list(self, prefix: str = "") -> Iterator[str]:
        self._fail("list")
        return super().list(prefix)

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        written = super().put_if_absent(key, data)
        self._fail("put")
        return written

    def _fail(self, what: str) -> None:
        if self.failures.get(what, 0) > 0:
            self.failures[what] -= 1
            raise StoreError("connection lost")


@pytest.mark.parametrize("what", ["list", "put"])
def test_the_holder_recognises_its_heartbeat_after_a_lost_response(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    flaky = Flaky(store.root)
    with leased(flaky, "lock/", job_id="healthy", lost=no_loss):
        monkeypatch.setattr(flaky, "failures", {what: 2})
        until(lambda: flaky.failures[what] == 0)
        first = max(store.list("lock/"))
        until(lambda: max(store.list("lock/")) > first)
    assert [e["holder"] for e in entries(store)] == [None]
    lease = leases._Lease(flaky, "lock/", "released")
    lease.acquire()
    monkeypatch.setattr(flaky, "failures", {what: 1})
    with pytest.raises(StoreError):
        lease._write(lease._number + 1, lease._ours)
    lease.release()
    assert json.loads(store.get(max(store.list("lock/"))))["holder"] is None


def test_a_number_that_was_removed_is_not_written_again(store: LocalStore) -> None:
    """A driver that was suspended after reading the lease must not take it from a driver that came later."""
    sleeper, owner = (leases._Lease(store, "lock/", job) for job in ("sleeper", "owner"))
    owner.acquire()
    seen = owner._number
    owner._write(owner._number + 1, owner._ours)
    owner._write(owner._number + 1, owner._ours)
    assert not sleeper._write(seen + 1, sleeper._ours)
    assert [e["job"] for e in entries(store)] == ["owner"]


def test_a_run_that_ended_before_its_first_checkpoint_does_not_hide_the_one_before(tmp_path: Path) -> None:
    runs = open_runs(Settings.from_env({"LORAY_HOME": str(tmp_path)}))
    with pytest.raises(SpecError, match=r"no run of 'arithmetic'"):
        runs.resumable("arithmetic")
    begun, saved = runs.new("arithmetic", "job-1"), runs.new("arithmetic", "job-2")
    assert runs.resumable("arithmetic") == saved  # neither has a checkpoint
    begun.write(SNAPSHOT, b"{}")
    assert runs.resumable("arithmetic") == begun
    begun.write(PUBLISHED, b"{}")
    assert runs.resumable("arithmetic") == saved  # the other one has ended
    assert runs.latest("arithmetic") == saved
