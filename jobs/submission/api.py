"""Jobs of a loray server at LORAY_URL, which submits them to its cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

from jobs.submission.tracker import RayJob, RayStatus
from loray.client import CatalogClient
from loray.errors import JobNotFound
from loray.spec import TrainSpec


class ApiJobServer:
    """What `loray train` needs of a job server, over the REST API. Raises the client's errors."""

    def __init__(self, url: str, client: CatalogClient | None = None) -> None:
        self.address = url
        self._client = client or CatalogClient(url)

    def submit(self, spec: TrainSpec, *, resume: bool) -> str:
        return self._client.submit(spec, resume=resume).id

    def find(self, job_id: str) -> RayJob | None:
        try:
            job = self._client.job(job_id)
        except JobNotFound:
            return None
        return RayJob(cast(RayStatus, job.status.upper()), job.message)

    async def follow(self, job_id: str) -> AsyncIterator[str]:
        """The log in whole lines, until the job ends. Blocks the event loop between them."""
        for line in self._client.follow(job_id):
            yield f"{line}\n"
