"""Pages of training jobs: the form of a recipe with its estimate, and a job whose losses outlive Ray's log."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from loray.recipes.load import load_recipe
from loray.spec import Limits, TrainSpec
from tests.serve_apps.console.site import URL, ConsoleSite, lines

FORM: dict[str, object] = {
    "name": "new",
    "data.train": "s3://b/d.jsonl",
    "adapter.method": "vera",
    "adapter.rank": "64",
    "optimizer.learning_rate": "",
    "rest": "batch: {rows: 2}\nmax_steps: 7",
}


def recipe() -> TrainSpec:
    spec = load_recipe("lora_smollm2").spec
    return spec.model_copy(update={"data": spec.data.model_copy(update={"train": "s3://b/d.jsonl", "eval": None})})


def test_the_form_has_fields_with_reasons_and_defaults(console: ConsoleSite) -> None:
    page = console.get("/jobs/new").text
    for shown in ('name="optimizer.learning_rate" placeholder="0.001"', "what requests call it", "<option>longlora<"):
        assert shown in page, shown
    assert re.search(r'name="data.train" placeholder="" required', page)
    assert re.search(r'hx-post="[^"]*/jobs/plan"[^>]* hx-swap="innerHTML"', page)  # the form around it swaps nothing
    assert "/jobs/new" in console.get("/jobs").text


def test_before_anything_is_typed_there_is_a_hint_and_no_error(console: ConsoleSite) -> None:
    part = console.post("/jobs/plan", {"adapter.method": "lora", "name": "", "data.train": "", "rest": ""}).text
    assert "once the recipe has a name and data" in part
    part = console.post("/jobs/plan", {"adapter.method": "lora", "name": "tone"}).text
    assert "the recipe is not valid" in part
    assert "data: Field required" in part
    assert "Spec" not in part


def test_a_form_has_an_estimate(console: ConsoleSite) -> None:
    part = console.post("/jobs/plan", FORM)
    assert part.status_code == 200
    for shown in ("Memory of a worker", "this-machine", "Trained parameters", "not known"):
        assert shown in part.text, shown
    assert "<main" not in part.text
    huge = console.post("/jobs/plan", FORM | {"base": "Llama-2-70b-hf", "rest": "use_gpu: true"}).text
    assert "a100-80gb, which is assumed" in huge
    assert "alert-danger" in huge


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": ""}, "name"),
        ({"adapter.rank": "many"}, "adapter"),
        ({"rest": "batch: ["}, "not valid YAML"),
        ({"rest": "- 1"}, "a YAML mapping"),
        ({"rest": "a: &x {b: 1}\nc: *x"}, "the alias *x"),
        ({"rest": "learning_rate: 1"}, "learning_rate"),
        ({"rest": "init_adapter: nothing@1"}, "nothing"),
        ({"base": "unknown"}, "not on this machine"),
        ({"base": "[2026-13-45]"}, "not valid YAML"),
        ({"rest": "rope_scaling: {factor: 1e+308}"}, "rope_scaling.factor"),
        ({"num_workers": "1000000"}, "at most 1024 workers"),
        ({"num_workers": "64", "rest": "parallel: {sequence: 64}"}, "groups of at most 32"),
    ],
)
def test_a_form_that_cannot_be_planned_says_why(console: ConsoleSite, fields: dict[str, object], said: str) -> None:
    part = console.post("/jobs/plan", FORM | fields)
    assert (part.status_code, said in part.text) == (200, True), part.text


def test_an_estimate_is_of_no_more_workers_than_a_tenant_may_have(console: ConsoleSite) -> None:
    console.catalog.tenants.update("acme", limits=Limits(max_workers=2))
    console.log_in(console.key("train", tenant="acme"))
    assert "Memory of a worker" in console.post("/jobs/plan", FORM | {"num_workers": "2"}).text
    assert "at most 2 are allowed" in console.post("/jobs/plan", FORM | {"num_workers": "3"}).text


def test_a_form_becomes_a_job(console: ConsoleSite) -> None:
    wrong = console.post("/jobs", FORM | {"adapter.rank": "0"})
    assert (wrong.status_code, "adapter" in wrong.text, "<main" in wrong.text) == (422, True, False)
    answer = console.post("/jobs", FORM)
    (job,) = console.catalog.jobs.page().items
    assert answer.headers["hx-redirect"].endswith(f"/console/jobs/{job.id}")
    assert list(console.jobs.submitted) == [job.id]
    got = job.recipe
    assert (got.name, got.adapter.method, got.adapter.rank, got.batch.rows, got.max_steps) == ("new", "vera", 64, 2, 7)
    assert got.optimizer.learning_rate == 1e-2  # VeRA's default
    console.log_in(console.key("train"))
    assert console.post("/jobs", FORM | {"name": "other", "publish.aliases": "prod"}).status_code == 403


def test_jobs(console: ConsoleSite) -> None:
    assert "No job was submitted yet" in console.get("/jobs").text
    job = console.services.jobs_of(console.services.catalog.principal).submit(recipe(), None, resume=False)
    assert job.id in console.get("/jobs", status="pending").text
    page = console.get(f"/jobs/{job.id}").text
    assert "s3://b/d.jsonl" in page
    assert "method: lora" in page
    assert console.post(f"/jobs/{job.id}/stop").status_code == 204
    assert console.jobs.stopped == [job.id]
    assert console.get("/jobs/nothing").status_code == 404


def test_a_jobs_losses_outlive_rays_log(console: ConsoleSite) -> None:
    job = console.services.jobs_of(console.services.catalog.principal).submit(recipe(), None, resume=False)
    page = console.get(f"/jobs/{job.id}").text
    assert f'data-live="/api/v1/console/jobs/{job.id}/live"' in page
    assert f"log of {job.id}" in page
    assert "data-curve" not in page
    events: list[dict[str, object]] = [{"event": "eval", "step": 0, "eval_loss": 4.0, "subject": "base"}]
    events += [{"event": "step", "step": step, "loss": 1.0 / step} for step in (1, 2)]
    events += [{"event": "eval", "step": 2, "eval_loss": 0.25, "subject": "adapter"}]
    console.write("runs", job, {"events.jsonl": lines(events)})
    live = console.get(f"/jobs/{job.id}/live").text.replace("&#34;", '"')
    assert "[[0, 1, 2], [null, 1.0, 0.5], [null, null, 0.25], [4.0, null, 4.0]]" in live
    assert '["step", "training", "held out, adapter", "held out, base"]' in live
    assert "held-out loss 0.2500" in live
    console.jobs.say(job.id, "SUCCEEDED")
    assert "data-ended" in console.get(f"/jobs/{job.id}/live").text
    console.jobs.jobs.clear()  # another cluster, which does not know the job
    page = console.get(f"/jobs/{job.id}").text
    assert "data-live" not in page
    assert "[null, null, 0.25]" in page


def test_a_jobs_figures(console: ConsoleSite) -> None:
    console.train_some()
    live = console.get("/jobs/train_1/live").text.replace("&#34;", '"')
    for shown in ("of 20", "5.00e-05", ">520<", "MFU 25.0 %", "1.0 GiB", "Time left"):
        assert shown in live, shown
    assert '["step", "learning rate"]' in live
    assert '["step", "tokens/s"]' in live
    assert '<th scope="row">20</th><td>1.1000</td><td>1.1500</td><td>5.0000</td>' in live  # training, adapter, base
    console.jobs.say("train_1", "SUCCEEDED")
    assert "Time left" not in console.get("/jobs/train_1").text


def test_runs_are_compared(console: ConsoleSite) -> None:
    console.train_some()
    assert 'name="job" value="train_2"' in console.get("/jobs").text
    page = console.http.get(f"{URL}/jobs/compare?job=train_1&job=train_2").text.replace("&#34;", '"')
    assert '["step", "train_1", "train_2"]' in page
    assert "<td>1.1000</td><td>1.1500</td>" in page  # the last of training, the lowest of held-out rows
    assert "<td>0.6000</td><td>0.6500</td>" in page
    assert re.search(r"<code>adapter\.rank</code></th><td>\d+</td><td>4</td>", page)
    assert "adapter.method" not in page  # which is the same
    for query, said in (("", "choose up to 4"), ("?job=train_1&job=nothing", "nothing")):
        answer = console.http.get(f"{URL}/jobs/compare{query}")
        assert (answer.status_code in (404, 422), said in answer.text) == (True, True), query


def test_a_sweeps_trials(console: ConsoleSite) -> None:
    console.train_some()
    page = console.get("/jobs/sweep_1").text.replace("&#34;", '"')
    assert 'rank=8 <span class="badge bg-green-lt">best</span></td><td>completed</td><td>9 of 9</td><td>2.2500' in page
    assert '["step", "1: rank=8", "0: rank=4", "2: rank=16"]' in page
    assert page.count("<td>running</td>") == 2
    assert "Trials of the sweep" not in console.get("/jobs/train_1").text


def test_what_goes_on_and_what_was_answered(console: ConsoleSite) -> None:
    job = console.services.jobs_of(console.services.catalog.principal).submit(recipe(), None, resume=False)
    stage: dict[str, object] = {
        "event": "progress",
        "stage": "measuring adapter",
        "done": 0.25,
        "total": 1,
        "eta_s": 90,
    }
    events = [{"event": "step", "step": 1, "loss": 1.0, "eta_s": 7200}, stage]
    console.write("runs", job, {"events.jsonl": lines(events)})
    live = console.get(f"/jobs/{job.id}/live").text
    assert "Now: measuring adapter: 25%" in live
    assert '<progress value="0.25" max="1" aria-label="measuring adapter: 25%">' in live
    assert ">2 min<" in live
    assert ">2 h<" not in live
    assert "Answers to held-out prompts" not in live
    sample = {"prompt": "<b>2 + 2</b>", "expected": "4", "base": "22", "adapter": "4"}
    events = [*events, {"event": "samples", "samples": [sample]}]
    job = console.services.jobs_of(console.services.catalog.principal).submit(recipe(), None, resume=False)
    console.write("runs", job, {"events.jsonl": lines(events)})
    live = console.get(f"/jobs/{job.id}/live").text
    assert "Answers to held-out prompts" in live
    assert "&lt;b&gt;2 + 2&lt;/b&gt;" in live
    assert '<div class="said">22</div>' in live
    console.jobs.say(job.id, "SUCCEEDED")
    assert "Now:" not in console.get(f"/jobs/{job.id}").text


def test_rewards_and_the_version_that_is_sampled_with(console: ConsoleSite, monkeypatch: pytest.MonkeyPatch) -> None:
    job = console.services.jobs_of(console.services.catalog.principal).submit(recipe(), None, resume=False)
    digest = "d" * 64
    samples = [{"prompt": "<b>47 or 83?</b>", "answer": "83", "reward": "1", "version": f"2 ({digest[:12]})"}]
    events: list[dict[str, object]] = [
        {"event": "eval", "step": 0, "subject": "base", "eval_loss": None, "reward": 0.25},
        {
            "event": "rollout",
            "step": 2,
            "num_steps": 4,
            "version": 2,
            "digest": digest,
            "metrics": {"reward_mean": 0.5, "mismatch_mean": 0.0125},
            "samples": samples,
        },
    ]
    console.write("runs", job, {"events.jsonl": lines(events)})
    page = console.get(f"/jobs/{job.id}").text.replace("&#34;", '"')
    assert '["step", "sampled answers", "held out, greedy"]' in page
    assert "<td>0.5</td><td>–</td><td>0.0125</td>" in page
    assert "Answers of step 2" in page
    assert "&lt;b&gt;47 or 83?&lt;/b&gt;" in page
    assert f"/jobs/{job.id}/publish?digest={digest}" in page
    asked: list[str] = []

    def published(job: Any, digest: str, settings: Any, catalog: Any) -> Any:
        asked.append(digest)
        return SimpleNamespace(name=job.name, version=3)

    monkeypatch.setattr("serve_apps.console.jobs.publish_rollout", published)
    answer = console.post(f"/jobs/{job.id}/publish?digest={digest}")
    assert answer.headers["hx-redirect"].endswith("/versions/3")
    other = console.post(f"/jobs/{job.id}/publish?digest={'e' * 64}")
    assert (other.status_code, asked) == (409, [digest])
