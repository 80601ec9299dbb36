"""What tenants may ask of the cluster: data of their own without options, and so many jobs and workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.submission.tracker import id_of
from loray.errors import PermissionDenied, RateLimited
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, Limits, Principal
from serve_apps.api.examples import RECIPE
from serve_apps.api.services import Services
from serve_apps.api.site import create_app
from tests.fixtures.api import JSON, Api, InProcess, mounted, problem
from tests.fixtures.keys import Given

DATA = "s3://training/sets?endpoint_url=http://127.0.0.1:9&credentials_file=/keys"
MINE = "s3://training/sets/acme/tone.jsonl"


def principal(**fields: Any) -> Principal:
    given: dict[str, Any] = {"tenant": "acme", "scopes": {"train"}, "key_id": "k1", "actor": "key:k1"}
    return Principal(**given | fields)


class Tenants(Api):
    """The API of a deployment with LORAY_DATA, asked by whom the test says."""

    def __init__(self, home: Path, catalog_url: str) -> None:
        super().__init__(home, catalog_url)
        self.settings = replace(self.settings, data=DATA)
        self.services.close()
        self.services = Services(self.settings, self.jobs, self.placements)

    def by(self, who: Principal) -> httpx.Client:
        app = mounted(create_app(self.services, Given(who)))
        return httpx.Client(transport=InProcess(app), base_url="http://test/api/v1")


@pytest.fixture
def api(tmp_path: Path, catalog_url: str) -> Iterator[Tenants]:
    api = Tenants(tmp_path / "home", catalog_url)
    if "acme" not in {tenant.name for tenant in api.catalog.tenants()}:
        api.catalog.create_tenant("acme")
    yield api
    api.close()


def recipe(train: str = MINE, **fields: Any) -> dict[str, Any]:
    return RECIPE | {"data": {"train": train}} | fields


@pytest.mark.parametrize(
    "train",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "gs://training/sets/acme/tone.jsonl",
        "hdfs://training/sets/acme/tone.jsonl",
        f"{MINE}?endpoint_url=http://attacker",
        f"{MINE}?credentials_file=/root/.aws/credentials",
        "s3://training/sets/other/tone.jsonl",
        "s3://training/sets/acme",
        "s3://training/sets/acme/",
        "s3://training/sets/acme/../other/tone.jsonl",
        "s3://training/sets/acme//tone.jsonl",
        "s3://training/sets/acme/%2e%2e/other/tone.jsonl",
        "s3://training/sets/acme/tone.jsonl#x",
        "s3://training/sets/acme/a\\b",
        "s3://key:secret@training/sets/acme/tone.jsonl",
        "s3://training/sets/acme2/tone.jsonl",
        "s3://adapters/blobs/sha256",
        "S3://training/sets/acme/tone.jsonl",
    ],
)
def test_other_data_than_the_tenants_own_is_refused(api: Tenants, train: str) -> None:
    mixed = [
        {"train": [MINE, train]},
        {"train": MINE, "eval": [MINE, train]},
        {"train": [{"path": train, "weight": 2}]},
    ]
    with api.by(principal()) as http:
        for data in ({"train": train}, {"train": MINE, "eval": train}, *mixed):
            detail = problem(http.post("/jobs", json=RECIPE | {"data": data}), 403)["detail"]
            assert "must be an s3:// URL without options below s3://training/sets/acme/" in detail
    assert not api.jobs.submitted


def test_no_recipe_has_the_deployments_options(api: Tenants) -> None:
    """The driver adds them when it opens the data: tests/jobs/driver/test_data.py."""
    with api.by(principal()) as http:
        response = http.post("/jobs", json=recipe())
    assert response.status_code == 201, response.text
    job = response.json()
    assert job["recipe"]["data"]["train"] == MINE
    submission = api.jobs.submitted[job["id"]]
    assert json.loads(api.jobs.uploaded[job["id"]]["recipe.json"])["data"]["train"] == MINE
    assert submission.runtime_env["env_vars"]["LORAY_DATA"] == DATA


def test_an_id_that_another_tenant_has_chosen_is_free(api: Tenants) -> None:
    api.catalog.create_tenant("beta")
    asked = {tenant: principal(tenant=tenant, key_id=tenant, actor=tenant) for tenant in ("acme", "beta")}
    jobs: dict[str, Any] = {}
    for tenant, who in asked.items():
        train = MINE.replace("acme", tenant)
        with api.by(who) as http:
            answer = http.post("/jobs", params={"id": "nightly"}, json=recipe(train))
            assert answer.status_code == 201, answer.text
            jobs[tenant] = answer.json()
            assert http.get("/jobs/nightly").json() == jobs[tenant]
            taken = http.post("/jobs", params={"id": "nightly"}, json=recipe(train))
            assert "there is a job 'nightly' already" in problem(taken, 409)["detail"]
    with api.by(asked["beta"]) as http:
        own, none = jobs["acme"]["id"], "nightly." + "0" * 16
        for method, path in (("GET", ""), ("GET", "/logs"), ("POST", "/stop")):
            told = [http.request(method, f"/jobs/{job}{path}", headers=JSON).text for job in (own, none)]
            assert told[0].replace(own, none) == told[1]
        assert http.post("/jobs", params={"id": own}, json=recipe(MINE.replace("acme", "beta"))).status_code == 201
    assert not api.jobs.stopped


def test_without_a_place_for_data_tenants_train_nothing(api: Tenants) -> None:
    api.services = Services(replace(api.settings, data=None), api.jobs, api.placements)
    with api.by(principal()) as http:
        assert "LORAY_DATA" in problem(http.post("/jobs", json=recipe()), 403)["detail"]
    api.services.close()


def test_administrators_name_any_data(api: Tenants) -> None:
    with api.by(principal(tenant=DEFAULT_TENANT, scopes={"admin"})) as http:
        assert http.post("/jobs", json=recipe("/data/x.jsonl")).status_code == 201


def test_so_many_jobs_and_workers_at_once(api: Tenants) -> None:
    limited = principal(limits=Limits(max_workers=3), tenant_limits=Limits(max_jobs=2, max_workers=4))
    with api.by(limited) as http:
        assert "at most 3" in problem(http.post("/jobs", json=recipe(num_workers=4)), 403)["detail"]
        assert http.post("/jobs", params={"id": "a"}, json=recipe(num_workers=2)).status_code == 201
        refused = http.post("/jobs", json=recipe(num_workers=2))
        assert "asks for 2 workers; tenant acme has jobs with 2, and at most 3" in problem(refused, 429)["detail"]
        assert int(refused.headers["retry-after"]) > 0
        assert http.post("/jobs", params={"id": "b"}, json=recipe(num_workers=1)).status_code == 201
        api.jobs.say(id_of("acme", "a"), "RUNNING")
        assert "2 jobs that have not ended" in problem(http.post("/jobs", json=recipe()), 429)["detail"]
        api.jobs.say(id_of("acme", "a"), "FAILED")  # which nobody has told the catalog
        assert http.post("/jobs", json=recipe()).status_code == 201
    assert api.by(principal(tenant=DEFAULT_TENANT)).post("/jobs", json=recipe()).status_code == 403  # its data


def test_a_tenant_has_four_jobs_at_once_unless_it_is_said_otherwise(api: Tenants) -> None:
    with api.by(principal()) as http:
        assert [http.post("/jobs", json=recipe()).status_code for _ in range(5)] == [201] * 4 + [429]
        problem(http.post("/jobs", json=recipe(num_workers=17)), 403)
    with api.by(principal(tenant=DEFAULT_TENANT, scopes={"admin"})) as http:
        assert [http.post("/jobs", json=recipe()).status_code for _ in range(5)] == [201] * 5


@pytest.mark.parametrize(("field", "said"), [("licence", "the recipe has"), ("description", "publish.description has")])
def test_a_recipe_that_could_not_be_published_is_refused_before_it_is_trained(
    api: Tenants, field: str, said: str
) -> None:
    text = "x" * (225 << 10 if field == "licence" else 4097)
    with api.by(principal()) as http:
        assert said in problem(http.post("/jobs", json=recipe() | {"publish": {field: text}}), 422)["detail"]


def test_the_deployments_limits_bind_tenants_without_limits(api: Tenants) -> None:
    api.services = Services(replace(api.settings, max_jobs=1), api.jobs, api.placements)
    with api.by(principal()) as http:
        assert http.post("/jobs", json=recipe()).status_code == 201
        problem(http.post("/jobs", json=recipe()), 429)
    api.services.close()


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
