"""Jobs in the catalog, on both databases: told by an API server and by a driver, in any order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from loray.catalog import Catalog
from loray.errors import ConflictError, JobNotFound, SpecError
from loray.spec import TrainSpec
from tests.fixtures import recipes
from tests.fixtures.calls import at_once, refused

RECIPE = TrainSpec.parse(recipes.RECIPE | {"name": "tone"}, source="the test")


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    with closing(Catalog(url, actor="tester")) as catalog:
        yield catalog


def add(catalog: Catalog, job_id: str = "job-1", name: str = "tone") -> None:
    catalog.jobs.add(job_id, name=name, recipe=RECIPE.model_copy(update={"name": name}))


def test_a_job_from_its_submission_to_its_end(catalog: Catalog) -> None:
    before = catalog.change_counter()
    job = catalog.jobs.add("job-1", name="tone", recipe=RECIPE)
    assert (job.status, job.recipe, job.actor, job.message) == ("pending", RECIPE, "tester", "")
    assert (job.started_at, job.ended_at, job.version, job.has_ended) == (None, None, None, False)
    started = catalog.jobs.start("job-1")
    assert started.status == "running"
    assert started.started_at is not None
    ended = catalog.jobs.end("job-1", "succeeded", version=4)
    assert (ended.status, ended.version, ended.has_ended) == ("succeeded", 4, True)
    assert ended.ended_at is not None
    assert job.created_at <= started.started_at <= ended.ended_at
    assert catalog.jobs.get("job-1") == ended
    assert catalog.change_counter() == before  # serving has nothing to read again


def test_every_call_may_come_twice_and_late(catalog: Catalog) -> None:
    add(catalog)
    running = catalog.jobs.start("job-1")
    add(catalog)
    assert catalog.jobs.start("job-1") == running
    failed = catalog.jobs.end("job-1", "failed", message="no such base")
    assert catalog.jobs.end("job-1", "stopped", message="later") == failed
    assert catalog.jobs.start("job-1") == failed
    add(catalog)
    assert catalog.jobs.get("job-1") == failed
    refused(ConflictError, "trains 'tone', not 'other'", add, catalog, name="other")


def test_what_is_published_is_published(catalog: Catalog) -> None:
    """A driver out of reach was taken for dead, and then it ended well."""
    add(catalog)
    lost = catalog.jobs.end("job-1", "failed", message="the driver was lost")
    done = catalog.jobs.end("job-1", "succeeded", version=2)
    assert (done.status, done.version, done.message, done.ended_at) == ("succeeded", 2, "", lost.ended_at)
    assert catalog.jobs.end("job-1", "failed", message="no") == done
    assert catalog.jobs.end("job-1", "succeeded", version=3) == done


def test_jobs_that_are_none(catalog: Catalog) -> None:
    for call in (catalog.jobs.get, catalog.jobs.start, lambda i: catalog.jobs.end(i, "failed")):
        refused(JobNotFound, "no job 'job-9'", call, "job-9")
    for job_id in ("", "a b", "../a", "x" * 129):
        refused(SpecError, "not a valid job id", add, catalog, job_id)
    refused(SpecError, "not a valid adapter name", add, catalog, name="a@b")
    add(catalog)
    refused(SpecError, "'running' is not how a job ends", catalog.jobs.end, "job-1", "running")  # type: ignore[arg-type]


def test_pages_newest_first(catalog: Catalog) -> None:
    for i in range(5):
        add(catalog, f"job-{i}", "tone" if i % 2 else "other")
    catalog.jobs.start("job-3")
    page = catalog.jobs.page(limit=2)
    assert ([j.id for j in page.items], page.next) == (["job-4", "job-3"], "job-3")
    add(catalog, "job-5")  # what comes meanwhile moves no page
    page = catalog.jobs.page(limit=2, cursor=page.next)
    assert [j.id for j in page.items] == ["job-2", "job-1"]
    page = catalog.jobs.page(limit=2, cursor=page.next)
    assert ([j.id for j in page.items], page.next) == (["job-0"], None)
    assert [j.id for j in catalog.jobs.page(status="running").items] == ["job-3"]
    assert [j.id for j in catalog.jobs.page(name="tone", status="pending").items] == ["job-5", "job-1"]
    refused(SpecError, "is no cursor", catalog.jobs.page, cursor="job-99")


def test_server_and_driver_add_one_job_at_once(catalog: Catalog, url: str) -> None:
    def tell(i: int) -> str:
        with closing(Catalog(url)) as mine:
            mine.jobs.add("job-1", name="tone", recipe=RECIPE)
            mine.jobs.start("job-1")
            return mine.jobs.end("job-1", "succeeded", version=i + 1).status

    assert set(at_once(6, tell)) == {"succeeded"}
    assert len(catalog.jobs.page().items) == 1


def test_a_job_of_several_adapters_has_a_job_for_each(catalog: Catalog) -> None:
    add(catalog, "whole")
    recipes = {f"whole.{n}": RECIPE.model_copy(update={"name": name}) for n, name in enumerate(("acme", "globex"))}
    for _ in range(2):
        catalog.jobs.add_parts("whole", recipes)
    acme, globex = catalog.jobs.parts("whole")
    assert (acme.name, acme.part_of, acme.status, acme.recipe) == ("acme", "whole", "running", recipes["whole.0"])
    assert not catalog.jobs.parts("whole.0")
    assert not catalog.jobs.ended_parts("whole")
    catalog.jobs.end(globex.id, "stopped", message="by hand")
    assert catalog.jobs.ended_parts("whole") == {globex.id}
    assert [job.id for job in catalog.jobs.page(name="acme").items] == ["whole.0"]
    assert len(catalog.jobs.page().items) == 3
    catalog.jobs.add("other", name="tone", recipe=RECIPE, max_jobs=2, max_workers=2)  # parts do not count
    refused(JobNotFound, "", catalog.jobs.add_parts, "nobody", recipes)
