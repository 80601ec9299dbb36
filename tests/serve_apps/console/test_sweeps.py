"""A search below a recipe's fields: its estimate, and the sweep that it becomes."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from jobs.sweeps.spec import SweepPlan, SweepSpec
from loray.spec import Limits
from tests.serve_apps.console.markup import parse
from tests.serve_apps.console.site import ConsoleSite
from tests.serve_apps.console.test_jobs import FORM

SEARCH: dict[str, object] = FORM | {
    "search.grid": "adapter.rank=64, 256\n\n optimizer.learning_rate=1e-3,3e-3\n",
    "search.draw_seed": "",
    "search.stops_early": "true",
}


def test_the_form_has_a_field_for_each_of_a_sweeps(console: ConsoleSite) -> None:
    fields = {
        e.attributes["name"]: e
        for e in parse(console.get("/jobs/new").text).all("input", "textarea", "select")
        if e.attributes.get("name", "").startswith("search.")
    }
    assert list(fields) == [f"search.{name}" for name in SweepSpec.model_fields]
    assert [e.tag for e in fields.values()] == ["textarea", "textarea", "input", "input", "input", "select"]


def test_a_search_has_an_estimate_of_each_kind_of_trial(console: ConsoleSite) -> None:
    part = console.post("/jobs/plan", SEARCH)
    assert part.status_code == 200
    for shown in (
        "4, as many as there is place for at once; the worse ones are stopped early",
        '<th scope="row">rank=64 learning_rate=1e-3</th><td>2</td>',
        '<th scope="row">rank=256 learning_rate=1e-3</th><td>2</td>',
        "<h3>rank=256 learning_rate=1e-3</h3>",
        "Memory of a worker",
    ):
        assert shown in part.text, shown
    assert "<main" not in part.text
    few = console.post("/jobs/plan", SEARCH | {"search.max_concurrent": "2", "search.stops_early": "false"}).text
    assert "at most 2 at once; each to its end" in few
    drawn = {"search.grid": "", "search.ranges": "adapter.rank=randint(1,100)", "search.num_draws": "90"}
    assert "other kinds with fewer tokens or parameters" in console.post("/jobs/plan", SEARCH | drawn).text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"search.grid": "adapter.rank"}, "write it as adapter.rank=8,16"),
        ({"search.grid": "adapter.rank=0,1"}, "trial rank=0"),
        ({"search.grid": "data.train=a,b"}, "cannot vary"),
        ({"search.grid": "", "search.num_draws": "3"}, "nothing varies"),
        ({"search.num_draws": "3"}, "nothing to draw from"),
        ({"search.grid": "", "search.max_concurrent": "3"}, "nothing varies"),
        ({"search.num_draws": "many"}, "num_draws"),
        ({"search.max_concurrent": "0"}, "max_concurrent"),
        ({"search.ranges": "seed=randint(0,1000000)", "search.num_draws": "100"}, "400 trials, and 200 are the most"),
        ({"rest": "data: {eval_fraction: 0}"}, "held-out loss"),
        ({"base": "unknown"}, "not on this machine"),
    ],
)
def test_a_search_that_cannot_be_planned_says_why(console: ConsoleSite, fields: dict[str, object], said: str) -> None:
    part = console.post("/jobs/plan", SEARCH | fields)
    assert (part.status_code, said in part.text) == (200, True), part.text


def test_a_search_becomes_a_sweep_of_one_job(console: ConsoleSite) -> None:
    wrong = console.post("/jobs", SEARCH | {"search.grid": "adapter.rank=0,1"})
    assert (wrong.status_code, "trial rank=0" in wrong.text) == (422, True)
    assert not console.catalog.jobs().jobs
    answer = console.post("/jobs", SEARCH | {"search.max_concurrent": "3", "search.stops_early": "false"})
    (job,) = console.catalog.jobs().jobs
    assert answer.headers["hx-redirect"].endswith(f"/console/jobs/{job.id}")
    assert (job.id.startswith("sweep_"), job.name, job.recipe.adapter.rank) == (True, "new", 64)
    command = shlex.split(console.jobs.submitted[job.id].entrypoint.removeprefix("exec "))
    assert command == [sys.executable, "-P", "-m", "jobs.sweeps.driver", "plan.json", "--events"]
    plan = SweepPlan.parse(json.loads(console.jobs.uploaded[job.id]["plan.json"]), source="the plan")
    assert (plan.name, plan.folder, plan.max_concurrent, plan.stops_early) == ("new", "/", 3, False)
    made = [(trial.recipe.adapter.rank, trial.recipe.optimizer.learning_rate) for trial in plan.trials]
    assert made == [(64, 1e-3), (64, 3e-3), (256, 1e-3), (256, 3e-3)]
    assert all((trial.recipe.batch.rows, trial.recipe.max_steps) == (2, 7) for trial in plan.trials)
    console.log_in(console.key("train"))
    assert console.post("/jobs", SEARCH | {"name": "other", "publish.aliases": "prod"}).status_code == 403


def test_a_tenants_sweep_stays_within_its_workers(console: ConsoleSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.submission.tracker._check_source", lambda *_: None)
    console.catalog.update_tenant("acme", limits=Limits(max_workers=2))
    console.log_in(console.key("train", tenant="acme"))
    mixed = console.post("/jobs", SEARCH | {"search.grid": "num_workers=1,2"})
    assert (mixed.status_code, "num_workers cannot vary" in mixed.text) == (403, True)
    assert console.post("/jobs", SEARCH | {"num_workers": "3"}).status_code == 403
    assert console.post("/jobs", SEARCH | {"num_workers": "2"}).status_code == 204
    (job_id,) = console.jobs.submitted
    assert json.loads(console.jobs.uploaded[job_id]["plan.json"])["max_concurrent"] == 1
    assert console.jobs.submitted[job_id].entrypoint.endswith("--tenant acme")
    more = console.post("/jobs", SEARCH | {"num_workers": "1", "name": "more"})
    assert (more.status_code, "at most 2" in more.text) == (429, True)
