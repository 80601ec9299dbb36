"""The driver's decisions, without a cluster: what it publishes from a run, and how the command follows a job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs import command
from jobs import train as driver
from jobs.events import decode, encode
from jobs.submission.commands import Submission
from jobs.submission.server import RayJob
from loray.catalog import Catalog
from loray.errors import ClusterError, ConflictError, LorayError, StoreError
from loray.settings import Settings
from tests.fixtures.cluster import free_port
from tests.fixtures.recipes import write


def test_other_weights_under_a_known_base_are_refused_before_training(tmp_path: Path, settings: Settings) -> None:
    Catalog(settings.catalog).bases.add("tiny", "0" * 64)
    with pytest.raises(ConflictError, match="knows base model 'tiny' with fingerprint 000000000000"):
        driver.train(write(tmp_path), settings, print)
    assert not (settings.home / "runs").exists()


def test_an_unexpected_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(driver, "train", full)
    outcome = CliRunner().invoke(driver.main, [str(write(tmp_path).path), "--events"])
    assert outcome.exit_code == 1
    (line,) = outcome.stdout.splitlines()
    event = decode(line)
    assert event is not None
    assert event["kind"] == "OSError"
    assert event["message"].startswith("OSError: [Errno 28] No space left on device")


# -- following a job --------------------------------------------------------------------------------------------------


class Flaky:
    """A job server that sends one more line with each connection and then closes it."""

    def __init__(self, num_lines: int, lines_at_once: int) -> None:
        self.num_lines, self.lines_at_once, self.calls = num_lines, lines_at_once, 0

    async def follow(self, job: str) -> AsyncIterator[str]:
        self.calls += 1
        shown = min(self.num_lines, self.calls * self.lines_at_once)
        yield "".join(f"{i}\n" for i in range(shown))
        if shown < self.num_lines or not self.lines_at_once:
            raise RuntimeError("connection lost")

    def find(self, job: str) -> RayJob:
        if self.calls < 2:
            raise ClusterError("no answer")
        return RayJob("SUCCEEDED", "")


def test_a_lost_connection_is_opened_again_as_long_as_it_brings_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_RECONNECT_S", 0)
    lines: list[str] = []
    asyncio.run(command.follow(Flaky(12, 1), "job", lines.append))
    assert lines == [str(i) for i in range(12)]
    dead = Flaky(12, 0)
    with pytest.raises(LorayError, match="lost the connection"):
        asyncio.run(command.follow(dead, "job", lines.append))
    assert dead.calls == 5


def test_a_job_that_fails_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        async def follow(self, job: str) -> AsyncIterator[str]:
            yield '{"event": "error", "kind": "BaseNotFound", "message": "no base model \'missing\'"}\n'

        def find(self, job: str) -> RayJob:
            return RayJob("FAILED", "")

    monkeypatch.setattr(command, "submit", lambda *_, **__: (Failed(), "job"))
    outcome = CliRunner().invoke(command.train, [str(write(tmp_path, base="missing").path)])
    assert outcome.exit_code == 1
    assert outcome.output.splitlines()[-1] == "error: no base model 'missing'"


def test_a_store_that_does_not_answer_is_refused_at_submission(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Submission, "of", lambda *_: pytest.fail("submitted"))
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    store = f"s3://bucket/loray?endpoint_url=http://127.0.0.1:{free_port()}&credentials_file={tmp_path}/keys"
    for name, value in (settings.to_env() | {"LORAY_STORE": store}).items():
        monkeypatch.setenv(name, value)
    outcome = CliRunner().invoke(command.train, [str(write(tmp_path).path)])
    assert isinstance(outcome.exception, StoreError)


# -- what a person may do next ----------------------------------------------------------------------------------------

PUBLISHED: Any = {"name": "tone", "label": "tone@3", "version": 3, "aliases": [], "refusal": None}


def test_at_the_end_there_are_the_next_commands() -> None:
    console = "http://127.0.0.1:8000/api/v1/console"
    assert command.what_next(PUBLISHED, console) == [
        "  ask it      loray chat tone@3",
        "  promote it  loray adapters promote tone@3   (to prod)",
        f"  look at it  {console}/adapters/tone/versions/3",
    ]
    assert command.what_next(PUBLISHED, None)[0] == "  ask it      loray chat tone@3   (once `loray serve` runs)"
    for fields in ({"aliases": ["prod"]}, {"refusal": "its perplexity is too high"}):
        assert "promote" not in "".join(command.what_next(PUBLISHED | fields, None))


class Ended:
    """A job server whose job has told one event and published."""

    async def follow(self, job: str) -> AsyncIterator[str]:
        event = {"event": "published", "digest": "0" * 64, "nbytes": 12, "step": 1, **PUBLISHED}
        yield f"{encode({'event': 'progress', 'stage': 'reading the data', 'done': 0, 'total': None})}\n"
        yield f"{encode(event)}\n"

    def find(self, job: str) -> RayJob:
        return RayJob("SUCCEEDED", "")


@pytest.mark.parametrize(
    ("urls", "launched", "said"),
    [
        (["http://here:1"], 0, "http://here:1/api/v1/console/jobs/job_1"),
        (["http://here:1"], 1, "no browser was found; open http://here:1/api/v1/console/jobs/job_1"),
        ([], 0, "once `loray serve` runs, its page is /api/v1/console/jobs/job_1"),
    ],
)
def test_watching_opens_the_page_of_the_run(
    urls: list[str], launched: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(command, "submit", lambda *_, **__: (Ended(), "job_1"))
    monkeypatch.setattr(command, "serving_urls", lambda settings: urls)
    monkeypatch.setattr(command.click, "launch", lambda url: opened.append(url) or launched)
    outcome = CliRunner().invoke(command.train, [str(write(tmp_path).path), "--no-plan", "--watch"])
    assert outcome.exit_code == 0, outcome.output
    assert said in outcome.output
    assert opened == [f"{url}/api/v1/console/jobs/job_1" for url in urls]
    assert "published tone@3" in outcome.output
    assert outcome.output.index("reading the data") > outcome.output.index(said)
    opened.clear()
    assert CliRunner().invoke(command.train, [str(write(tmp_path).path), "--no-plan"]).exit_code == 0
    assert opened == []


def test_the_console_is_that_of_the_server_that_takes_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def urls(settings: Settings) -> list[str]:
        asked.append(settings.address)
        raise ClusterError("no answer")

    monkeypatch.setattr(command, "serving_urls", urls)
    settings = Settings.from_env({"LORAY_URL": "http://server:9/v1/"})
    assert command._console_url(settings, None) == "http://server:9/api/v1/console"
    assert command._console_url(settings, "http://head:8265") is None
    assert asked == ["http://head:8265"]
