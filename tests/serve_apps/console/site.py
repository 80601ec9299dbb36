"""The console in this process: a catalog with adapters of two tenants, and a scripted gateway beside it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from jobs.sweeps.spec import PLAN, SweepPlan, Trial, TrialRecord, record_file
from loray.bases.registry import BaseModel
from loray.catalog import Job
from loray.catalog.database import writing
from loray.catalog.schema import batches, files
from loray.publishing.user_files import FileWriter
from loray.recipes.load import load_recipe
from loray.schemas.status import AutoscalingStatus, BaseStatus, CatalogStatus, ReplicaStatus, Status, total
from loray.spec import DEFAULT_TENANT, Principal, ServeSpec, TrainSpec
from serve_apps.console import GatewayClient
from tests.fixtures.api import Api
from tests.fixtures.training_sessions import begin_session
from tests.fixtures.versions import BASE, digest, manifest

ROOT = "/api/v1/console"
URL = f"http://test{ROOT}"
HTMX = {"HX-Request": "true", "X-Requested-With": "htmx", "Content-Type": "application/x-www-form-urlencoded"}
COMPARED = "/jobs/compare?job=train_1&job=train_2"
PAGES = (
    *("", "/login", "/adapters", "/adapters?search=zzz", "/adapters/tone", "/adapters/tone/versions/2"),
    *("/adapters/tone/diff?old=1&new=2", "/adapters/nothing", "/uploads", "/playground", "/jobs", "/jobs/new"),
    *("/jobs/train_1", "/jobs/sweep_1", COMPARED, "/serving", "/serving/replicas/r1", "/usage", "/keys"),
    *("/files", "/files?purpose=batch", "/batches", "/batches/batch-1"),
    *("/sessions", "/sessions/session-1"),
)
METRICS = """
# TYPE loray_time_to_first_token_seconds histogram
loray_time_to_first_token_seconds_bucket{method="base",le="0.1"} 50
loray_time_to_first_token_seconds_bucket{method="base",le="0.2"} 99
loray_time_to_first_token_seconds_bucket{method="base",le="+Inf"} 100
loray_time_to_first_token_seconds_count{method="base"} 100
loray_time_to_first_token_seconds_sum{method="base"} 9
# TYPE loray_routing_decisions_total counter
loray_routing_decisions_total{reason="pool"} 30
loray_routing_decisions_total{reason="hash"} 10
loray_routing_decisions_total{reason="overflow"} 0
# TYPE loray_engine_step_seconds histogram
loray_engine_step_seconds_bucket{replica="r1",le="0.01"} 60
loray_engine_step_seconds_bucket{replica="r1",le="0.02"} 100
loray_engine_step_seconds_bucket{replica="r1",le="+Inf"} 100
"""


def steps(num_steps: int, offset: float) -> list[dict[str, object]]:
    """Events of a run: its steps, and held-out losses of the base and, each fifth step, of the adapter."""
    events: list[dict[str, object]] = [{"event": "eval", "step": 0, "eval_loss": 4.0 + offset, "subject": "base"}]
    for n in range(1, num_steps + 1):
        figures = {"loss": offset + 2.0 / n, "lr": 1e-3 / n, "tokens_per_s": 500.0 + n, "eta_s": 60.0 * (num_steps - n)}
        others = {"epoch": 0, "grad_norm": 0.5, "num_tokens": 512 * n, "skipped_steps": 0}
        known = {"num_steps": num_steps, "mfu": 0.25, "memory_bytes": 1 << 30}
        events.append({"event": "step", "step": n} | known | figures | others)
        if n % 5 == 0:
            events.append({"event": "eval", "step": n, "eval_loss": offset + 3.0 / n, "subject": "adapter"})
    return events


def lines(events: Iterable[Mapping[str, object]]) -> str:
    return "".join(f"{json.dumps(event)}\n" for event in events)


class ScriptedGateway:
    """`num_tokens` were generated so far. `keys`: those that may see the state; None: everybody. `down`: 500.
    `metrics`: Prometheus' text.
    """

    def __init__(self) -> None:
        self.num_tokens, self.down, self.metrics = 1000, False, METRICS
        self.replicas: tuple[ReplicaStatus, ...] | None = None  # instead of two
        self.keys: set[str] | None = None
        self.asked: list[tuple[str | None, dict[str, object]]] = []
        self.thought: tuple[str, ...] = ()  # words before each answer

    @property
    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/status")
        def status(request: Request) -> Response:
            return self._refused(request) or JSONResponse(self.status().model_dump(mode="json"))

        @app.get("/metrics")
        def metrics(request: Request) -> Response:
            return self._refused(request) or PlainTextResponse(self.metrics)

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self.asked.append((request.headers.get("authorization"), await request.json()))

            async def events() -> AsyncIterator[str]:
                answer: list[tuple[dict[str, str], str]] = [
                    *(({"reasoning": word, "reasoning_content": word}, word) for word in self.thought),
                    *(({"content": word}, word) for word in ("Good ", "day")),
                ]
                for delta, word in answer:
                    choice: dict[str, object] = {"delta": delta}
                    if self.asked[-1][1].get("logprobs"):
                        others = [{"token": word, "logprob": -0.1}, {"token": "Bad", "logprob": -2.5}]
                        choice["logprobs"] = {"content": [{"token": word, "logprob": -0.1, "top_logprobs": others}]}
                    yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 2}})}\n\ndata: [DONE]\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")

        return app

    def _refused(self, request: Request) -> Response | None:
        if self.down:
            return Response(status_code=500)
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return None if self.keys is None or given in self.keys else Response(status_code=403)

    def status(self) -> Status:
        common: dict[str, Any] = {"uptime_s": 7200, "num_running": 3, "num_output_tokens": self.num_tokens // 2}
        common |= {"num_pool_hits": 90, "num_host_hits": 8, "num_misses": 2}
        replicas = self.replicas or tuple(
            ReplicaStatus(
                replica=f"r{number}",
                node=f"n{number}",
                pid=number,
                num_waiting=number,
                num_loading=number - 1,
                blocks={"free": 60, "kv": 30, "flat": 10},
                adapters_in_pool=("tone@2", f"legal@{number}"),
                adapters_on_host=("dates@1",),
                adapters_loading=("cold@1",)[: number - 1],
                **common,
            )
            for number in (1, 2)
        )
        base = BaseStatus(
            base="smollm2",
            status="ok",
            num_replicas=2,
            target=3,
            num_adapters=3,
            spec=ServeSpec(base="smollm2"),
            autoscaling=AutoscalingStatus(target=3, reason="the working set outgrows two pools", time=1.0),
        )
        return Status(
            status="ok", bases=(base,), catalog=CatalogStatus(num_adapters=3), replicas=replicas, totals=total(replicas)
        )


class ConsoleSite(Api):
    """An `Api` with a scripted gateway and these adapters: `tone` of two versions, `legal`, and acme's `vault`."""

    def __init__(self, home: Path, catalog_url: str) -> None:
        super().__init__(home, catalog_url)
        self.engines = ScriptedGateway()
        self.services.gateway = GatewayClient("http://gateway", httpx.ASGITransport(self.engines.app))
        catalog = self.catalog
        catalog.bases.add("smollm2", BASE)
        trained = manifest(2).model_copy(update={"job_id": "train_5f1b", "data_fingerprint": "da7a" * 16, "rank": 16})
        catalog.adapters.register("tone", digest(1), manifest(1), ["prod"])
        catalog.adapters.register("tone", digest(2), trained)
        catalog.adapters.register("legal", digest(3), manifest(3))
        catalog.tenants.create("acme")
        catalog.view(Principal(tenant="acme")).adapters.register("vault", digest(4), manifest(4), ["prod"])

    def key(self, *scopes: str, tenant: str = DEFAULT_TENANT) -> str:
        return self.catalog.keys.create("-".join((tenant, *scopes)), tenant=tenant, scopes=scopes).secret

    def log_in(self, key: str) -> httpx.Response:
        return self.http.post(f"{URL}/login", data={"key": key}, headers={"Content-Type": HTMX["Content-Type"]})

    def get(self, path: str = "", **params: object) -> httpx.Response:
        return self.http.get(URL + path, params=params or None)  # type: ignore[arg-type]

    def post(self, path: str, data: dict[str, object] | None = None, **headers: str) -> httpx.Response:
        """As htmx sends it, with the token of the page."""
        return self.http.post(URL + path, data=data, headers=HTMX | self._token() | headers)

    def send(self, method: str, path: str, body: bytes) -> httpx.Response:
        """As the upload's script sends a file."""
        headers = HTMX | self._token() | {"Content-Type": "application/octet-stream"}
        return self.http.request(method, URL + path, content=body, headers=headers)

    def run(self, job_id: str, *events: dict[str, object], recipe: TrainSpec | None = None) -> Path:
        """A job of `tone` with these events in its run's folder, which is returned."""
        job = self.catalog.jobs.add(job_id, name="tone", recipe=recipe or load_recipe("lora_smollm2").spec)
        return self.write("runs", job, {"events.jsonl": lines(events)})

    def write(self, kind: str, job: Job, files: dict[str, str]) -> Path:
        """The folder of the run, or of the sweep, that the job began."""
        number = sum(1 for _ in self.settings.home.glob(f"{kind}/{job.name}/*"))
        folder = self.settings.home / kind / job.name / f"{job.created_at:%Y%m%d-%H%M%S}-{number:06}"
        folder.mkdir(parents=True)
        for name, text in {"job_id": job.id, **files}.items():
            (folder / name).write_text(text)
        return folder

    def train_some(self) -> None:
        """The jobs `train_1` and `train_2`, each of 20 steps and with other ranks, and `sweep_1` of three trials; and
        `batch-1`, which runs; and the training session `session-1`.
        """
        self.begin_batch()
        begin_session(self.catalog, "session-1", display_name="spoken numbers")
        recipe = load_recipe("lora_smollm2").spec
        smaller = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"rank": 4})})
        self.run("train_1", *steps(20, 1.0), recipe=recipe)
        self.run("train_2", *steps(20, 0.5), recipe=smaller)
        trials = tuple(Trial(values={"adapter.rank": str(rank)}, recipe=recipe) for rank in (4, 8, 16))
        plan = SweepPlan(recipe=recipe, folder="/", trials=trials)
        ended = TrialRecord(
            trial=1, values=trials[1].values, status="completed", num_steps=9, losses=((3, 2.5), (9, 2.25))
        )
        job = self.catalog.jobs.add("sweep_1", name="tone", recipe=recipe)
        self.write("sweeps", job, {PLAN: plan.model_dump_json(), record_file(1): ended.model_dump_json()})

    def begin_batch(self) -> None:
        """The batch `batch-1` of the file `file-1`, some of whose lines have an answer."""
        with FileWriter(self.catalog, self.services.store.objects) as writer:
            writer.write(b"{}\n")
            file = writer.finish("questions.jsonl", "batch")
        self.catalog.batches.create(file.id, "/v1/chat/completions", metadata={"team": "sales"})
        errors = json.dumps([{"code": "budget_exceeded", "message": "the budget is used up", "line": 7, "param": None}])
        known = {"state": "in_progress", "total": 5000, "completed": 1200, "failed": 3, "errors": errors}
        with writing(self.catalog._db.engine) as c:
            c.execute(files.update().where(files.c.id == file.id).values(id="file-1"))
            c.execute(batches.update().values(known | {"id": "batch-1", "input_file_id": "file-1"}))

    def add_base(self, base: BaseModel) -> BaseModel:
        self.catalog.bases.add(base.name, base.fingerprint)
        return super().add_base(base)

    def _token(self) -> dict[str, str]:
        return {"X-CSRF-Token": self.get().text.partition('"X-CSRF-Token": "')[2].partition('"')[0]}
