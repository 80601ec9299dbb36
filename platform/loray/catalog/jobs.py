"""The catalog's operations on training jobs: recipe, actor and outcome are kept when the Ray cluster is gone.

The API server adds a job before it submits it, and the job's driver records its start and its end. A job that was not
submitted through the API is added by its driver. So each method may be called twice, and in any order.

A job that trains several adapters has a further one for each of them, `part_of` it: its driver adds them, and whoever
stops one of them ends it here, where the driver looks.

A job belongs to the tenant that added it, and exists for that tenant and administrators alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, get_args

import sqlalchemy as sa

from loray.catalog.audit_chain import log
from loray.catalog.database import Database, upsert
from loray.catalog.entries import Job, check_job_id, check_name, check_qualified
from loray.catalog.queries import newest, now
from loray.catalog.schema import clusters, jobs
from loray.errors import ConflictError, IntegrityError, JobNotFound, RateLimited, SpecError
from loray.schemas.resources import Page
from loray.spec import EndStatus, JobStatus, Principal, TrainSpec, qualified_name, split_qualified

_CLUSTER_IS_GONE = timedelta(minutes=2)
_ACTIVE = ("pending", "running")
_RETRY_S = 60.0  # after which a job may have ended


@dataclass
class Jobs:
    """The catalog's operations on jobs. They do not count as changes, since serving does not depend on them."""

    db: Database

    def add(
        self,
        job_id: str,
        *,
        name: str,
        recipe: TrainSpec,
        max_jobs: int | None = None,
        max_workers: int | None = None,
        cluster: str | None = None,
    ) -> Job:
        """Add a pending job, which is for this Ray cluster. A job that has this id already does not change; it keeps
        its tenant.

        Raises SpecError where id or name are malformed, and ConflictError where another job has the id,
        and RateLimited where the tenant would have more jobs, or workers of jobs, at once than these.
        """
        check_job_id(job_id)
        check_name(name)
        principal, tenant = self.db.principal, self.db.principal.tenant
        check_qualified(qualified_name(tenant, name))
        with self.db.changing() as c:
            known = _find(c, principal, job_id)
            if known is not None:
                if known.recipe.name != recipe.name:
                    raise ConflictError(f"job {job_id!r} trains {known.name!r}, not {name!r}; choose another id")
                return known
            if c.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id)).first() is not None:
                raise ConflictError(f"the id {job_id!r} is taken; choose another one")
            _refuse_more(c, tenant, recipe.num_workers, max_jobs, max_workers)
            row: dict[str, Any] = {"id": job_id, "name": name, "recipe": recipe.model_dump_json(), "status": "pending"}
            row |= {"message": "", "actor": self.db.actor, "tenant": tenant, "cluster": cluster}
            c.execute(jobs.insert().values(row | {"created_at": now()}))
            log(c, self.db.actor, "add_job", job_id, tenant=tenant, name=name)
            return _get(c, principal, job_id)

    def add_parts(self, job_id: str, parts: Mapping[str, TrainSpec]) -> None:
        """Add a running job for each adapter that the job trains, by its id; those that are there do not change. Raises
        SpecError where an id is malformed, and JobNotFound.
        """
        for part, recipe in parts.items():
            check_job_id(part)
            check_name(recipe.name)
        with self.db.changing() as c:
            whole = _get(c, self.db.principal, job_id)
            known = set(c.execute(sa.select(jobs.c.id).where(jobs.c.part_of == job_id)).scalars())
            common: dict[str, Any] = {
                "status": "running",
                "message": "",
                "actor": self.db.actor,
                "tenant": whole.tenant,
            }
            common |= {"cluster": whole.cluster, "part_of": job_id, "created_at": now(), "started_at": now()}
            rows = [
                {"id": part, "name": recipe.name, "recipe": recipe.model_dump_json()} | common
                for part, recipe in parts.items()
                if part not in known
            ]
            if rows:
                c.execute(jobs.insert(), rows)
                log(c, self.db.actor, "add_parts", job_id, tenant=whole.tenant, num=len(rows))

    def parts(self, job_id: str) -> tuple[Job, ...]:
        """The jobs of the adapters that a job trains, in their order; none of a job of one adapter."""
        mine = (_owned(self.db.principal), jobs.c.part_of == job_id)
        with self.db.reading() as c:
            return tuple(map(_job, c.execute(sa.select(jobs).where(*mine).order_by(jobs.c.name))))

    def ended_parts(self, job_id: str) -> frozenset[str]:
        """The ids of those that have ended, or were stopped."""
        ended = (jobs.c.part_of == job_id, jobs.c.status.not_in(_ACTIVE))
        with self.db.reading() as c:
            return frozenset(c.execute(sa.select(jobs.c.id).where(_owned(self.db.principal), *ended)).scalars())

    def start(self, job_id: str) -> Job:
        """Change the status from pending to running; other jobs do not change. Raises JobNotFound."""
        with self.db.changing() as c:
            if _get(c, self.db.principal, job_id).status == "pending":
                _update(c, job_id, status="running", started_at=now())
            return _get(c, self.db.principal, job_id)

    def end(self, job_id: str, status: EndStatus, *, message: str = "", version: int | None = None) -> Job:
        """Record the end of a job, with the version that it published, or a message that says why it did not.

        A job that has ended changes only to succeeded: a job that was recorded as failed while its driver could not be
        reached may have published after all. Raises JobNotFound or SpecError.
        """
        if status not in get_args(EndStatus):
            raise SpecError(f"{status!r} is not how a job ends: {', '.join(get_args(EndStatus))}")
        with self.db.changing() as c:
            job = _get(c, self.db.principal, job_id)
            if not job.has_ended or (status == "succeeded" and job.version is None):
                ended = {"status": status, "message": message, "version": version, "ended_at": job.ended_at or now()}
                _update(c, job_id, **ended)
                log(c, self.db.actor, "end_job", job_id, tenant=job.tenant, status=status, version=version)
            return _get(c, self.db.principal, job_id)

    def record_cluster(self, cluster: str) -> None:
        """Record that the Ray cluster is there: whoever follows its jobs says so each half minute."""
        with self.db.writing() as c:
            upsert(c, clusters, [{"id": cluster, "seen_at": now()}])

    def is_cluster_there(self, cluster: str) -> bool:
        """The cluster was noted within two minutes."""
        seen = sa.select(clusters.c.id).where(clusters.c.id == cluster, clusters.c.seen_at > now() - _CLUSTER_IS_GONE)
        with self.db.reading() as c:
            return c.execute(seen).first() is not None

    def get(self, job_id: str) -> Job:
        """One job. Raises JobNotFound."""
        with self.db.reading() as c:
            return _get(c, self.db.principal, job_id)

    def page(
        self, *, limit: int = 100, cursor: str | None = None, status: JobStatus | None = None, name: str | None = None
    ) -> Page[Job]:
        """At most `limit` jobs, newest first, after `cursor`, the `next` of a page. Raises SpecError.

        `name` is an adapter of the own tenant, or `tenant/name`.
        """
        wanted: dict[str, Any] = {"status": status}
        if name is not None:
            tenant, bare = split_qualified(name)
            wanted |= {"name": bare, "tenant": self.db.principal.tenant if tenant is None else tenant}
        with self.db.reading() as c:
            rows, last = newest(c, jobs, _owned(self.db.principal), wanted, cursor, limit)
        return Page(items=tuple(map(_job, rows)), next=last)


def _owned(principal: Principal) -> sa.ColumnElement[bool]:
    """The jobs that exist for this caller."""
    return sa.true() if principal.is_admin else jobs.c.tenant == principal.tenant


def _refuse_more(
    c: sa.Connection, tenant: str, num_workers: int, max_jobs: int | None, max_workers: int | None
) -> None:
    if max_jobs is None and max_workers is None:
        return
    is_whole = jobs.c.part_of.is_(None)  # parts run on its workers
    active = sa.select(jobs).where(jobs.c.tenant == tenant, jobs.c.status.in_(_ACTIVE), is_whole)
    recipes = [_job(row).recipe for row in c.execute(active)]
    if max_jobs is not None and len(recipes) >= max_jobs:
        raise RateLimited(
            f"tenant {tenant} has {len(recipes)} jobs that have not ended, and at most {max_jobs} are allowed at once: "
            "wait for one, or stop it",
            _RETRY_S,
        )
    busy = sum(recipe.num_workers for recipe in recipes)
    if max_workers is not None and busy + num_workers > max_workers:
        raise RateLimited(
            f"the job asks for {num_workers} workers; tenant {tenant} has jobs with {busy}, and at most {max_workers} "
            "are allowed at once: wait for one to end, or ask for fewer",
            _RETRY_S,
        )


def _find(c: sa.Connection, principal: Principal, job_id: str) -> Job | None:
    row = c.execute(sa.select(jobs).where(_owned(principal), jobs.c.id == job_id)).first()
    return None if row is None else _job(row)


def _get(c: sa.Connection, principal: Principal, job_id: str) -> Job:
    job = _find(c, principal, job_id)
    if job is None:
        raise JobNotFound(f"no job {job_id!r} in the catalog; `loray jobs ls` or `GET /api/v1/jobs` lists them")
    return job


def _update(c: sa.Connection, job_id: str, **values: Any) -> None:
    c.execute(jobs.update().where(jobs.c.id == job_id).values(values))


def _job(row: sa.Row[Any]) -> Job:
    fields = row._asdict()
    try:
        recipe = TrainSpec.model_validate_json(fields["recipe"])
    except ValueError as e:
        raise IntegrityError(f"the recipe of job {row.id} in the catalog cannot be read; a later loray wrote it") from e
    name = qualified_name(fields["tenant"], fields["name"])
    return Job(**fields | {"name": name, "recipe": recipe})
