"""Fine-tuning over HTTP: OpenAI's client unmodified, from files to a recipe, and from events to progress."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from jobs.runs.history import PUBLISHED
from loray.bases.registry import BaseModel
from loray.catalog import Catalog, Job
from loray.publishing.user_files import FileWriter
from loray.schemas.openai.fine_tuning import RECIPE
from loray.settings import Settings
from loray.spec import Limits, Principal, RlSpec, TrainSpec
from serve_apps.auth import Authenticator
from serve_apps.gateway.fine_tuning.jobs import FineTuning
from tests.cli.documented import blocks
from tests.conftest import REPOSITORY
from tests.fixtures.api import FakeJobs
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import HELLO, ScriptedEngines, error_of, file_storage, gateway_app, openai_of
from tests.fixtures.keys import access_of
from tests.fixtures.versions import digest, manifest

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
PAIR = {
    "input": {"messages": [{"role": "user", "content": "hi"}]},
    "preferred_output": [{"role": "assistant", "content": "ho"}],
    "non_preferred_output": [{"role": "assistant", "content": "no"}],
}
QUESTION = {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}
SAME = {"type": "string_check", "name": "same", "operation": "eq"}
SAME |= {"input": "{{ sample.output_text }}", "reference": "{{item.answer}}"}
ALIKE = {k: v for k, v in SAME.items() if k != "operation"}
ALIKE |= {"type": "text_similarity", "evaluation_metric": "rouge_l"}


def rows(*records: Mapping[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@dataclass
class Site:
    """A gateway with fine-tuning, beside a scripted job server. `home` has the folders of runs."""

    app: FastAPI
    catalog: Catalog
    jobs: FakeJobs
    home: Path
    base: BaseModel

    def file(self, data: bytes, purpose: Any = "fine-tune", tenant: str = "default") -> str:
        from loray.store import open_store

        mine = self.catalog.view(Principal(tenant=tenant, scopes=frozenset({"infer", "train"})))
        with FileWriter(mine, open_store(f"file://{self.home}")) as writer:
            writer.write(data)
            return writer.finish("rows.jsonl", purpose).id

    def run(self, job: Job, *events: Mapping[str, Any], published: Mapping[str, Any] | None = None) -> None:
        """The folder of the run that the job began."""
        folder = self.home / "runs" / job.name / f"{job.created_at:%Y%m%d-%H%M%S}-000001"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job_id").write_text(job.id)
        (folder / "events.jsonl").write_bytes(rows(*events))
        if published is not None:
            (folder / PUBLISHED).write_text(json.dumps({"recipe": {}, "event": published}))


def make(
    base: BaseModel,
    home: Path,
    access: Callable[[str], Authenticator] = access_of,
    served: Collection[str] | None = None,
) -> Site:
    url = sqlite_catalog(home)
    catalog = Catalog(url)
    catalog.bases.add(base.name, base.fingerprint)
    files, jobs = file_storage(url, home), FakeJobs()
    tuning = FineTuning(jobs, Settings.from_env({"LORAY_HOME": str(home), "LORAY_CATALOG": url}), served or {base.name})
    app = gateway_app(base, url, ScriptedEngines(HELLO), access=access(url), files=files, tuning=tuning)
    return Site(app, catalog, jobs, home, base)


@pytest.fixture
def site(base: BaseModel, tmp_path: Path) -> Iterator[Site]:
    made = make(base, tmp_path)
    with closing(made.catalog):
        yield made


@pytest.fixture
def client(site: Site) -> Iterator[TestClient]:
    with TestClient(site.app, headers={"Authorization": "Bearer -"}, raise_server_exceptions=False) as client:
        yield client


def recipe_of(site: Site, job_id: str) -> TrainSpec:
    """The recipe that was submitted."""
    (text,) = site.jobs.uploaded[job_id].values()
    return TrainSpec.model_validate_json(text)


async def test_openais_client_from_a_file_to_the_jobs_end(site: Site) -> None:
    async with openai_of(site.app) as client:
        file = await client.files.create(file=("rows.jsonl", rows(CHAT)), purpose="fine-tune")
        other = await client.files.create(file=("held.jsonl", rows(CHAT)), purpose="fine-tune")
        hyper = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 2}
        job = await client.fine_tuning.jobs.create(
            model=site.base.name,
            training_file=file.id,
            validation_file=other.id,
            suffix="tone",
            seed=7,
            metadata={"team": "sales"},
            method={"type": "supervised", "supervised": {"hyperparameters": hyper}},
        )
        assert (job.object, job.status, job.fine_tuned_model, job.finished_at) == (
            "fine_tuning.job",
            "queued",
            None,
            None,
        )
        assert (job.training_file, job.validation_file, job.seed) == (file.id, other.id, 7)
        assert job.method.supervised.hyperparameters.model_dump() == hyper
        assert (job.metadata, job.result_files, job.integrations, job.error) == ({"team": "sales"}, [], [], None)
        recipe = recipe_of(site, job.id)
        assert (recipe.name, recipe.base, recipe.num_epochs, recipe.batch.rows) == ("tone", site.base.name, 3, 4)
        assert (recipe.data.train, recipe.data.eval) == (f"files://{file.id}", f"files://{other.id}")
        assert recipe.optimizer.learning_rate == pytest.approx(2 * 2e-4)  # of a base of unknown size

        known = site.catalog.jobs.get(job.id)
        site.catalog.jobs.start(job.id)
        site.jobs.say(job.id, "RUNNING")
        assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "validating_files"
        step = {"event": "step", "loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 9.0, "mfu": 0.1}
        step |= {"num_steps": 2, "num_tokens": 64, "skipped_steps": 0, "eta_s": 30.0, "time": 1e9}
        first = {**step, "step": 1}
        loading = {"event": "progress", "stage": "loading", "done": 0, "total": None}
        site.run(known, loading, first)
        running = await client.fine_tuning.jobs.retrieve(job.id)
        assert (running.status, running.trained_tokens, running.estimated_finish) == ("running", 64, 1_000_000_030)

        event = {"version": 3, "step": 2, "evaluations": [{"metric": "loss", "subject": "adapter", "value": 1.25}]}
        held = {"event": "eval", "step": 2, "subject": "adapter", "eval_loss": 1.25, "time": 1e9 + 2}
        last = {**step, "step": 2, "loss": 1.5, "num_tokens": 128, "time": 1e9 + 1}
        site.run(known, loading, first, last, held, published=event)
        site.catalog.jobs.end(job.id, "succeeded", version=3)
        ended = await client.fine_tuning.jobs.retrieve(job.id)
        assert (ended.status, ended.fine_tuned_model, ended.trained_tokens) == ("succeeded", "tone@3", 128)
        assert ended.finished_at is not None

        events = [one async for one in await client.fine_tuning.jobs.list_events(job.id, limit=2)]
        assert [one.message for one in events[:2]] == [
            "The job has successfully completed",
            "New fine-tuned model created: tone@3",
        ]
        assert events[-1].message == f"Created fine-tuning job: {job.id}"
        metrics = [one.data for one in events if one.type == "metrics"]
        assert metrics == [
            {"step": 2, "valid_loss": 1.25},
            {"step": 2, "train_loss": 1.5, "total_steps": 2, "learning_rate": 1e-3},
            {"step": 1, "train_loss": 2.5, "total_steps": 2, "learning_rate": 1e-3},
        ]
        assert len({one.id for one in events}) == len(events)
        (checkpoint,) = [one async for one in await client.fine_tuning.jobs.checkpoints.list(job.id)]
        assert (checkpoint.fine_tuned_model_checkpoint, checkpoint.step_number) == ("tone@3", 2)
        assert (checkpoint.metrics.train_loss, checkpoint.metrics.valid_loss) == (1.5, 1.25)


def test_the_guides_example(site: Site, client: TestClient, tmp_path: Path) -> None:
    """As it stands there; while the job runs it is asked no further."""
    (tmp_path / "chats.jsonl").write_bytes(rows(*[CHAT] * 20))
    page = REPOSITORY / "docs" / "guide" / "training.md"
    (code,) = (block.text for block in blocks(page.read_text(encoding="utf-8")) if block.language == "python")
    code = code.replace("chats.jsonl", str(tmp_path / "chats.jsonl")).replace('"smollm2"', f'"{site.base.name}"')
    begin, end = code.split("job = client.fine_tuning.jobs.retrieve(")
    asking = openai.OpenAI(base_url="http://testserver/v1", api_key="-", max_retries=0, http_client=client)
    given: dict[str, Any] = {"client": asking, "messages": CHAT["messages"][:1], "Path": Path}
    exec(compile(begin, page, "exec", dont_inherit=True), given)
    described = {"base": site.base.name, "base_fingerprint": site.base.fingerprint}
    site.catalog.adapters.register("tone", digest(1), manifest(1).model_copy(update=described))
    site.catalog.jobs.start(given["job"].id)
    site.catalog.jobs.end(given["job"].id, "succeeded", version=1)
    exec(compile(f"job = client.fine_tuning.jobs.retrieve({end}", page, "exec", dont_inherit=True), given)
    assert (given["job"].status, given["job"].fine_tuned_model) == ("succeeded", "tone@1")


async def test_pairs_and_what_the_recipe_has_further(site: Site) -> None:
    async with openai_of(site.app) as client:
        file, further = site.file(rows(PAIR)), {"adapter": {"method": "vera", "rank": 32}, "tracking": []}
        job = await client.fine_tuning.jobs.create(
            model=site.base.name,
            training_file=file,
            method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}},
            metadata={RECIPE: json.dumps(further)},
        )
        recipe = recipe_of(site, job.id)
        assert (recipe.objective.type, recipe.objective.beta, recipe.adapter.method) == ("dpo", 0.3, "vera")
        assert recipe.tracking == ()
        assert recipe.name.startswith(f"ft-{site.base.name}-")
        assert job.method.type == "dpo"
        assert job.method.dpo.hyperparameters.beta == 0.3
        assert job.metadata == {RECIPE: json.dumps(further)}
        older = await client.fine_tuning.jobs.create(
            model=site.base.name, training_file=site.file(rows(CHAT)), hyperparameters={"n_epochs": 2}
        )
        assert older.hyperparameters.n_epochs == 2
        assert [one.id async for one in await client.fine_tuning.jobs.list(limit=1)] == [older.id, job.id]
        wanted = {RECIPE: json.dumps(further)}
        assert [one.id async for one in await client.fine_tuning.jobs.list(metadata=wanted)] == [job.id]


async def test_answers_are_graded(site: Site) -> None:
    hyper = {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5, "compute_multiplier": 1.5}
    hyper |= {"eval_interval": 5, "eval_samples": 7, "reasoning_effort": "default"}
    async with openai_of(site.app) as client:
        file = site.file(rows(QUESTION))
        given: dict[str, Any] = {"model": site.base.name, "training_file": file, "suffix": "sums"}
        method: Any = {"type": "reinforcement", "reinforcement": {"grader": SAME, "hyperparameters": hyper}}
        job = await client.fine_tuning.jobs.create(**given, method=method)
        recipe = recipe_of(site, job.id)
        assert isinstance(recipe.objective, RlSpec)
        assert (recipe.objective.type, recipe.objective.prompts_per_step, recipe.objective.group_size) == ("rl", 6, 12)
        assert (recipe.num_epochs, recipe.evaluation.interval_steps, recipe.evaluation.max_rows) == (2, 5, 7)
        assert recipe.objective.reads == ("answer",)
        assert recipe.optimizer.learning_rate == pytest.approx(0.5 * 1e-4)  # of a base of unknown size
        assert job.method.type == "reinforcement"
        assert job.method.reinforcement.grader.model_dump() == SAME
        assert job.method.reinforcement.hyperparameters.model_dump() == hyper

        site.catalog.jobs.start(job.id)
        site.jobs.say(job.id, "RUNNING")
        common = {"step": 1, "num_steps": 2}
        rollout = {"event": "rollout", **common, "metrics": {"reward_mean": 0.25}}
        step = {"event": "step", **common, "loss": 0.5, "lr": 1e-4, "reward": 0.25, "num_tokens": 9}
        held = {"event": "eval", "step": 1, "subject": "adapter", "eval_loss": None, "reward": 0.75}
        site.run(site.catalog.jobs.get(job.id), held | {"step": 0, "subject": "base"}, rollout, step, held)
        events = [one async for one in await client.fine_tuning.jobs.list_events(job.id)]
        assert [one.data for one in events if one.type == "metrics"] == [
            {"step": 1, "valid_reward_mean": 0.75},
            {"step": 1, "train_loss": 0.5, "total_steps": 2, "learning_rate": 1e-4},
            {"step": 1, "train_reward_mean": 0.25, "total_steps": 2},
            {"step": 0, "valid_reward_mean": 0.75},
        ]

        further = json.dumps({"objective": {"type": "grpo", "max_tokens": 8}})
        method = {"type": "reinforcement", "reinforcement": {"grader": ALIKE}}
        other = await client.fine_tuning.jobs.create(**given, method=method, metadata={RECIPE: further})
        objective = recipe_of(site, other.id).objective
        assert isinstance(objective, RlSpec)
        assert (objective.type, objective.max_tokens, objective.group_size) == ("grpo", 8, 8)
        assert other.method.reinforcement.grader.model_dump() == ALIKE
        assert other.method.reinforcement.hyperparameters.eval_interval == "auto"


def graded(grader: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    given = {"grader": SAME | (grader or {}), **fields}
    return {"method": {"type": "reinforcement", "reinforcement": given}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"method": {"type": "reinforcement"}}, "method", "reinforcement has a grader"),
        (
            graded({"type": "python", "source": "def grade(): ..."}),
            "method.reinforcement.grader",
            "take string_check or",
        ),
        (
            graded({"type": "score_model", "model": "o3"}),
            "method.reinforcement.grader",
            "'score_model' is not supported",
        ),
        (graded({"type": "multi", "graders": {}}), "method.reinforcement.grader", "'multi' is not supported"),
        (graded({"operation": "equal"}), "method.reinforcement.grader.operation", "'eq', 'ne', 'like' or 'ilike'"),
        (graded({"input": "{{sample.output_json}}"}), "method.reinforcement.grader.input", "{{sample.output_text}}"),
        (graded({"reference": "{{item.right}}"}), "training_file", "line 1: the row has no `right`, which the reward"),
        (graded(response_format={"type": "json_schema"}), "method.reinforcement.response_format", "leave response_"),
        (
            graded(hyperparameters={"reasoning_effort": "low"}),
            "method.reinforcement.hyperparameters",
            "leave reasoning",
        ),
        (graded(hyperparameters={"compute_multiplier": 0.1}), "method.reinforcement.hyperparameters.compute_", "0.25"),
        ({"validation_file": "CHAT", **graded()}, "validation_file", "line 1: the row has no `answer`"),
        ({"training_file": "PAIR", **graded()}, "training_file", "line 1: a row has `messages` or `prompt` for this"),
    ],
)
def test_wrong_graders(site: Site, client: TestClient, fields: dict[str, Any], param: str, message: str) -> None:
    body = {"model": site.base.name, "training_file": site.file(rows(QUESTION))} | fields
    for name in ("training_file", "validation_file"):
        if (row := {"CHAT": CHAT, "PAIR": PAIR}.get(body.get(name, ""))) is not None:
            body[name] = site.file(rows(row))
    error = error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)
    assert str(error["param"]).startswith(param), error
    assert message in error["message"]
    assert site.jobs.submitted == {}


def test_answers_need_a_deployment_of_the_base(base: BaseModel, tmp_path: Path) -> None:
    site = make(base, tmp_path, served={"other"})
    with closing(site.catalog), TestClient(site.app, headers={"Authorization": "Bearer -"}) as client:
        body = {"model": base.name, "training_file": site.file(rows(QUESTION))} | graded()
        error = error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)
        assert (error["param"], error["type"]) == ("model", "invalid_request_error")
        assert f"this one serves other: train one of these, or `loray up --base {base.name}`" in error["message"]
        assert client.post("/v1/fine_tuning/jobs", json=body | {"method": {"type": "supervised"}}).status_code == 200


async def test_going_on_from_an_adapter(site: Site) -> None:
    described = {"base": site.base.name, "base_fingerprint": site.base.fingerprint}
    site.catalog.adapters.register("tone", digest(1), manifest(1).model_copy(update=described))
    async with openai_of(site.app) as client:
        job = await client.fine_tuning.jobs.create(model="tone", training_file=site.file(rows(CHAT)), suffix="tone")
        recipe = recipe_of(site, job.id)
        assert (job.model, recipe.init_adapter, recipe.base) == ("tone@1", "tone@1", site.base.name)
        assert (recipe.adapter.rank, recipe.adapter.target_modules) == (8, ("q_proj",))


async def test_a_job_is_cancelled(site: Site) -> None:
    async with openai_of(site.app) as client:
        job = await client.fine_tuning.jobs.create(model=site.base.name, training_file=site.file(rows(CHAT)))
        assert (await client.fine_tuning.jobs.cancel(job.id)).status == "queued"  # until its driver has ended
        assert site.jobs.stopped == [job.id]
        site.jobs.say(job.id, "STOPPED")
        ended = await client.fine_tuning.jobs.retrieve(job.id)
        assert (ended.status, ended.error) == ("cancelled", None)
        events = [one async for one in await client.fine_tuning.jobs.list_events(job.id)]
        assert (events[0].message, events[0].level) == ("The job was cancelled", "warn")


async def test_a_failed_job_says_why(site: Site) -> None:
    async with openai_of(site.app) as client:
        file = site.file(rows(CHAT))
        job = await client.fine_tuning.jobs.create(model=site.base.name, training_file=file)
        site.catalog.jobs.end(job.id, "failed", message=f"files://{file}, line 2: a row must be an object, not int")
        error = (await client.fine_tuning.jobs.retrieve(job.id)).error
        assert (error.code, error.param) == ("invalid_training_file", "training_file")
        assert "line 2" in error.message
        other = await client.fine_tuning.jobs.create(model=site.base.name, training_file=file)
        site.catalog.jobs.end(other.id, "failed", message="out of memory")
        assert (await client.fine_tuning.jobs.retrieve(other.id)).error.code == "training_failed"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": "nothing"}, "model", "go on from an adapter"),
        ({"training_file": "file-unknown"}, "training_file", "there is no file"),
        ({"validation_file": "file-unknown"}, "validation_file", "there is no file"),
        ({"suffix": "not a name"}, "suffix", "letters"),
        ({"suffix": "BASE"}, "suffix", "base"),
        ({"method": {"type": "dpo"}}, "training_file", "line 1: a row has `chosen` and `rejected` or"),
        ({"method": {"type": "supervised"}, "hyperparameters": {}}, "hyperparameters", "not beside it too"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "no integrations"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", ""),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size", ""),
        ({"metadata": {"a": "x" * 513}}, "metadata", "at most 512"),
        ({"metadata": {RECIPE: "{"}}, f"metadata.{RECIPE}", "not valid JSON"),
        ({"metadata": {RECIPE: "[]"}}, f"metadata.{RECIPE}", "must be an object"),
        ({"metadata": {RECIPE: '{"name": "x"}'}}, f"metadata.{RECIPE}", "the request has it as suffix"),
        ({"metadata": {RECIPE: '{"data": {"train": "/etc/passwd"}}'}}, f"metadata.{RECIPE}", "training_file"),
        ({"metadata": {RECIPE: '{"data": 5}'}}, f"metadata.{RECIPE}", "data must be an object"),
        ({"metadata": {RECIPE: '{"data": "files://file-other"}'}}, f"metadata.{RECIPE}", "data must be an object"),
        ({"metadata": {RECIPE: '{"data": null}'}}, f"metadata.{RECIPE}", "data must be an object"),
        ({"metadata": {RECIPE: '{"adapter": {"rank": 0}}'}}, f"metadata.{RECIPE}", "rank"),
        ({"metadata": {RECIPE: '{"adaptor": 1}'}}, f"metadata.{RECIPE}", "adaptor"),
        ({"metadata": {RECIPE: '{"optimizer": []}'}}, f"metadata.{RECIPE}", "optimizer"),
    ],
)
def test_wrong_requests(site: Site, client: TestClient, fields: dict[str, Any], param: str, message: str) -> None:
    body = {"model": site.base.name, "training_file": site.file(rows(CHAT))} | fields
    body |= {"suffix": site.base.name} if body.get("suffix") == "BASE" else {}
    error = error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)
    assert str(error["param"]).startswith(param), error
    assert message in error["message"]
    assert site.jobs.submitted == {}


def test_rows_have_the_columns_of_the_recipe(site: Site, client: TestClient) -> None:
    given = {"model": site.base.name, "training_file": site.file(rows({"question": "hi", "completion": "ho"}))}
    assert client.post("/v1/fine_tuning/jobs", json=given).status_code == 400
    further = json.dumps({"data": {"columns": {"prompt": "question"}}})
    assert client.post("/v1/fine_tuning/jobs", json=given | {"metadata": {RECIPE: further}}).status_code == 200
    pairs = {"model": site.base.name, "training_file": site.file(rows(PAIR))}
    further = json.dumps({"objective": {"type": "orpo"}})
    assert client.post("/v1/fine_tuning/jobs", json=pairs | {"metadata": {RECIPE: further}}).status_code == 200


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows(CHAT) + b"{\n", "line 2: not valid JSON"),
        (rows(CHAT) + b"\n[1]\n", "line 3: a row must be an object, not list"),
        (rows(CHAT, {"question": 1}), "line 2: a row has `messages` or"),
        (b"\n\n", "has no rows"),
    ],
)
def test_a_wrong_row_is_named(site: Site, client: TestClient, data: bytes, message: str) -> None:
    body = {"model": site.base.name, "training_file": site.file(data)}
    error = error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)
    assert error["param"] == "training_file"
    assert message in error["message"]


def test_a_file_of_another_purpose(site: Site, client: TestClient) -> None:
    body = {"model": site.base.name, "training_file": site.file(rows(CHAT), "batch")}
    error = error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)
    assert "has the purpose batch" in error["message"]


def test_lists_are_paged_by_what_they_have(site: Site, client: TestClient) -> None:
    body = {"model": site.base.name, "training_file": site.file(rows(CHAT))}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    url = f"/v1/fine_tuning/jobs/{job['id']}"
    for path in (f"{url}/events", f"{url}/checkpoints"):
        assert error_of(client.get(path, params={"after": "nothing"}), 400)["param"] == "after"
    assert error_of(client.get("/v1/fine_tuning/jobs", params={"metadata": "team"}), 400)["param"] == "metadata"
    assert client.get(f"{url}/checkpoints").json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_what_openai_has_and_this_has_not(site: Site, client: TestClient) -> None:
    for path in ("jobs/x/pause", "jobs/x/resume", "checkpoints/ft:a@1/permissions"):
        assert (
            "cancel" in (error := error_of(client.post(f"/v1/fine_tuning/{path}"), 404))["message"]
            or "share" in (error["message"])
        )
    error = error_of(client.get("/v1/fine_tuning/jobs/nothing"), 404)
    assert error["code"] == "job_not_found"


def test_without_a_cluster(site: Site, client: TestClient) -> None:
    site.jobs.down = True
    body = {"model": site.base.name, "training_file": site.file(rows(CHAT))}
    assert "cannot be reached" in error_of(client.post("/v1/fine_tuning/jobs", json=body), 503)["message"]


async def test_tenants_have_their_own_files_jobs_and_limits(base: BaseModel, tmp_path: Path) -> None:
    site = make(base, tmp_path, lambda url: access_of(url, host="0.0.0.0"))
    site.catalog.tenants.create("acme", limits=Limits(max_jobs=1))
    site.catalog.tenants.create("beta")
    acme, beta = (site.catalog.keys.create(name, tenant=name, scopes={"train"}).secret for name in ("acme", "beta"))
    file = site.file(rows(CHAT), tenant="acme")
    async with openai_of(site.app) as client:
        ours, theirs = client.with_options(api_key=acme), client.with_options(api_key=beta)
        given = {"model": base.name, "training_file": file, "suffix": "tone"}
        with pytest.raises(openai.BadRequestError, match="there is no file"):
            await theirs.fine_tuning.jobs.create(**given)
        job = await ours.fine_tuning.jobs.create(**given)
        assert job.organization_id == "acme"
        for call in (
            theirs.fine_tuning.jobs.retrieve,
            theirs.fine_tuning.jobs.cancel,
            theirs.fine_tuning.jobs.list_events,
        ):
            with pytest.raises(openai.NotFoundError):
                await call(job.id)
        assert [one async for one in await theirs.fine_tuning.jobs.list()] == []
        with pytest.raises(openai.RateLimitError) as error:
            await ours.fine_tuning.jobs.create(**given)
        assert int(error.value.response.headers["retry-after"]) > 0
        site.catalog.jobs.end(job.id, "succeeded", version=1)
        grading = {**given, "training_file": site.file(rows(QUESTION), tenant="acme")} | graded()
        assert (await ours.fine_tuning.jobs.create(**grading)).method.type == "reinforcement"  # no code of a tenant's
        assert (await ours.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model == "tone@1"
        for further in ({"num_workers": 999}, {"publish": {"aliases": ["prod"]}}):
            with pytest.raises(openai.PermissionDeniedError):
                await ours.fine_tuning.jobs.create(**given, metadata={RECIPE: json.dumps(further)})
    site.catalog.close()
