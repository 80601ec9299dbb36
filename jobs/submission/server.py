"""Ray's job server, of this process's cluster or of another one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import ray
from ray.job_submission import JobSubmissionClient

from jobs.submission.commands import Submission
from jobs.submission.tracker import RayJob
from loray.errors import ClusterError, ConflictError


class RayJobServer:
    """Connects on the first call that succeeds. `address` returns the dashboard's; by default the running cluster's."""

    def __init__(self, address: Callable[[], str] = lambda: str(ray.get_runtime_context().gcs_address)) -> None:
        self._address = address

    @property
    def address(self) -> str:
        """URL of the dashboard that answers. ClusterError if none does."""
        with _translate_errors():
            return str(self._client.get_address())

    def submit(self, job: Submission, job_id: str | None = None) -> str:
        with _translate_errors():
            return str(self._client.submit_job(submission_id=job_id, **job._asdict()))

    def find(self, job_id: str) -> RayJob | None:
        try:
            with _translate_errors():
                info = self._client.get_job_info(job_id)
        except _NoSuchJob:
            return None
        return RayJob(info.status.value, info.message or "")

    def has_running_jobs(self) -> bool:
        with _translate_errors():
            return any(not job.status.is_terminal() for job in self._client.list_jobs())

    def stop(self, job_id: str) -> None:
        with _translate_errors():
            self._client.stop_job(job_id)

    def logs(self, job_id: str) -> str:
        with _translate_errors():
            return str(self._client.get_job_logs(job_id))

    async def follow(self, job_id: str) -> AsyncIterator[str]:
        async for lines in self._client.tail_job_logs(job_id):
            yield lines

    @cached_property
    def _client(self) -> Any:
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it logs every closed socket
        return JobSubmissionClient(self._address())


class _NoSuchJob(ClusterError):
    pass


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Turns the errors of Ray's client into ours. It raises RuntimeError with the status and body of the response."""
    try:
        yield
    except RuntimeError as e:
        reason = str(e)
        if "status code 404" in reason:
            raise _NoSuchJob(reason) from e
        if "already exists" in reason:
            raise ConflictError("Ray has a job of this id already; choose another id, or leave it out") from e
        raise ClusterError(f"Ray's job server refused: {reason.strip().splitlines()[-1]}") from e
    except OSError as e:  # requests' errors are OSErrors
        raise ClusterError(f"Ray's job server cannot be reached: {e}") from e
