"""Jobs from submission to their end, and what tenants may submit.

An administrator, and everybody where no key is needed, may name any data that the cluster reaches.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from jobs.events import adapter_of, decode
from jobs.submission.commands import Place, Submission, Work
from jobs.submission.server import AGENT_S, RayJob, RayJobServer
from loray.adapters.manifest import check_recipe
from loray.catalog import Catalog, Job
from loray.errors import ClusterError, ConflictError, JobNotFound, LogsGone, LorayError, PermissionDenied, SpecError
from loray.locations import S3Location, parse_location
from loray.recipes.load import Recipe
from loray.recipes.many import ManyPlan
from loray.recipes.sources import UPLOADED
from loray.schemas.resources import Page
from loray.settings import Settings
from loray.spec import JobStatus, Principal, RlSpec, TrainSpec, split_qualified
from loray.telemetry import get_logger

log = get_logger(__name__)

COMMAND_ACTOR = "local"  # of jobs whose driver a command started, without the API
_ACTIVE: tuple[JobStatus, ...] = ("pending", "running")
_MOST_ACTIVE = 1000  # jobs of a tenant that are asked for
_TAIL_OF_PARTS = 10_000  # lines of a job's log in which those of one of its adapters are looked for
_NUM_ID_DIGITS = 16  # that follow an id which a client chose, and a dot
_SUBMISSION_S = AGENT_S + 60.0  # how long a job may be in the catalog before Ray knows it


class JobLimits(NamedTuple):
    """How many a tenant may have at once; None: any number."""

    jobs: int | None
    workers: int | None


def limits_of(principal: Principal, settings: Settings) -> JobLimits:
    """Returns the smaller ones of key and tenant; where neither says anything, the deployment's, which do not bind its
    administrators.
    """
    given = (principal.limits, principal.tenant_limits)
    jobs = [limits.max_jobs for limits in given if limits.max_jobs is not None]
    workers = [limits.max_workers for limits in given if limits.max_workers is not None]
    default = JobLimits(None, None) if principal.is_admin else JobLimits(settings.max_jobs, settings.max_workers)
    return JobLimits(min(jobs, default=default.jobs), min(workers, default=default.workers))


def check_allowed(spec: TrainSpec, principal: Principal, settings: Settings) -> None:
    """Raises PermissionDenied for more workers, or other data, than the caller may have.

    A tenant names its own data: files of `/v1/files`, and s3:// URLs without options below `LORAY_DATA/TENANT`. The
    driver opens these with the options of LORAY_DATA (`loray.fetching`), which are in no recipe, and with the cluster's
    credentials.
    """
    if principal.is_admin:
        return
    limit = limits_of(principal, settings).workers
    if limit is not None and spec.num_workers > limit:
        raise PermissionDenied(f"num_workers is {spec.num_workers}, and at most {limit} are allowed")
    if spec.objective.teaching is not None and spec.objective.teaching.url is not None:
        raise PermissionDenied(
            "objective.url: a tenant's job asks no other server; leave it out, and name a base of this deployment as "
            "objective.teacher"
        )
    for source in spec.data.paths:
        _check_source(source, principal.tenant, settings)


def _check_source(source: str, tenant: str, settings: Settings) -> None:
    if source.startswith(UPLOADED):
        return  # `_check_files` asks the catalog
    if settings.data is None:
        raise PermissionDenied(
            f"data {source!r}: this deployment has no place for tenants' data but `/v1/files`: upload it there, and "
            f"name {UPLOADED}ID; or its operator sets LORAY_DATA to a place, as s3://bucket/prefix"
        )
    place = parse_location(settings.data)
    assert isinstance(place, S3Location)  # Settings has checked it
    prefix = "/".join(part for part in (place.prefix, tenant) if part)
    folder = f"s3://{place.bucket}/{prefix}/"
    path = source.removeprefix(folder).removesuffix("/")
    is_plain = not any(char in source for char in "?#@%\\") and source.isprintable()
    if not source.startswith(folder) or not is_plain or {"", ".", ".."} & set(path.split("/")):
        raise PermissionDenied(f"data {source!r} must be an s3:// URL without options below {folder}")


def _check_files(spec: TrainSpec, catalog: Catalog) -> None:
    """Raises UserFileNotFound where the data names an uploaded file that does not exist for the caller, who alone may
    have it read: the driver asks nobody whose it is.
    """
    for source in spec.data.paths:
        if source.startswith(UPLOADED):
            catalog.files.get(source.removeprefix(UPLOADED))


class JobTracker:
    """Submits, reads and stops jobs. Thread-safe, as the catalog is."""

    def __init__(self, catalog: Callable[[], Catalog], server: RayJobServer, settings: Settings) -> None:
        self._open, self._server, self._settings = catalog, server, settings

    def submit(self, spec: TrainSpec, chosen: str | None, *, resume: bool) -> Job:
        """Inserts a pending job into the catalog, then submits it to Ray. If Ray refuses it, the job has failed.

        `chosen` becomes a part of the job's id, and names it in the caller's tenant: see `id_of`. DataError for
        relative data paths, UserFileNotFound for a file that the caller does not have, PermissionDenied as
        `check_allowed` says, RateLimited for more jobs or workers at once
        than the caller may have, ConflictError if the name is taken, the tenant has a job of the chosen id, or the job
        is stopped before Ray has it, ClusterError without Ray.
        """
        work = Work.training(Recipe(spec, None, Path("/")), resume=resume, tenant=self._open().own_tenant)
        return self._submit_work(work, spec, chosen, (spec,))

    def submit_many(self, name: str, specs: Sequence[TrainSpec], chosen: str | None, *, resume: bool) -> Job:
        """Submits one job that trains several adapters, and is called `name`. Raises as `submit`."""
        recipes = [Recipe(spec, None, Path("/")) for spec in specs]
        work = Work.many(name, recipes, resume=resume, tenant=self._open().own_tenant)
        whole = ManyPlan.of(name, recipes, lambda recipe: "/").recipe
        return self._submit_work(work, whole, chosen, specs)

    def _submit_work(self, work: Work, spec: TrainSpec, chosen: str | None, specs: Sequence[TrainSpec]) -> Job:
        """Submits what trains `specs` as a job whose recipe is `spec`."""
        catalog = self._open()
        for each in specs:
            check_allowed(each, catalog.principal, self._settings)
            if isinstance(each.objective, RlSpec) and each.objective.runs_code is not None:
                raise SpecError(
                    f"{each.objective.runs_code} is code of the recipe, which a server does not import: take "
                    "objective.reward.builtin or grader, or `loray train` in the cluster itself"
                )
            _check_files(each, catalog)
        with tempfile.TemporaryDirectory(prefix="loray-job-") as stage:
            tenant = catalog.own_tenant
            submission = Submission.of(work, Place.of_server(self._settings, Path(stage)))
            job_id = f"train_{secrets.token_hex(8)}" if chosen is None else id_of(tenant, chosen)
            if chosen is not None and (self._is_known(chosen) or self._server.find(job_id) is not None):
                raise ConflictError(f"there is a job {chosen!r} already; choose another id, or leave it out")
            for each in specs:
                catalog.adapters.check_name(each.name, each.publish.aliases)
                check_recipe(each)
            return self._submit(catalog, job_id, spec, submission)

    def _submit(self, catalog: Catalog, job_id: str, spec: TrainSpec, submission: Submission) -> Job:
        limits = limits_of(catalog.principal, self._settings)
        if limits != JobLimits(None, None):
            self.settle_active()
        cluster = None
        with suppress(ClusterError):  # submitting raises it again
            cluster = self._server.cluster()
        job = catalog.jobs.add(
            job_id, name=spec.name, recipe=spec, max_jobs=limits.jobs, max_workers=limits.workers, cluster=cluster
        )
        try:
            self._server.submit(submission, job_id, lambda: not catalog.jobs.get(job_id).has_ended)
        except ConflictError:
            raise  # Ray has another job with this id, or this one has ended
        except LorayError as e:
            catalog.jobs.end(job_id, "failed", message=f"not submitted: {e}")
            raise
        return job

    def get(self, job_id: str) -> Job:
        """Returns the job, updated from Ray if it has not ended and Ray answers. Raises JobNotFound.

        Here and in the methods below, `job_id` may be what the tenant chose.
        """
        job = self._find(job_id)
        try:
            return job if job.has_ended else self._settle(job, self._server.find(job.part_of or job.id))
        except ClusterError as e:
            log.warning("job %s is shown as the catalog has it: %s", job.id, e)
            return job

    def page(self, limit: int, cursor: str | None, status: JobStatus | None, name: str | None) -> Page[Job]:
        """Returns the jobs as the catalog's `Jobs.page` does, updated from Ray, which is asked once. A job whose status
        no longer matches `status` is left out.
        """
        page = self._open().jobs.page(limit=limit, cursor=cursor, status=status, name=name)
        active = {job.part_of or job.id for job in page.items if not job.has_ended}
        try:
            known = self._server.find_all(active) if active else {}
            settled = tuple(
                job if job.has_ended else self._settle(job, known.get(job.part_of or job.id)) for job in page.items
            )
        except ClusterError as e:
            log.warning("jobs are shown as the catalog has them: %s", e)
            return page
        return page.model_copy(update={"items": tuple(job for job in settled if status in (None, job.status))})

    def parts(self, job: Job) -> tuple[Job, ...]:
        """Returns the jobs of the adapters that a job trains, updated as the job is; none of a job of one adapter."""
        found = self._open().jobs.parts(job.id)
        if all(part.has_ended for part in found):
            return found
        try:
            ray = self._server.find(job.id)
        except ClusterError as e:
            log.warning("the parts of job %s are shown as the catalog has them: %s", job.id, e)
            return found
        return self._settled(found, {} if ray is None else {job.id: ray})

    def stop(self, job_id: str) -> Job:
        """Stops a job that has not ended. Its status becomes stopped once its driver has ended. A part of a job is
        stopped here, which its driver sees; the others go on. Raises JobNotFound.
        """
        job = self.get(job_id)
        if job.has_ended:
            return job
        if job.part_of is not None:
            return self._open().jobs.end(job.id, "stopped", message="stopped; the others of its job go on")
        if self._server.find(job.id) is None:
            message = "recorded as stopped: this cluster does not know the job, so there was nothing to stop"
            return self._open().jobs.end(job.id, "stopped", message=message)
        self._server.stop(job.id)
        return self.get(job.id)

    def logs(self, job_id: str) -> Iterator[str]:
        """Returns the job's log so far, in pieces. Raises JobNotFound, or LogsGone if Ray no longer knows the job,
        before the first one.
        """
        job = self._with_logs(job_id)
        if job.part_of is None:
            return self._server.logs(job.id)
        return _lines_of(_name(job), self._server.logs(job.part_of))

    def tail(self, job_id: str, num_lines: int) -> str:
        """Returns the last lines of the job's log so far. Raises as `logs` does."""
        job = self._with_logs(job_id)
        if job.part_of is None:
            return self._server.tail(job.id, num_lines)
        lines = "".join(_lines_of(_name(job), iter([self._server.tail(job.part_of, _TAIL_OF_PARTS)])))
        return "".join(lines.splitlines(keepends=True)[-num_lines:])

    def follow(self, job_id: str) -> AsyncIterator[str]:
        """Yields the job's log in pieces, until the job ends. Raises as `logs` does, before the first piece."""
        job = self._with_logs(job_id)
        if job.part_of is None:
            return self._server.follow(job.id)
        return _follow_lines_of(_name(job), self._server.follow(job.part_of))

    def watch(self) -> None:
        """Notes that this cluster is there, and ends the jobs that are lost; called each half minute. Raises
        ClusterError and CatalogError.
        """
        self._open().jobs.record_cluster(self._server.cluster())
        self.settle_active()

    def settle_active(self) -> None:
        """Ends the jobs that have ended without telling the catalog, so that they do not count any more."""
        for status in _ACTIVE:
            self.page(_MOST_ACTIVE, None, status, None)

    def _with_logs(self, job_id: str) -> Job:
        """Returns a job whose log Ray has, or that of the job that it is a part of. Raises JobNotFound and LogsGone."""
        job = self._find(job_id)
        if self._server.find(job.part_of or job.id) is None:
            raise LogsGone(
                f"the log of job {job.id!r} ({job.status}) is gone: Ray keeps logs only while the cluster that the job "
                "ran on lives, and this cluster does not know the job"
            )
        return job

    def _settled(self, jobs: Sequence[Job], known: Mapping[str, RayJob]) -> tuple[Job, ...]:
        """Updates jobs by what Ray says of them, or of those that they are parts of."""
        return tuple(job if job.has_ended else self._settle(job, known.get(job.part_of or job.id)) for job in jobs)

    def _settle(self, job: Job, ray: RayJob | None) -> Job:
        """Updates a job that has not ended, as far as the catalog knows, from what Ray reports."""
        catalog = self._open()
        match ray.status if ray else None:
            case None if self._is_lost(job):
                return catalog.jobs.end(
                    job.id, "failed", message="the Ray cluster that it ran on is gone, or has forgotten it"
                )
            case "RUNNING" if job.status == "pending":
                return catalog.jobs.start(job.id)
            case "SUCCEEDED":
                return catalog.jobs.end(job.id, "succeeded")
            case "FAILED":
                assert ray is not None
                return catalog.jobs.end(job.id, "failed", message=ray.message)
            case "STOPPED":
                return catalog.jobs.end(job.id, "stopped", message="stopped")
        return job

    def _is_lost(self, job: Job) -> bool:
        """Says whether a job that Ray does not know must have died.

        False if another cluster with the same catalog may be running it, or if its driver was started by hand.
        """
        is_new = datetime.now(UTC) - job.created_at <= timedelta(seconds=_SUBMISSION_S)
        if is_new or job.actor == COMMAND_ACTOR:
            return False
        if self._settings.catalog.startswith("sqlite:"):  # the only machine that uses it
            return True
        if job.cluster is None:
            return False
        return job.cluster == self._server.cluster() or not self._open().jobs.is_cluster_there(job.cluster)

    def _find(self, job_id: str) -> Job:
        """Finds the caller's job that has this id, or for which the caller's tenant chose it. Raises JobNotFound."""
        catalog = self._open()
        with suppress(JobNotFound):
            return catalog.jobs.get(id_of(catalog.own_tenant, job_id))
        return catalog.jobs.get(job_id)

    def _is_known(self, job_id: str) -> bool:
        with suppress(JobNotFound):
            self._find(job_id)
            return True
        return False


def _name(job: Job) -> str:
    return split_qualified(job.name).name


def _is_of(name: str, line: str) -> bool:
    event = decode(line)
    return event is not None and adapter_of(event) == name


def _lines_of(name: str, pieces: Iterator[str]) -> Iterator[str]:
    """Yields the lines of a job's log that are events of one of its adapters."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        if found := [f"{line}\n" for line in lines if _is_of(name, line)]:
            yield "".join(found)


async def _follow_lines_of(name: str, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    rest = ""
    async for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        if found := [f"{line}\n" for line in lines if _is_of(name, line)]:
            yield "".join(found)


def id_of(tenant: str, chosen: str) -> str:
    """Ray's id of the job for which a client of `tenant` chose an id. Ray has one namespace: two tenants that choose
    the same have different ids, so that neither learns of the other's job, and no id that Ray or loray makes up is
    like these.
    """
    return f"{chosen}.{hashlib.sha256(f'{tenant}/{chosen}'.encode()).hexdigest()[:_NUM_ID_DIGITS]}"
