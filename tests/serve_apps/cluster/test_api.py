"""The catalog's API on a real Ray cluster: a posted recipe becomes a version, which is served."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from jobs.submission.commands import for_server
from loray.client import CatalogClient
from loray.errors import ConflictError, JobNotFound, RevisionConflict
from loray.spec import TrainSpec
from tests.fixtures.cluster import RayCluster, Served
from tests.fixtures.recipes import RECIPE
from tests.fixtures.trained import Trained

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def catalog(served: Served) -> Iterator[CatalogClient]:
    with CatalogClient(served.url) as client:
        yield client


def until(what: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(served: Served, model: str) -> bool:
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    return httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).status_code == 200


def answer(served: Served, model: str) -> str:
    body = {"model": model, "prompt": "abcdefgh", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_from_a_posted_recipe_to_an_answer(served: Served, catalog: CatalogClient, api_job: Trained) -> None:
    events, job_id = api_job.events, api_job.job_id
    assert events, "\n".join(api_job.log)
    assert events[-1]["event"] == "published", "\n".join(api_job.log)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    ended = catalog.job(job_id)
    assert (ended.status, ended.version, ended.actor) == ("succeeded", 1, "api")
    assert ended.started_at is not None
    assert "published" in catalog.logs(job_id)

    version = catalog.version("posted", 1)
    assert (version.digest, version.manifest.job_id) == (events[-1]["digest"], job_id)
    assert version.manifest.recipe is not None
    before = answer(served, served.base.name)
    alias = catalog.promote("posted", "prod", 1, create=True)
    with pytest.raises(RevisionConflict):
        catalog.promote("posted", "prod", 1, create=True)
    until(lambda: answers(served, "posted@prod"))  # as soon as serving has read the catalog again
    served_by = answer(served, "posted@prod")
    assert served_by == answer(served, "posted@1")
    assert served_by != before
    until(lambda: any(item.tier == "pool" for item in catalog.placement("posted").items))
    (item,) = catalog.placement("posted").items
    assert (item.version, item.digest, item.uses >= 2) == (1, version.digest, True)
    assert catalog.alias("posted", "prod") == alias
    with pytest.raises(ConflictError, match="already"):
        catalog.submit(for_server(api_job.recipe, served.url), id=job_id)


def test_a_job_that_is_stopped(ray_cluster: RayCluster, served: Served, catalog: CatalogClient) -> None:
    """Stops a long command; tests/jobs/runs/test_shared_runs.py stops a training."""
    from ray.job_submission import JobSubmissionClient

    served.catalog.jobs.add("to-be-stopped", name="endless", recipe=TrainSpec.parse(RECIPE, source="the test"))
    client = JobSubmissionClient(ray_cluster.address)
    client.submit_job(submission_id="to-be-stopped", entrypoint="echo at work; exec sleep 3600")
    assert "at work" in catalog.follow("to-be-stopped")  # no further than that
    assert catalog.job("to-be-stopped").status == "running"
    catalog.stop("to-be-stopped")
    until(lambda: catalog.job("to-be-stopped").has_ended)
    assert (catalog.job("to-be-stopped").status, catalog.job("to-be-stopped").version) == ("stopped", None)
    assert [j.id for j in catalog.jobs(status="stopped", name="endless")] == ["to-be-stopped"]
    with pytest.raises(JobNotFound):
        catalog.job("nobody")


def test_a_driver_that_died_without_a_record(ray_cluster: RayCluster, served: Served, catalog: CatalogClient) -> None:
    from ray.job_submission import JobSubmissionClient

    from jobs.submission.server import TAIL_BYTES, RayJobServer

    spec = TrainSpec.parse(RECIPE, source="the test")
    served.catalog.jobs.add("silent", name="silent", recipe=spec)
    client, server = JobSubmissionClient(ray_cluster.address), RayJobServer(lambda: ray_cluster.address)
    # Ray's own first line comes to the log when its buffer is flushed, which may be after the driver has begun.
    first = "until grep -q ^Running /proc/$$/fd/1; do sleep 0.01; done"
    client.submit_job(submission_id="silent", entrypoint=f"{first}; seq 400000 && echo working && exit 3")
    until(lambda: catalog.job("silent").has_ended)
    assert catalog.job("silent").status == "failed"
    assert "exit code 3" in catalog.job("silent").message
    assert "working" in catalog.logs("silent").splitlines()
    assert server.tail("silent", 2) == "400000\nworking\n"
    end = server.tail("silent", 400_001)  # of 2.7 MB
    assert (len(end) <= TAIL_BYTES, end.endswith("\nworking\n"), end[:7].strip().isdigit()) == (True, True, True)
    assert server.find_all(["silent", "nothing"]) == {"silent": server.find("silent")}
    client.delete_job("silent")
    with pytest.raises(JobNotFound, match=r"\(failed\) is gone"):
        catalog.logs("silent")
