"""Sampling by a Serve call: bytes from an actor, versions that are retired, replicas and gateways that die."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.exceptions import RayError

from jobs.sampling import Sampler
from loray.errors import AdapterGone, RequestError, SpecError
from loray.publishing import ephemeral
from loray.spec import ACTOR_NAMESPACE, GATEWAY, AdapterRef, SampleCall, SampleResult, SamplingParams, engine_of
from loray.store import NODE_CACHE_BYTES, AdapterCache
from serve_apps.deployment import ServeApi
from serve_apps.scaling import DemandRecords
from tests.fixtures.cluster import RayCluster, Served, deployed

pytestmark = pytest.mark.cluster

HOLDER = "holder"


class Run:
    """What a trainer publishes, step by step, and the calls of its rollouts."""

    def __init__(self, served: Served, folders: list[Path]) -> None:
        self._served = served
        self.published = [self._ephemeral(folder, step) for step, folder in enumerate(folders)]
        self.cache = AdapterCache(served.store, served.settings.home / "cache", NODE_CACHE_BYTES)

    def _ephemeral(self, folder: Path, step: int) -> tuple[AdapterRef, dict[str, bytes]]:
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = {name: (folder / name).read_bytes() for name in names}
        created_at = datetime(2026, 1, 1, tzinfo=UTC)
        return ephemeral(files, self._served.base, run="run", step=step, created_at=created_at)

    def call(self, step: int, **fields: Any) -> SampleCall:
        params = SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "seed": 1} | fields.pop("params", {}))
        given = {"base": self._served.base.name, "adapter": self.published[step][0], "params": params} | fields
        return SampleCall(prompt_ids=tuple(range(40)), **given)

    def sample(self, step: int, application: str = "loray", **fields: Any) -> SampleResult:
        return asyncio.run(Sampler(application).sample(self.call(step, **fields)))


@pytest.fixture(scope="module")
def run(served: Served, peft_folder: Callable[..., Path]) -> Run:
    return Run(served, [peft_folder(served.base, "lora", seed) for seed in range(4)])


@pytest.fixture
def holder(run: Run) -> Iterator[str]:
    class Holder:  # sent by value: other processes cannot import the tests
        def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
            self.files = files

        def give(self, digest: str) -> dict[str, bytes]:
            return self.files[digest]

    named = ray.remote(num_cpus=0)(Holder).options(name=HOLDER, namespace=ACTOR_NAMESPACE)
    actor = named.remote({ref.digest: files for ref, files in run.published})
    yield HOLDER
    ray.kill(actor)


def test_a_run_publishes_samples_and_retires(served: Served, run: Run, holder: str) -> None:
    (old, files), (new, _) = run.published[:2]
    with pytest.raises(AdapterGone, match=r"~run@0 \([0-9a-f]{12}\) is neither in this node's cache"):
        run.sample(0)
    with pytest.raises(AdapterGone, match="nor does nobody give it"):
        run.sample(0, holders=("nobody",))
    run.cache.put(old.digest, files)
    first, again = run.sample(0, num_samples=2, salt="a"), run.sample(0, num_samples=2, salt="b")
    assert (first.sequences[0].num_cached_tokens, first.sequences[1].num_cached_tokens) == (0, 32)
    assert first == again
    later = run.sample(1, holders=(holder,))  # it is in no cache
    assert later.sequences[0].logprobs != first.sequences[0].logprobs
    base = run.sample(0, adapter=None, params={"prompt_logprobs": 0})
    assert base.prompt_logprobs is not None
    assert len(base.prompt_logprobs) == 39

    cached = {path.name for path in (served.settings.home / "cache" / "adapters").iterdir()}
    assert {old.digest, new.digest} <= cached
    asyncio.run(Sampler().retire([old.digest, new.digest]))
    left = {path.name for path in (served.settings.home / "cache" / "adapters").iterdir()}
    assert cached - left == {old.digest, new.digest}
    with pytest.raises(AdapterGone):
        run.sample(0)
    assert run.sample(1, holders=(holder,)) == later  # a late call of a run finds its version as long as it is given

    status = httpx.get(f"{served.url}/status").text
    assert "~run" not in httpx.get(f"{served.url}/v1/models").text + status
    for model in ("~run", "~run@1"):
        answer = httpx.post(f"{served.url}/v1/completions", json={"model": model, "prompt": "a"})
        assert answer.status_code == 404
    record = DemandRecords("loray", engine_of(served.base.name)).read()
    assert record is None or not any(demand.ref.is_ephemeral for demand in record.adapters)


def test_wrong_calls_fail_as_in_the_gateway(run: Run) -> None:
    with pytest.raises(RequestError, match="ask for 1 to 1024"):
        run.sample(0, num_samples=0)
    with pytest.raises(SpecError, match="`loray up --base BASE` there first"):
        run.sample(0, "no-such-application")


# -- processes that die -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app(ray_cluster: RayCluster, served: Served) -> Iterator[Served]:
    with deployed(ray_cluster, served, "rollouts", num_replicas=2, num_gateways=1, max_num_seqs=8) as app:
        yield app


def pids(cluster: RayCluster, deployment: str) -> list[int]:
    applications = ServeApi(cluster.address)._details()["applications"]
    replicas = applications["rollouts"]["deployments"][deployment]["replicas"]
    return [r["pid"] for r in replicas if r["state"] == "RUNNING"]


def busy(app: Served) -> int | None:
    """The pid of a replica that has a request."""
    replicas = httpx.get(f"{app.url}/status").raise_for_status().json()["replicas"]
    return next((int(r["pid"]) for r in replicas if r["num_running"]), None)


@pytest.mark.slow
def test_answers_go_on_under_their_version_when_their_replica_dies(
    ray_cluster: RayCluster, app: Served, run: Run, holder: str
) -> None:
    asked: dict[str, Any] = {"num_samples": 4, "holders": (holder,), "params": {"max_tokens": 400}}
    expected = run.sample(2, "rollouts", **asked)

    async def killed() -> SampleResult:
        call = asyncio.create_task(Sampler("rollouts").sample(run.call(2, **asked)))
        while (pid := await asyncio.to_thread(busy, app)) is None:
            assert not call.done(), "it was over before a replica could be killed"
            await asyncio.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        return await call

    result = asyncio.run(killed())
    assert [s.token_ids for s in result.sequences] == [s.token_ids for s in expected.sequences]
    assert [s.logprobs for s in result.sequences] == [s.logprobs for s in expected.sequences]
    assert not app.catalog.quarantine.all()


@pytest.mark.slow
def test_a_call_whose_gateway_dies_is_sent_again(ray_cluster: RayCluster, app: Served, run: Run, holder: str) -> None:
    asked: dict[str, Any] = {"num_samples": 2, "holders": (holder,), "params": {"max_tokens": 400}}
    call, sampler = run.call(3, **asked), Sampler("rollouts")

    async def sample() -> tuple[SampleResult, SampleResult]:
        first = await sampler.sample(replace(call, salt="a"))
        (pid,) = pids(ray_cluster, GATEWAY)
        lost = asyncio.create_task(sampler.sample(call))
        while await asyncio.to_thread(busy, app) is None:
            await asyncio.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RayError):
            await lost
        deadline = time.monotonic() + 90
        while True:
            try:
                return first, await sampler.sample(call)
            except RayError:
                assert time.monotonic() < deadline

    first, again = asyncio.run(sample())
    assert [s.logprobs for s in first.sequences] == [s.logprobs for s in again.sequences]
