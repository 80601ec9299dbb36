"""Jobs over HTTP, on both databases, with a scripted job server."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event

import pytest
import sqlalchemy as sa
import yaml

from jobs.submission.tracker import AGENT_S, id_of
from loray.catalog import Catalog
from loray.catalog.database import writing
from loray.catalog.schema import clusters, jobs
from loray.errors import ClusterError
from loray.recipes.load import load_recipe
from loray.spec import DEFAULT_TENANT, TrainSpec
from serve_apps.api import site
from serve_apps.api.examples import RECIPE
from tests.fixtures.api import Api, problem, submit

LAUGHS = b"a: &a [1]\n" + b"".join(  # each line is ten times the one before, and the last one a billion values
    b"%c: &%c [%s]\n" % (letter + 1, letter + 1, b", ".join([b"*%c" % letter] * 10)) for letter in range(97, 106)
)


@pytest.fixture
def api(tmp_path: Path, catalog_url: str) -> Iterator[Api]:
    api = Api(tmp_path / "home", catalog_url)
    yield api
    api.close()


def ray(*chosen: str) -> list[str]:
    """Ray's ids of the jobs for which the default tenant chose these."""
    return [id_of(DEFAULT_TENANT, one) for one in chosen]


def test_a_recipe_reaches_the_driver(api: Api) -> None:
    response = api.http.post("/jobs", json=RECIPE)
    job = response.json()
    assert (response.status_code, response.headers["location"]) == (201, f"/api/v1/jobs/{job['id']}")
    assert (job["status"], job["name"], job["actor"]) == ("pending", "tone", "api")
    (job_id,) = api.jobs.submitted
    assert job_id == job["id"]
    command = shlex.split(api.jobs.submitted[job_id].entrypoint)
    recipe = api.jobs.uploaded[job_id]["recipe.json"]
    assert command[-3:] == ["--events", "<", "recipe.json"]
    assert TrainSpec.parse(json.loads(recipe), source="entrypoint") == load_recipe(json.dumps(RECIPE)).spec
    assert command[command.index("-m") + 1] == "jobs.train"
    assert "--resume" not in command
    env = api.jobs.submitted[job_id].runtime_env["env_vars"]
    assert env["LORAY_STORE"] == api.settings.store
    assert api.http.get(f"http://test{response.headers['location']}").json() == job


@pytest.mark.parametrize("media_type", ["application/yaml", "application/x-yaml", "text/yaml; charset=utf-8"])
def test_yaml(api: Api, media_type: str) -> None:
    headers = {"Content-Type": media_type}
    params = {"id": "mine", "resume": True}
    response = api.http.post("/jobs", params=params, content=yaml.safe_dump(RECIPE), headers=headers)
    (mine,) = ray("mine")
    assert (response.status_code, response.json()["id"]) == (201, mine)
    assert response.headers["location"] == f"/api/v1/jobs/{mine}"
    assert api.http.get("/jobs/mine").json() == api.http.get(f"/jobs/{mine}").json() == response.json()
    assert "--resume" in api.jobs.submitted[mine].entrypoint


def test_what_a_recipe_leaves_out_has_its_methods_default(api: Api) -> None:
    little = {"name": "tone", "adapter": {"method": "vera"}, "data": {"train": "s3://bucket/tone.jsonl"}}
    response = api.http.post("/jobs", params={"id": "little"}, json=little)
    assert response.status_code == 201, response.text
    recipe = response.json()["recipe"]
    assert (recipe["optimizer"]["learning_rate"], recipe["batch"]["rows"], recipe["num_epochs"]) == (0.01, 8, 1)


def test_every_wrong_field_is_named(api: Api) -> None:
    wrong = RECIPE | {"optimizer": {"learning_rate": -1}, "max_step": 3, "name": "a b"}
    body = problem(api.http.post("/jobs", json=wrong), 422)
    assert sorted(e["field"] for e in body["errors"]) == ["max_step", "name", "optimizer.learning_rate"]
    for content, media_type, detail in [
        (b"{", "application/json", "not valid JSON"),
        (b'{"seed": NaN}', "application/json", "NaN is not a JSON number"),
        (b"\xff", "application/json", "not valid JSON"),
        (b"[" * 100_000, "application/json", "not valid JSON"),
        (b"[" * 5_000, "application/yaml", "not valid YAML"),
        (b"a: [", "application/yaml", "not valid YAML"),
        (b"\x00", "application/yaml", "not valid YAML"),
        (LAUGHS, "application/yaml", "write out what the alias *a stands for"),
        (b"data: &d {train: x.jsonl}\nother:\n  <<: *d\n", "text/yaml", "write out what the alias *d stands for"),
        (b"[]", "application/json", "not valid"),
        (b"", "application/yaml", "not valid"),
        (b'{"name": "\\ud800"}', "application/json", "not valid"),
    ]:
        response = api.http.post("/jobs", content=content, headers={"Content-Type": media_type})
        assert detail in problem(response, 422)["detail"], content[:20]
    assert (
        "relative path" in problem(api.http.post("/jobs", json=RECIPE | {"data": {"train": "x.jsonl"}}), 422)["detail"]
    )
    assert (
        "application/json or"
        in problem(api.http.post("/jobs", content=b"x", headers={"Content-Type": "a/b"}), 415)["detail"]
    )
    for wrong_id in ("a/b", "a" * 112):
        problem(api.http.post("/jobs", params={"id": wrong_id}, json=RECIPE), 422)
    assert api.jobs.submitted == {}
    assert api.http.get("/jobs").json()["items"] == []


def test_an_infinite_number_is_refused(api: Api) -> None:
    recipe = yaml.safe_dump(RECIPE | {"adapter": {"method": "lora", "alpha": float("inf")}})
    headers = {"Content-Type": "application/yaml"}
    body = problem(api.http.post("/jobs", content=recipe, headers=headers), 422)
    assert [e["field"] for e in body["errors"]] == ["adapter.lora.alpha"]


def test_ids_and_names_that_are_taken(api: Api) -> None:
    mine = submit(api, "mine")["id"]
    api.jobs.say(*ray("forgotten"), "RUNNING")
    assert "already" in problem(api.http.post("/jobs", params={"id": "forgotten"}, json=RECIPE), 409)["detail"]
    problem(api.http.get("/jobs/forgotten"), 404)  # no row of the job that was not submitted
    for known in ("mine", mine):
        assert "already" in problem(api.http.post("/jobs", params={"id": known}, json=RECIPE), 409)["detail"]
    api.catalog.add_base("smollm2", "ba5e" * 16)
    problem(api.http.post("/jobs", json=RECIPE | {"name": "smollm2"}), 409)
    assert list(api.jobs.submitted) == [mine]


def test_a_job_follows_ray(api: Api) -> None:
    submit(api, "good")
    submit(api, "silent")
    good, silent = ray("good", "silent")
    api.jobs.say(good, "RUNNING")
    running = api.http.get("/jobs/good").json()
    assert running["status"] == "running"
    assert running["started_at"] is not None
    api.catalog.end_job(good, "succeeded", version=3)  # the driver, before Ray has seen it end
    assert (api.http.get("/jobs/good").json()["status"], api.http.get("/jobs/good").json()["version"]) == (
        "succeeded",
        3,
    )
    api.jobs.say(silent, "FAILED", "Job entrypoint command failed with exit code 137")
    failed = api.http.get("/jobs/silent").json()
    assert (failed["status"], failed["message"]) == ("failed", "Job entrypoint command failed with exit code 137")
    assert failed["ended_at"] is not None
    api.jobs.jobs.clear()
    assert api.http.get("/jobs/silent").json() == failed  # it was written down
    assert problem(api.http.get("/jobs/none"), 404)["type"] == "urn:loray:problem:job-not-found"


def test_pages_and_filters(api: Api) -> None:
    for i in range(5):
        submit(api, f"job-{i}", name="tone" if i % 2 else "other")
    ids = ray(*(f"job-{i}" for i in range(5)))
    api.jobs.say(ids[4], "SUCCEEDED")
    asked = api.jobs.num_asked
    first = api.http.get("/jobs", params={"limit": 2})
    assert api.jobs.num_asked == asked + 1
    assert [(j["id"], j["status"]) for j in first.json()["items"]] == [(ids[4], "succeeded"), (ids[3], "pending")]
    second = api.http.get(f"http://test{first.links['next']['url']}").json()
    assert [j["id"] for j in second["items"]] == [ids[2], ids[1]]
    assert [j["id"] for j in api.http.get("/jobs", params={"name": "tone"}).json()["items"]] == [ids[3], ids[1]]
    api.jobs.say(ids[3], "STOPPED")
    pending = api.http.get("/jobs", params={"status": "pending"}).json()["items"]
    assert [j["id"] for j in pending] == ids[2::-1]  # job-3 turned out to have ended
    problem(api.http.get("/jobs", params={"status": "late"}), 422)
    problem(api.http.get("/jobs", params={"cursor": "nobody"}), 422)


def test_a_look_at_running_jobs_does_not_wait_for_the_catalogs_writers(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(api, "job-1")["id"]
    api.jobs.say(job, "RUNNING")
    assert api.http.get("/jobs").json()["items"][0]["status"] == "running"
    monkeypatch.setattr(Catalog, "start_job", None)  # it is written once
    for path in ("/jobs", f"/jobs/{job}"):
        assert api.http.get(path).status_code == 200


def test_stopping(api: Api) -> None:
    job = submit(api, "job-1")["id"]
    api.jobs.say(job, "RUNNING")
    response = api.http.post("/jobs/job-1/stop")
    assert (response.status_code, response.json()["status"]) == (202, "running")
    assert api.jobs.stopped == [job]
    api.jobs.say(job, "STOPPED")
    assert api.http.get("/jobs/job-1").json()["status"] == "stopped"
    assert api.http.post("/jobs/job-1/stop").json()["status"] == "stopped"
    assert api.jobs.stopped == [job]
    api.catalog.add_job("elsewhere", name="tone", recipe=TrainSpec.parse(RECIPE, source="example"))
    stopped = api.http.post("/jobs/elsewhere/stop").json()
    assert (stopped["status"], "does not know the job" in stopped["message"]) == ("stopped", True)
    problem(api.http.post("/jobs/none/stop"), 404)


def test_logs(api: Api) -> None:
    job = submit(api, "job-1")["id"]
    whole = api.http.get("/jobs/job-1/logs")
    assert (whole.text, whole.headers["content-type"]) == (f"log of {job}\n", "text/plain; charset=utf-8")
    followed = api.http.get("/jobs/job-1/logs", params={"follow": True})
    assert (followed.text, followed.headers["content-type"]) == ("a\nb\nc\n", "text/plain; charset=utf-8")
    api.catalog.end_job(job, "succeeded", version=1)
    api.jobs.jobs.clear()
    for follow in (False, True):
        gone = problem(api.http.get("/jobs/job-1/logs", params={"follow": follow}), 410)
        assert "(succeeded) is gone: Ray keeps logs only while the cluster" in gone["detail"]
        problem(api.http.get("/jobs/none/logs", params={"follow": follow}), 404)


def test_without_ray(api: Api) -> None:
    job = submit(api, "job-1")["id"]
    api.jobs.down = True
    assert api.http.get("/jobs/job-1").json()["status"] == "pending"  # as far as is known
    assert [j["id"] for j in api.http.get("/jobs").json()["items"]] == [job]
    for response in (
        api.http.get("/jobs/job-1/logs"),
        api.http.post("/jobs/job-1/stop"),
        api.http.post("/jobs", params={"id": "job-2"}, json=RECIPE),
        api.http.post("/jobs", json=RECIPE),
    ):
        assert problem(response, 503)["type"] == "urn:loray:problem:cluster-unavailable"
    problem(api.http.get("/jobs/job-2"), 404)  # nobody knows whether Ray has a job of that id
    refused, first = api.http.get("/jobs").json()["items"]
    assert (refused["status"], "not submitted" in refused["message"]) == ("failed", True)
    assert first["id"] == job


def test_a_job_that_is_stopped_while_its_submission_waits(api: Api) -> None:
    def stop(job_id: str) -> None:
        api.http.post(f"/jobs/{job_id}/stop").raise_for_status()

    api.jobs.while_waiting = stop
    problem(api.http.post("/jobs", params={"id": "late"}, json=RECIPE), 409)
    assert (api.http.get("/jobs/late").json()["status"], api.jobs.submitted) == ("stopped", {})


def test_a_submission_may_wait_as_long_as_it_does(api: Api) -> None:
    late = submit(api, "late")["id"]
    engine = api.catalog._engine
    with writing(engine) as c:
        created = c.execute(sa.select(jobs.c.created_at)).scalar_one() - timedelta(seconds=AGENT_S)
        c.execute(jobs.update().values(created_at=created))
    api.jobs.jobs.clear()
    assert api.http.get(f"/jobs/{late}").json()["status"] == "pending"


def test_jobs_that_are_lost(api: Api) -> None:
    """Those that Ray does not know. One of another cluster that is there may run, or one that was started by hand."""
    for name, job in (("ours", "ours"), ("gone", "theirs"), ("there", "other"), ("ours", "fresh")):
        api.jobs.name = name
        submit(api, job)
    api.jobs.name = "ours"
    api.catalog.add_job("by-hand", name="tone", recipe=TrainSpec.parse(RECIPE, source="example"))
    api.catalog.start_job("by-hand")
    engine = api.catalog._engine
    ids = {job.id.partition(".")[0]: job.id for job in api.catalog.jobs().jobs}
    with writing(engine) as c:
        c.execute(jobs.update().where(jobs.c.id == "by-hand").values(actor="local"))
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        c.execute(jobs.update().where(jobs.c.id != ids["fresh"]).values(created_at=hour_ago))
        c.execute(clusters.insert(), [{"id": "gone", "seen_at": hour_ago}, {"id": "there", "seen_at": hour_ago}])
    api.catalog.note_cluster("there")
    api.jobs.jobs.clear()
    api.services.watch_jobs()
    found = {job.id.partition(".")[0]: job.status for job in api.catalog.jobs().jobs}
    other = "failed" if engine.dialect.name == "sqlite" else "pending"  # of a catalog on this machine's disk
    assert found == {"ours": "failed", "theirs": "failed", "other": other, "fresh": "pending", "by-hand": "running"}


def test_jobs_are_watched_past_errors(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [ClusterError("Ray is away"), ZeroDivisionError()]
    compared = Event()

    def watch() -> None:
        if errors:
            raise errors.pop()
        compared.set()

    monkeypatch.setattr(site, "WATCH_S", 0.001)
    monkeypatch.setattr(api.services, "watch_jobs", watch)

    async def run() -> None:
        async with api.unmounted.router.lifespan_context(api.unmounted):
            assert await asyncio.to_thread(compared.wait, 30)

    asyncio.run(run())
