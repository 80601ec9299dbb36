"""Jobs over HTTP, with a scripted job server: what tenants may ask of the cluster, and recommendations."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import yaml

from jobs.submission.server import AGENT_S
from jobs.submission.tracker import id_of
from loray.bases.registry import add_base
from loray.catalog.database import writing
from loray.catalog.schema import clusters, jobs
from loray.errors import ClusterError, PermissionDenied, RateLimited
from loray.methods import METHODS
from loray.publishing.user_files import FileWriter
from loray.recipes.load import load_recipe
from loray.schemas.resources import RECIPE_EXAMPLE as RECIPE
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, Limits, Principal, TrainSpec
from serve_apps.api import site
from serve_apps.api.routes.jobs import RecommendationResource
from tests.fixtures.api import JSON, Api, problem, submit
from tests.fixtures.tiny import write_checkpoint

LAUGHS = b"a: &a [1]\n" + b"".join(  # each line is ten times the one before, and the last one a billion values
    b"%c: &%c [%s]\n" % (letter + 1, letter + 1, b", ".join([b"*%c" % letter] * 10)) for letter in range(97, 106)
)


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
    recipe = api.jobs.uploaded[job_id]["loray-input.json"]
    assert command[:4] == ["exec", "<", "loray-input.json", "&&"]
    assert TrainSpec.parse(json.loads(recipe), source="entrypoint") == load_recipe(json.dumps(RECIPE)).spec
    assert command[command.index("-m") + 1] == "jobs.train"
    assert "--resume" not in command
    env = api.jobs.submitted[job_id].runtime_env["env_vars"]
    assert env["LORAY_STORE"] == api.settings.store
    assert api.http.get(f"http://test{response.headers['location']}").json() == job


def test_yaml(api: Api) -> None:
    for number, media_type in enumerate(("application/yaml", "application/x-yaml", "text/yaml; charset=utf-8")):
        params, (mine,) = {"id": f"mine-{number}", "resume": True}, ray(f"mine-{number}")
        headers = {"Content-Type": media_type}
        response = api.http.post("/jobs", params=params, content=yaml.safe_dump(RECIPE), headers=headers)
        assert (response.status_code, response.json()["id"]) == (201, mine)
        assert response.headers["location"] == f"/api/v1/jobs/{mine}"
        assert api.http.get(f"/jobs/mine-{number}").json() == api.http.get(f"/jobs/{mine}").json() == response.json()
        assert "--resume" in api.jobs.submitted[mine].entrypoint


def test_what_a_recipe_leaves_out_has_its_methods_default(api: Api) -> None:
    little = {"name": "tone", "adapter": {"method": "vera"}, "data": {"train": "s3://bucket/tone.jsonl"}}
    response = api.http.post("/jobs", json=little)
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
    relative = api.http.post("/jobs", json=RECIPE | {"data": {"train": "x.jsonl"}})
    assert "relative path" in problem(relative, 422)["detail"]
    unknown = api.http.post("/jobs", content=b"x", headers={"Content-Type": "a/b"})
    assert "application/json or" in problem(unknown, 415)["detail"]
    infinite = yaml.safe_dump(RECIPE | {"adapter": {"method": "lora", "alpha": float("inf")}})
    body = problem(api.http.post("/jobs", content=infinite, headers={"Content-Type": "application/yaml"}), 422)
    assert [e["field"] for e in body["errors"]] == ["adapter.lora.alpha"]
    for wrong_id in ("a/b", "a" * 112):
        problem(api.http.post("/jobs", params={"id": wrong_id}, json=RECIPE), 422)
    assert api.jobs.submitted == {}
    assert api.http.get("/jobs").json()["items"] == []


def test_ids_and_names_that_are_taken(api: Api) -> None:
    mine = submit(api, "mine")["id"]
    api.jobs.say(*ray("forgotten"), "RUNNING")
    assert "already" in problem(api.http.post("/jobs", params={"id": "forgotten"}, json=RECIPE), 409)["detail"]
    problem(api.http.get("/jobs/forgotten"), 404)  # no row of the job that was not submitted
    for known in ("mine", mine):
        assert "already" in problem(api.http.post("/jobs", params={"id": known}, json=RECIPE), 409)["detail"]
    api.catalog.bases.add("smollm2", "ba5e" * 16)
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
    api.catalog.jobs.end(good, "succeeded", version=3)  # the driver, before Ray has seen it end
    ended = api.http.get("/jobs/good").json()
    assert (ended["status"], ended["version"]) == ("succeeded", 3)
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
    monkeypatch.setattr("loray.catalog.jobs.Jobs.start", None)  # it is written once
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
    api.catalog.jobs.add("elsewhere", name="tone", recipe=TrainSpec.parse(RECIPE, source="example"))
    stopped = api.http.post("/jobs/elsewhere/stop").json()
    assert (stopped["status"], "does not know the job" in stopped["message"]) == ("stopped", True)
    problem(api.http.post("/jobs/none/stop"), 404)


def test_logs(api: Api) -> None:
    job = submit(api, "job-1")["id"]
    whole = api.http.get("/jobs/job-1/logs")
    assert (whole.text, whole.headers["content-type"]) == (f"log of {job}\n", "text/plain; charset=utf-8")
    followed = api.http.get("/jobs/job-1/logs", params={"follow": True})
    assert (followed.text, followed.headers["content-type"]) == ("a\nb\nc\n", "text/plain; charset=utf-8")
    api.catalog.jobs.end(job, "succeeded", version=1)
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
    engine = api.catalog._db.engine
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
    api.catalog.jobs.add("by-hand", name="tone", recipe=TrainSpec.parse(RECIPE, source="example"))
    api.catalog.jobs.start("by-hand")
    engine = api.catalog._db.engine
    ids = {job.id.partition(".")[0]: job.id for job in api.catalog.jobs.page().items}
    with writing(engine) as c:
        c.execute(jobs.update().where(jobs.c.id == "by-hand").values(actor="local"))
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        c.execute(jobs.update().where(jobs.c.id != ids["fresh"]).values(created_at=hour_ago))
        c.execute(clusters.insert(), [{"id": "gone", "seen_at": hour_ago}, {"id": "there", "seen_at": hour_ago}])
    api.catalog.jobs.record_cluster("there")
    api.jobs.jobs.clear()
    api.services.watch_jobs()
    found = {job.id.partition(".")[0]: job.status for job in api.catalog.jobs.page().items}
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


DATA = "s3://training/sets?endpoint_url=http://127.0.0.1:9&credentials_file=/keys"
MINE = "s3://training/sets/acme/tone.jsonl"


def principal(**fields: Any) -> Principal:
    given: dict[str, Any] = {"tenant": "acme", "scopes": {"train"}, "key_id": "k1", "actor": "key:k1"}
    return Principal(**given | fields)


@pytest.fixture
def deployment(api: Api) -> Api:
    """A deployment with LORAY_DATA, in which acme is a tenant."""
    api.replace_services(data=DATA)
    if "acme" not in {tenant.name for tenant in api.catalog.tenants.all()}:
        api.catalog.tenants.create("acme")
    return api


def recipe(train: str = MINE, **fields: Any) -> dict[str, Any]:
    return RECIPE | {"data": {"train": train}} | fields


def test_other_data_than_the_tenants_own_is_refused(deployment: Api) -> None:
    sets = "s3://training/sets"
    with deployment.by(principal()) as http:
        for train in (
            *("file:///etc/passwd", "/etc/passwd"),
            *("gs://training/sets/acme/tone.jsonl", "hdfs://training/sets/acme/tone.jsonl"),
            *(f"{MINE}?endpoint_url=http://attacker", f"{MINE}?credentials_file=/root/.aws/credentials"),
            *(f"{sets}/other/tone.jsonl", f"{sets}/acme", f"{sets}/acme/", f"{sets}/acme2/tone.jsonl"),
            *(f"{sets}/acme/../other/tone.jsonl", f"{sets}/acme//tone.jsonl", f"{sets}/acme/%2e%2e/other/tone.jsonl"),
            *(f"{sets}/acme/tone.jsonl#x", f"{sets}/acme/a\\b", "s3://key:secret@training/sets/acme/tone.jsonl"),
            *("s3://adapters/blobs/sha256", "S3://training/sets/acme/tone.jsonl"),
        ):
            mixed = {"train": [MINE, train]}, {"train": MINE, "eval": [MINE, train]}
            weighed = {"train": [{"path": train, "weight": 2}]}
            for data in ({"train": train}, {"train": MINE, "eval": train}, *mixed, weighed):
                detail = problem(http.post("/jobs", json=RECIPE | {"data": data}), 403)["detail"]
                assert "must be an s3:// URL without options below s3://training/sets/acme/" in detail, data
    assert not deployment.jobs.submitted


def test_a_tenants_job_asks_no_other_server(deployment: Api) -> None:
    objective = {"type": "distill", "teacher": "big", "url": "http://169.254.169.254/v1"}
    with deployment.by(principal()) as http:
        detail = problem(http.post("/jobs", json=recipe(objective=objective)), 403)["detail"]
        assert "objective.url: a tenant's job asks no other server" in detail
        del objective["url"]
        assert http.post("/jobs", json=recipe(objective=objective)).status_code == 201


def test_a_server_imports_no_code_of_a_recipe(deployment: Api) -> None:
    own = [{"type": "rl", "reward": {"function": "os:system"}}, {"type": "grpo", "environment": "os:Environment"}]
    with deployment.by(principal()) as http:
        for objective in own:
            detail = problem(http.post("/jobs", json=recipe(objective=objective)), 422)["detail"]
            assert "is code of the recipe, which a server does not import" in detail
        assert not deployment.jobs.submitted
        objective = {"type": "rl", "reward": {"builtin": "number", "field": "answer"}}
        assert http.post("/jobs", json=recipe(objective=objective)).status_code == 201
    (submission,) = deployment.jobs.submitted.values()
    assert "-m jobs.rl.driver" in submission.entrypoint


def test_no_recipe_has_the_deployments_options(deployment: Api) -> None:
    """The driver adds them when it opens the data: tests/test_fetching.py."""
    with deployment.by(principal()) as http:
        response = http.post("/jobs", json=recipe())
    assert response.status_code == 201, response.text
    job = response.json()
    assert job["recipe"]["data"]["train"] == MINE
    submission = deployment.jobs.submitted[job["id"]]
    assert json.loads(deployment.jobs.uploaded[job["id"]]["loray-input.json"])["data"]["train"] == MINE
    assert submission.runtime_env["env_vars"]["LORAY_DATA"] == DATA


def test_an_id_that_another_tenant_has_chosen_is_free(deployment: Api) -> None:
    deployment.catalog.tenants.create("beta")
    asked = {tenant: principal(tenant=tenant, key_id=tenant, actor=tenant) for tenant in ("acme", "beta")}
    jobs: dict[str, Any] = {}
    for tenant, who in asked.items():
        train = MINE.replace("acme", tenant)
        with deployment.by(who) as http:
            answer = http.post("/jobs", params={"id": "nightly"}, json=recipe(train))
            assert answer.status_code == 201, answer.text
            jobs[tenant] = answer.json()
            assert http.get("/jobs/nightly").json() == jobs[tenant]
            taken = http.post("/jobs", params={"id": "nightly"}, json=recipe(train))
            assert "there is a job 'nightly' already" in problem(taken, 409)["detail"]
    with deployment.by(asked["beta"]) as http:
        own, none = jobs["acme"]["id"], "nightly." + "0" * 16
        for method, path in (("GET", ""), ("GET", "/logs"), ("POST", "/stop")):
            told = [http.request(method, f"/jobs/{job}{path}", headers=JSON).text for job in (own, none)]
            assert told[0].replace(own, none) == told[1]
        assert http.post("/jobs", params={"id": own}, json=recipe(MINE.replace("acme", "beta"))).status_code == 201
    assert not deployment.jobs.stopped


def test_tenants_train_from_their_own_files(deployment: Api) -> None:
    deployment.replace_services(data=None)
    acme = principal()
    with FileWriter(deployment.catalog.view(acme), deployment.services.store.objects) as writer:
        writer.write(b"{}")
        file = writer.finish("a.jsonl", "fine-tune")
    with deployment.by(acme) as http:
        assert http.post("/jobs", json=recipe(f"files://{file.id}")).status_code == 201
        assert "there is no file" in problem(http.post("/jobs", json=recipe("files://file-x")), 404)["detail"]
    with deployment.by(acme.model_copy(update={"tenant": "beta"})) as http:
        told = [http.post("/jobs", json=recipe(f"files://{one}")).text for one in (file.id, "file-x")]
        assert told[0].replace(file.id, "file-x") == told[1]


def test_without_a_place_for_data_tenants_train_nothing(deployment: Api) -> None:
    deployment.replace_services(data=None)
    with deployment.by(principal()) as http:
        assert "LORAY_DATA" in problem(http.post("/jobs", json=recipe()), 403)["detail"]


def test_so_many_jobs_and_workers_at_once(deployment: Api) -> None:
    limited = principal(limits=Limits(max_workers=3), tenant_limits=Limits(max_jobs=2, max_workers=4))
    with deployment.by(limited) as http:
        assert "at most 3" in problem(http.post("/jobs", json=recipe(num_workers=4)), 403)["detail"]
        assert http.post("/jobs", params={"id": "a"}, json=recipe(num_workers=2)).status_code == 201
        refused = http.post("/jobs", json=recipe(num_workers=2))
        assert "asks for 2 workers; tenant acme has jobs with 2, and at most 3" in problem(refused, 429)["detail"]
        assert int(refused.headers["retry-after"]) > 0
        assert http.post("/jobs", params={"id": "b"}, json=recipe(num_workers=1)).status_code == 201
        deployment.jobs.say(id_of("acme", "a"), "RUNNING")
        assert "2 jobs that have not ended" in problem(http.post("/jobs", json=recipe()), 429)["detail"]
        deployment.jobs.say(id_of("acme", "a"), "FAILED")  # which nobody has told the catalog
        assert http.post("/jobs", json=recipe()).status_code == 201
    assert deployment.by(principal(tenant=DEFAULT_TENANT)).post("/jobs", json=recipe()).status_code == 403  # its data


def test_a_tenant_has_four_jobs_at_once_unless_it_is_said_otherwise(deployment: Api) -> None:
    with deployment.by(principal()) as http:
        assert [http.post("/jobs", json=recipe()).status_code for _ in range(5)] == [201] * 4 + [429]
        problem(http.post("/jobs", json=recipe(num_workers=17)), 403)
    with deployment.by(principal(tenant=DEFAULT_TENANT, scopes={"admin"})) as http:  # who names any data
        assert http.post("/jobs", json=recipe("/data/x.jsonl")).status_code == 201
        assert [http.post("/jobs", json=recipe()).status_code for _ in range(5)] == [201] * 5


def test_a_recipe_that_could_not_be_published_is_refused_before_it_is_trained(deployment: Api) -> None:
    with deployment.by(principal()) as http:
        for field, text, said in (
            ("licence", "x" * (225 << 10), "the recipe has"),
            ("description", "x" * 4097, "publish.description has"),
        ):
            assert said in problem(http.post("/jobs", json=recipe() | {"publish": {field: text}}), 422)["detail"]


def test_the_deployments_limits_bind_tenants_without_limits(deployment: Api) -> None:
    deployment.replace_services(max_jobs=1)
    with deployment.by(principal()) as http:
        assert http.post("/jobs", json=recipe()).status_code == 201
        problem(http.post("/jobs", json=recipe()), 429)


def test_errors_come_back_as_they_were() -> None:
    from loray.schemas.resources import Problem, problem_type

    for kind in (RateLimited, PermissionDenied):
        told = Problem(type=problem_type(kind), title="", status=0, detail="why").exception()
        assert (type(told), str(told)) == (kind, "why")


@pytest.mark.parametrize("data", ["file:///x", "s3://store/a/b", "s3://store", "s3://x?secret=1"])
def test_where_data_may_not_lie(data: str) -> None:
    from loray.errors import SettingsError

    with pytest.raises(SettingsError, match="LORAY_DATA"):
        Settings.from_env({"LORAY_HOME": "/x", "LORAY_STORE": "s3://store/a", "LORAY_DATA": data})
    kept = Settings.from_env({"LORAY_HOME": "/x", "LORAY_STORE": "s3://store/a", "LORAY_DATA": "s3://store/ab"})
    assert Settings.from_env(kept.to_env()) == kept


def test_recommendations(api: Api, tmp_path: Path) -> None:
    personal = {"context_length": 2048, "num_tasks": 1000}

    def ask(params: Mapping[str, Any]) -> httpx.Response:
        return api.http.get("/recommend", params=params)

    found = RecommendationResource.model_validate(ask(personal).json())
    assert {quote.method for quote in found.quotes} >= {"lora", "dora", "vera"}
    assert {e.method for e in found.estimates} == set(METHODS)
    assert (found.base, found.device) == ("smollm2", "a100-80gb")
    add_base(str(write_checkpoint(tmp_path / "checkpoint")), home=api.settings.home, name="tiny")
    small = {"context_length": 64, "num_tasks": 1, "base": "tiny", "device": "h100-80gb"}
    assert RecommendationResource.model_validate(ask(small).json()).estimates[0].trained_parameters < 100_000
    assert "gpt-9" in problem(ask(personal | {"base": "gpt-9"}), 404)["detail"]
    problem(ask(personal | {"device": "abacus"}), 422)
    problem(ask({"num_tasks": 1}), 422)


def test_several_adapters_are_one_job_with_a_part_for_each(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {key: value for key, value in RECIPE.items() if key != "name"}
    entries = [{"name": "acme"}, {"name": "globex", "adapter.rank": 2}]
    job = api.http.post("/jobs", params={"id": "both"}, json=common | {"adapters": entries}).json()
    (whole,) = ray("both")
    assert (job["id"], job["name"], job["part_of"]) == (whole, "acme", None)
    plan = json.loads(api.jobs.uploaded[whole]["loray-input.json"])
    assert [member["recipe"]["name"] for member in plan["members"]] == ["acme", "globex"]
    assert plan["members"][1]["recipe"]["adapter"]["rank"] == 2
    assert "jobs.many.driver" in api.jobs.submitted[whole].entrypoint
    api.jobs.say(whole, "RUNNING")
    # What the driver does:
    catalog = api.services.catalog
    recipes = {f"{whole}.{n}": TrainSpec.model_validate(each["recipe"]) for n, each in enumerate(plan["members"], 1)}
    catalog.jobs.add_parts(whole, recipes)
    found = api.http.get("/jobs").json()["items"]
    assert {(each["name"], each["part_of"], each["status"]) for each in found} == {
        ("acme", None, "running"), ("acme", whole, "running"), ("globex", whole, "running"),
    }  # fmt: skip

    acme, globex = (json.dumps({"event": "step", "adapter": name}) + "\n" for name in ("acme", "globex"))
    monkeypatch.setattr(api.jobs, "logs", lambda job_id: iter((acme + globex[:9], globex[9:] + "a line\n")))
    assert api.http.get(f"/jobs/{whole}.2/logs").text == globex
    assert api.http.get(f"/jobs/{whole}.1/logs", params={"tail": 9}).text == acme

    stopped = api.http.post(f"/jobs/{whole}.1/stop").json()
    assert (stopped["status"], api.jobs.stopped) == ("stopped", [])  # the driver sees it
    assert api.http.get(f"/jobs/{whole}.2").json()["status"] == "running"
    assert api.http.post(f"/jobs/{whole}/stop").status_code == 202
    assert api.jobs.stopped == [whole]
    api.jobs.say(whole, "STOPPED")
    assert api.http.get(f"/jobs/{whole}.2").json()["status"] == "stopped"  # also where the driver was killed


def test_wrong_adapters_are_named(api: Api) -> None:
    for entries, detail in (
        ([], "a list of adapters"),
        ([{"name": "acme"}, {"name": "acme"}], "several adapters are called acme"),
        ([{"name": "acme", "adapter.rank": 0}], "adapter acme"),
    ):
        response = api.http.post("/jobs", json=RECIPE | {"adapters": entries})
        assert detail in problem(response, 422)["detail"]
