"""`loray jobs` on a catalog and a job server of its own; tests/serve_apps/api/test_commands.py asks a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.submission import command
from jobs.submission.command import jobs
from jobs.submission.tracker import id_of
from loray.catalog import Catalog
from loray.errors import ClusterError, JobNotFound
from loray.schemas.resources import RECIPE_EXAMPLE as RECIPE
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, TrainSpec
from tests.fixtures.api import FakeJobs

NIGHTLY = id_of(DEFAULT_TENANT, "nightly")


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setenv("LORAY_HOME", str(tmp_path))
    catalog = Catalog(Settings.from_env().catalog)
    catalog.jobs.add(NIGHTLY, name="tone", recipe=TrainSpec.parse(RECIPE, source="example"))
    return catalog


def test_with_a_job_server(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeJobs()
    ray.say(NIGHTLY, "RUNNING")
    monkeypatch.setattr(command, "HomeJobServer", lambda settings: ray)
    call = CliRunner()
    (job,) = json.loads(call.invoke(jobs, ["ls", "--json"]).output)
    assert (job["id"], job["status"]) == (NIGHTLY, "running")
    assert call.invoke(jobs, ["logs", "nightly"]).output == f"log of {NIGHTLY}\n"
    assert call.invoke(jobs, ["logs", "-f", "nightly"]).output == "a\nb\nc\n"
    assert call.invoke(jobs, ["stop", "nightly"]).output.startswith(f"{NIGHTLY} is asked to stop")
    assert isinstance(call.invoke(jobs, ["stop", "nobody"]).exception, JobNotFound)


def test_on_a_terminal_events_are_in_words(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    warning, odd = '{"event": "warning", "message": "mind"}', '{"event": "warning", "text": "of another version"}'
    lines = ["Running entrypoint", warning, odd]
    monkeypatch.setattr(command._Direct, "follow", lambda self, job: iter(lines))
    call = CliRunner()
    assert call.invoke(jobs, ["logs", "-f", "nightly"]).output.splitlines() == lines
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    told = call.invoke(jobs, ["logs", "-f", "nightly"]).output.splitlines()
    assert told == ["Running entrypoint", "warning: mind", odd]


def test_without_a_cluster(catalog: Catalog) -> None:
    call = CliRunner()
    assert "tone" in call.invoke(jobs, ["ls"]).output  # as the catalog has it
    refused = call.invoke(jobs, ["logs", "nightly"]).exception
    assert isinstance(refused, ClusterError)
    assert "no Ray cluster runs on this machine" in str(refused)
