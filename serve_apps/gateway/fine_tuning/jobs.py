"""Fine-tuning jobs: what the routes do, with training jobs of loray."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Literal, TypeVar

from jobs.runs.history import RunEvents
from jobs.submission.server import RayJobServer
from jobs.submission.tracker import JobTracker
from loray.catalog import Catalog, Job
from loray.errors import ConflictError, DataError, RequestError, SpecError, UserFileNotFound, shown
from loray.policy.auth import check
from loray.publishing.user_files import read_file
from loray.schemas.openai.fine_tuning import (
    FineTuningCheckpoint,
    FineTuningCheckpointList,
    FineTuningError,
    FineTuningEvent,
    FineTuningEventList,
    FineTuningJob,
    FineTuningJobList,
    FineTuningRequest,
)
from loray.settings import Settings
from loray.spec import (
    FORMAT_COLUMNS,
    ColumnNames,
    JobStatus,
    Principal,
    RlSpec,
    TrainSpec,
    lacking,
    qualified_name,
    split_qualified,
)
from loray.store.objects import ObjectStore
from serve_apps.gateway.fine_tuning.progress import JobProgress, Progress
from serve_apps.gateway.fine_tuning.recipe import file_of, method_of, recipe_of
from serve_apps.places import MostPlaces, Places

T = TypeVar("T", FineTuningEvent, FineTuningCheckpoint)
R = TypeVar("R")

_ASKING = MostPlaces(total=8, of_tenant=4, wait_s=10.0)  # of Ray, which may answer late
_MOST_FOLLOWED = 64  # jobs whose events are kept; those of another one are read from their beginning
_CHECKED_BYTES = 1 << 20  # of a file, at once; the run checks all of it
_PAGE = 100  # jobs that are read at once where only those with some metadata are wanted
_Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
_STATUS: Mapping[JobStatus, _Status] = {
    "pending": "queued",
    "running": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "stopped": "cancelled",
}


class FineTuning:
    """The operations of `/v1/fine_tuning/jobs`, each for the caller whose view of the catalog it is given. They block,
    and may be called from several threads. Raise LorayError; RequestError names the field.
    """

    def __init__(self, server: RayJobServer, settings: Settings, served: Collection[str] | None = None) -> None:
        """`served`: bases of the deployment that jobs may sample from; None: a job finds out."""
        self._server, self._settings, self._served = server, settings, served
        self._places = Places("requests for training jobs", _ASKING)
        self._progress = lru_cache(maxsize=_MOST_FOLLOWED)(self._opened)

    async def run(self, tenant: str, question: Callable[[], R]) -> R:
        """Return or raise what one of the operations below does, in a thread."""
        return await self._places.run(tenant, question)

    def close(self) -> None:
        self._places.close()

    def create(self, catalog: Catalog, store: ObjectStore, asked: FineTuningRequest) -> FineTuningJob:
        """Train the recipe that the request stands for, and publish what it gives."""
        called = secrets.token_hex(8)
        recipe = recipe_of(asked, called[:8], catalog, self._settings.home)
        if isinstance(recipe.objective, RlSpec) and self._served is not None and recipe.base not in self._served:
            raise RequestError(
                f"answers are sampled by the deployment of {recipe.base}, and this one serves "
                f"{', '.join(self._served)}: train one of these, or `loray up --base {recipe.base}` in this cluster "
                "first",
                "model",
            )
        if recipe.publish.aliases:
            check(catalog.principal, "promote")
        for param, file_id in (("training_file", asked.training_file), ("validation_file", asked.validation_file)):
            if file_id is not None:
                _check_file(catalog, store, file_id, param, recipe)
        try:
            catalog.adapters.check_name(recipe.name, recipe.publish.aliases)
        except (ConflictError, SpecError) as e:
            raise RequestError(str(e), "suffix") from e
        try:
            job = self._jobs(catalog).submit(recipe, f"ftjob-{called}", resume=False)
        except (DataError, SpecError) as e:
            raise RequestError(str(e)) from e
        return self._shown(catalog.principal, job)

    def page(self, catalog: Catalog, after: str | None, limit: int, metadata: Mapping[str, str]) -> FineTuningJobList:
        """Jobs of the own tenant with this metadata, newest first."""
        jobs, found = self._jobs(catalog), list[Job]()
        cursor = None if after is None else jobs.get(after).id
        while len(found) <= limit:
            page = jobs.page(_PAGE if metadata else limit + 1, cursor, None, None)
            found += [job for job in page.items if metadata.items() <= (job.recipe.metadata or {}).items()]
            cursor = page.next
            if cursor is None:
                break
        shown = [self._shown(catalog.principal, job) for job in found[:limit]]
        return FineTuningJobList(data=shown, has_more=len(found) > limit)

    def get(self, catalog: Catalog, job_id: str) -> FineTuningJob:
        return self._shown(catalog.principal, self._jobs(catalog).get(job_id))

    def cancel(self, catalog: Catalog, job_id: str) -> FineTuningJob:
        """Stop a job, which is `cancelled` once its driver has ended. One that has ended stays as it is."""
        return self._shown(catalog.principal, self._jobs(catalog).stop(job_id))

    def events(self, catalog: Catalog, job_id: str, after: str | None, limit: int) -> FineTuningEventList:
        """Return what has happened, newest first."""
        job = self._jobs(catalog).get(job_id)
        events = _after(self._look(catalog.principal, job).events[::-1], after)
        return FineTuningEventList(data=events[:limit], has_more=len(events) > limit)

    def checkpoints(self, catalog: Catalog, job_id: str, after: str | None, limit: int) -> FineTuningCheckpointList:
        """Return the version that the job has published."""
        job = self._jobs(catalog).get(job_id)
        checkpoint = self._look(catalog.principal, job).checkpoint
        found = _after([] if checkpoint is None else [checkpoint], after)[:limit]
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return FineTuningCheckpointList(data=found, first_id=first, last_id=last, has_more=False)

    def _jobs(self, catalog: Catalog) -> JobTracker:
        return JobTracker(lambda: catalog, self._server, self._settings)

    def _opened(self, job_id: str, name: str, created_at: datetime) -> JobProgress:
        return JobProgress(RunEvents(self._settings, name, job_id, created_at))

    def _look(self, principal: Principal, job: Job) -> Progress:
        name = qualified_name(job.tenant, split_qualified(job.name).name)
        return self._progress(job.id, name, job.created_at).look(job, model_of(principal, job))

    def _shown(self, principal: Principal, job: Job) -> FineTuningJob:
        recipe, told = job.recipe, self._look(principal, job)
        sources = [file_of(source.path) for source in (*recipe.data.train_sources, *recipe.data.eval_sources)]
        num_train, step = len(recipe.data.train_sources), told.step or {}
        status = _STATUS[job.status]
        if status == "running" and not told.has_begun:
            status = "validating_files"
        method = method_of(recipe, self._settings.home)
        eta_s, at = step.get("eta_s"), step.get("time")
        finish = None
        if status == "running" and isinstance(eta_s, int | float) and isinstance(at, int | float):
            finish = int(at + eta_s)
        return FineTuningJob(
            id=job.id,
            object="fine_tuning.job",
            created_at=int(job.created_at.timestamp()),
            finished_at=None if job.ended_at is None else int(job.ended_at.timestamp()),
            estimated_finish=finish,
            status=status,
            error=_error(job) if job.status == "failed" else None,
            model=recipe.init_adapter or recipe.base,
            fine_tuned_model=model_of(principal, job),
            organization_id=job.tenant,
            training_file=", ".join(sources[:num_train]),
            validation_file=", ".join(sources[num_train:]) or None,
            result_files=[],
            trained_tokens=step.get("num_tokens"),
            seed=recipe.seed,
            hyperparameters=method[method["type"]]["hyperparameters"],
            method=method,
            integrations=[],
            metadata=recipe.metadata or {},
        )


def model_of(principal: Principal, job: Job) -> str | None:
    """Find by which name the caller can ask for what the job has published; None where it has published nothing."""
    if job.version is None:
        return None
    tenant, name = split_qualified(job.name)
    return f"{name if tenant in (None, principal.tenant) else job.name}@{job.version}"


def _error(job: Job) -> FineTuningError:
    """Data that cannot be learned from is the fault of a file, of which the message has the line."""
    message = job.message or "the job has failed; its log has the reason"
    data = job.recipe.data
    for param, sources in (("training_file", data.train_sources), ("validation_file", data.eval_sources)):
        if any(source.path in message for source in sources):
            return FineTuningError(code=f"invalid_{param}", message=message, param=param)
    return FineTuningError(code="training_failed", message=message, param=None)


def _after(items: list[T], after: str | None) -> list[T]:
    """Return those behind the item of this id. Raises RequestError where there is none."""
    if after is None:
        return items
    for number, item in enumerate(items):
        if item.id == after:
            return items[number + 1 :]
    raise RequestError(f"{shown(after)} is not in this list; take the last id of the page before", "after")


def _check_file(catalog: Catalog, store: ObjectStore, file_id: str, param: str, recipe: TrainSpec) -> None:
    """Raise RequestError where the caller has no such file of the purpose `fine-tune`, or where the beginning of it has
    rows that the recipe does not learn from.
    """
    try:
        file = catalog.files.get(file_id)
    except UserFileNotFound as e:
        raise RequestError(str(e), param) from e
    if file.purpose != "fine-tune":
        raise RequestError(f"file {file_id} has the purpose {file.purpose}: upload it with `fine-tune`", param)
    begins = b"".join(read_file(store, file, 0, _CHECKED_BYTES))
    lines = begins.split(b"\n") if len(begins) == file.bytes else begins.split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        if line.strip() and (problem := _problem(line, recipe)) is not None:
            raise RequestError(f"file {file_id}, line {number}: {problem}", param)
    if not begins.strip():
        raise RequestError(f"file {file_id} has no rows in its first {_CHECKED_BYTES >> 20} MiB", param)


def _problem(line: bytes, recipe: TrainSpec) -> str | None:
    """Say what is wrong with a row, as far as its columns tell; None where nothing is."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        return f"not valid JSON: {e}"
    if not isinstance(row, dict):
        return f"a row must be an object, not {type(row).__name__}"
    others = recipe.data.columns or ColumnNames()
    forms = [columns for name, columns in FORMAT_COLUMNS.items() if name in recipe.objective.formats]
    needed: tuple[str, ...] = ()
    if isinstance(recipe.objective, RlSpec):
        forms, needed = [("messages",), ("prompt",)], recipe.objective.reads
    if not any(all(column in row or others.of(column) in row for column in columns) for columns in forms):
        known = " or ".join(" and ".join(f"`{column}`" for column in columns) for columns in forms)
        return f"a row has {known} for this method, and this one has {', '.join(map(shown, row)) or 'nothing'}"
    return lacking(needed, row)
