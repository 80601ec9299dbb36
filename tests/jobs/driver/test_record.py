"""The driver's record in the catalog, whatever happens to the job or to the catalog."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from jobs.driver.record import Interrupted, Interrupts, recorded
from loray.catalog import Catalog
from loray.errors import CatalogError, TrainingError
from loray.spec import TrainSpec
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.recipes import RECIPE

SPEC = TrainSpec.model_validate(RECIPE)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(sqlite_catalog(tmp_path))


def test_a_job_has_rays_id_or_a_random_one(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
    catalog.jobs.add("raysubmit_1", name=SPEC.name, recipe=SPEC)  # as the API server does before it submits it
    with recorded(catalog, SPEC) as record:
        assert record.job_id == "raysubmit_1"
        assert catalog.jobs.get("raysubmit_1").status == "running"
        record.end("succeeded", version=3)
    job = catalog.jobs.get("raysubmit_1")
    assert (job.status, job.version, job.recipe) == ("succeeded", 3, SPEC)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    with recorded(catalog, SPEC) as first, recorded(catalog, SPEC) as second:
        assert len({first.job_id, second.job_id}) == 2


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (TrainingError("too many steps"), "failed", "too many steps"),
        (OSError(28, "No space left on device"), "failed", "[Errno 28] No space left on device"),
        (MemoryError(), "failed", "MemoryError"),
        (Interrupted("stopped by SIGTERM"), "stopped", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "stopped", "interrupted; go on from the last checkpoint with --resume"),
    ],
)
def test_how_a_job_ends(catalog: Catalog, error: BaseException, status: str, message: str) -> None:
    with pytest.raises(type(error)), recorded(catalog, SPEC):
        raise error
    (job,) = catalog.jobs.page().items
    assert (job.status, job.message) == (status, message)


def test_an_unreachable_catalog_does_not_end_the_run(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise CatalogError("connection refused")

    with recorded(catalog, SPEC) as record:
        monkeypatch.setattr(catalog.jobs, "end", gone)
        record.end("succeeded", version=1)
    with pytest.raises(TrainingError, match="the reason"), recorded(catalog, SPEC):
        raise TrainingError("the reason")


def test_a_signal_interrupts_the_main_thread() -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    def take_over(interrupts: Interrupts) -> None:
        interrupts.raise_in_main_thread("another driver took over")
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(), pytest.raises(Interrupted, match="stopped by SIGTERM"):
        stop()
    with Interrupts() as interrupts:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as ray.init does with its own
        interrupts.arm()
        with pytest.raises(Interrupted, match="another driver took over"):
            take_over(interrupts)
    assert signal.getsignal(signal.SIGTERM) == before
