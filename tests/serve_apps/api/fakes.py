"""The catalog's API in this process, without Ray: with a scripted job server and scripted replicas."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.submission.commands import Submission
from jobs.submission.tracker import RayJob, RayStatus
from loray.adapters.manifest import manifest_json, write_manifest
from loray.catalog import Catalog
from loray.errors import ClusterError, ConflictError
from loray.schemas.status import AdapterPlacement
from loray.settings import Settings
from serve_apps.api.services import Services
from serve_apps.api.site import create_app
from serve_apps.auth import Authenticator
from serve_apps.console import GatewayClient
from tests.fixtures.versions import manifest
from tests.serve_apps.keys import access_of

JSON = {"Content-Type": "application/json"}  # else a form could have sent it


@dataclass
class FakeJobs:
    """A scripted job server. `uploaded`: files of a job's folder by name. `down`: it does not answer. `num_asked`:
    times it was asked for jobs.
    `while_waiting`: called by a submission, as if Ray's agent had not started."""

    jobs: dict[str, RayJob] = field(default_factory=dict)
    submitted: dict[str, Submission] = field(default_factory=dict)
    uploaded: dict[str, dict[str, str]] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    down: bool = False
    name: str = "session_1"
    num_asked: int = 0
    while_waiting: Callable[[str], None] | None = None

    def submit(self, job: Submission, job_id: str | None = None, is_wanted: Callable[[], bool] = lambda: True) -> str:
        assert job_id is not None
        self._check()
        if self.while_waiting is not None:
            self.while_waiting(job_id)
            if not is_wanted():
                raise ConflictError("the job has ended")
        if job_id in self.jobs:
            raise ConflictError("Ray has a job of this id")
        self.submitted[job_id] = job
        if "working_dir" in job.runtime_env:
            folder = Path(job.runtime_env["working_dir"])
            self.uploaded[job_id] = {path.name: path.read_text() for path in folder.iterdir()}
        self.jobs[job_id] = RayJob("PENDING", "")
        return job_id

    def cluster(self) -> str:
        self._check()
        return self.name

    def find(self, job_id: str) -> RayJob | None:
        return self.find_all([job_id]).get(job_id)

    def find_all(self, job_ids: Collection[str]) -> dict[str, RayJob]:
        self._check()
        self.num_asked += 1
        return {job_id: self.jobs[job_id] for job_id in job_ids if job_id in self.jobs}

    def stop(self, job_id: str) -> None:
        self._check()
        self.stopped.append(job_id)

    def logs(self, job_id: str) -> Iterator[str]:
        self._check()
        return iter((f"log of {job_id}", "\n"))

    def tail(self, job_id: str, num_lines: int) -> str:
        return "".join("".join(self.logs(job_id)).splitlines(keepends=True)[-num_lines:])

    async def follow(self, job_id: str) -> AsyncIterator[str]:
        for piece in ("a\n", "b", "\nc\n"):
            yield piece

    def say(self, job_id: str, status: RayStatus, message: str = "") -> None:
        self.jobs[job_id] = RayJob(status, message)

    def _check(self) -> None:
        if self.down:
            raise ClusterError("Ray's job server cannot be reached: refused")


@dataclass
class FakePlacements:
    found: list[AdapterPlacement] = field(default_factory=list)

    async def adapters(self, digests: list[str]) -> list[AdapterPlacement]:
        return [placement for placement in self.found if placement.digest in digests]


class Api:
    """The API and its services. `http` is a client of it, with the paths of a deployment, /api/v1/…"""

    def __init__(self, home: Path, catalog_url: str, access: Authenticator | None = None) -> None:
        self.settings = Settings.from_env({"LORAY_HOME": str(home), "LORAY_CATALOG": catalog_url})
        self.jobs, self.placements = FakeJobs(), FakePlacements()
        self.services = Services(self.settings, self.jobs, self.placements, GatewayClient("http://127.0.0.1:9"))
        self.access = access or access_of(catalog_url)
        self.unmounted = create_app(self.services, self.access)
        self.app = mounted(self.unmounted)
        self.transport = InProcess(self.app)
        self.http = httpx.Client(transport=self.transport, base_url="http://test/api/v1", headers=JSON)

    @property
    def catalog(self) -> Catalog:
        return self.services.catalog

    def store(self, number: int, tmp_path: Path, **fields: Any) -> str:
        """Puts an adapter into the store, but not into the catalog. Returns its digest."""
        folder = tmp_path / f"adapter-{number}"
        folder.mkdir()
        data = f"weights {number}".encode()
        (folder / "adapter_model.safetensors").write_bytes(data)
        files = {"adapter_model.safetensors": hashlib.sha256(data).hexdigest()}
        described = manifest(number).model_copy(update={"files": files} | fields)
        write_manifest(folder, manifest_json(described))
        return self.services.store.put(folder)

    def close(self) -> None:
        self.http.close()
        self.access.close()
        self.services.close()


def mounted(app: ASGIApp) -> ASGIApp:
    """The application behind its route prefix, as Serve calls it."""

    async def prefixed(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": "/api/v1"} if scope["type"] == "http" else scope, receive, send)

    return prefixed


class InProcess(httpx.BaseTransport):
    """A transport from httpx's synchronous client to an ASGI application, in an event loop for all of them."""

    def __init__(self, app: ASGIApp) -> None:
        self._asgi = httpx.ASGITransport(app, raise_app_exceptions=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def send() -> httpx.Response:
            body = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
            response = await self._asgi.handle_async_request(body)
            content = await response.aread()
            return httpx.Response(response.status_code, headers=response.headers, content=content)

        return asyncio.run_coroutine_threadsafe(send(), _loop()).result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="asgi", daemon=True).start()
    return loop
