"""loray.client.catalog against the API in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from jobs.command import ApiJobServer
from jobs.submission.tracker import id_of
from loray.client import CatalogClient
from loray.errors import (
    CatalogError,
    ClusterError,
    GateRefused,
    JobNotFound,
    SpecError,
)
from loray.schemas.resources import RECIPE_EXAMPLE as RECIPE
from loray.spec import DEFAULT_TENANT, RopeParameters, TrainSpec
from tests.fixtures.api import Api
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.versions import BASE, digest, publish, vera_manifest


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = Api(tmp_path / "home", sqlite_catalog(tmp_path))
    yield api
    api.close()


@pytest.fixture
def client(api: Api) -> Iterator[CatalogClient]:
    with CatalogClient("http://test/", transport=api.transport) as client:
        yield client


def test_adapters_across_pages(api: Api, client: CatalogClient) -> None:
    api.catalog.bases.add("smollm2", BASE)
    names = [f"adapter-{i:03}" for i in range(103)]
    for name in names:
        publish(api.catalog, name, 1)
    assert [a.name for a in client.adapters(base="smollm2")] == names
    for number, key in ((3, 0), (4, 7)):
        api.catalog.adapters.register("adapter-000", digest(number), vera_manifest(number, key=key))
    (base,) = client.bases()
    assert (base.name, base.fingerprint) == ("smollm2", BASE)
    assert [(p.key, p.rank, p.canonical) for p in base.projections] == [(0, 256, True), (7, 256, False)]
    assert [a.name for a in client.adapters(method="vera")] == ["adapter-000"]
    assert client.adapter("adapter-000").versions == (3, 2, 1)
    assert [v.label for v in client.versions("adapter-000")] == [f"adapter-000@{n}" for n in (3, 2, 1)]
    assert client.version("adapter-000", 1).manifest.nbytes == 401
    assert client.placement("adapter-000").items == ()


def test_the_gates_refusal_comes_back_as_one(api: Api, client: CatalogClient, tmp_path: Path) -> None:
    rope = RopeParameters(rope_type="linear", rope_theta=1e5, factor=2)
    stored = api.store(1, tmp_path, method="longlora", rope_parameters=rope)
    client.register("long", stored)
    for ask in (lambda: client.register("long", stored, aliases=["prod"]), lambda: client.promote("long", "prod", 1)):
        with pytest.raises(GateRefused, match="alias 'prod' is refused to long@1"):
            ask()
    assert client.promote("long", "prod", 1, no_gate="a trial").version == 1


def test_jobs(api: Api, client: CatalogClient) -> None:
    spec = TrainSpec.parse(RECIPE, source="example")
    ids = [id_of(DEFAULT_TENANT, f"job-{i}") for i in (1, 2, 3)]
    job = client.submit(spec, id="job-1")
    assert (job.id, job.status, job.recipe, job.has_ended) == (ids[0], "pending", spec, False)
    client.submit(RECIPE | {"name": "other"}, id="job-2", resume=True)
    client.submit("name: third\nadapter: {method: vera}\ndata: {train: /d}\nbatch: {rows: 1}\n"
                  "optimizer: {learning_rate: 0.1}\nmax_steps: 1\n", id="job-3")  # fmt: skip
    assert [j.id for j in client.jobs(status="pending")] == ids[::-1]
    assert [j.id for j in client.jobs(name="other")] == [ids[1]]
    assert "--resume" in api.jobs.submitted[ids[1]].entrypoint
    assert list(client.follow("job-1")) == ["a", "b", "c"]
    assert client.logs("job-1") == f"log of {ids[0]}\n"
    assert client.stop("job-1").status == "pending"
    assert api.jobs.stopped == [ids[0]]
    with pytest.raises(SpecError, match=r"not valid\n  data: Field required"):
        client.submit({key: value for key, value in RECIPE.items() if key != "data"})
    api.jobs.jobs.clear()
    for call in (client.logs, lambda i: list(client.follow(i))):
        with pytest.raises(JobNotFound, match="Ray keeps logs only while"):
            call("job-1")
    with pytest.raises(JobNotFound, match="no job 'none'"):
        client.job("none")


def pieces(stream: AsyncIterator[str]) -> Iterator[str]:
    """Of a stream that awaits nothing: the API in this process runs in an event loop of its own."""
    while True:
        try:
            next(stream.__anext__().__await__())
        except StopIteration as piece:
            yield piece.value
        except StopAsyncIteration:
            return


def test_loray_train_follows_a_job_of_a_server(api: Api, client: CatalogClient) -> None:
    server = ApiJobServer("http://test", client)
    job = server.submit(TrainSpec.parse(RECIPE, source="example"), resume=True)
    assert "--resume" in api.jobs.submitted[job].entrypoint
    found = server.find(job)
    assert found is not None
    assert not found.has_ended
    assert list(pieces(server.follow(job))) == ["a\n", "b\n", "c\n"]
    assert server.find("none") is None


def test_servers_that_do_not_answer(tmp_path: Path) -> None:
    api = Api(tmp_path, "postgresql://nobody@127.0.0.1:1/none")
    with (
        CatalogClient(transport=api.transport, retry_s=0) as client,
        pytest.raises(CatalogError, match="cannot be used"),
    ):
        client.bases()
    for answer, match in [
        (httpx.Response(502, text="<html>bad gateway"), "HTTP 502: <html>bad gateway"),
        (httpx.Response(200, text="[]"), "not of this API"),
    ]:
        transport = httpx.MockTransport(lambda _, answer=answer: answer)  # type: ignore[misc]
        with CatalogClient(transport=transport, retry_s=0) as client, pytest.raises(ClusterError, match=match):
            client.alias("tone", "prod")
    nobody = CatalogClient("http://127.0.0.1:1", retry_s=0)
    with nobody as client, pytest.raises(ClusterError, match="no answer from"):
        list(client.follow("job-1"))
