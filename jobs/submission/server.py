"""Ray's job server, of this process's cluster or of another one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import ray
from ray.job_submission import JobSubmissionClient

from jobs.submission.submission import Submission
from jobs.submission.tracker import RayJob
from loray.errors import ClusterError, ConflictError


class RayJobServer:
    """Connects at the first call that succeeds. `address`: of the dashboard; the running cluster's by default."""

    def __init__(self, address: Callable[[], str] = lambda: str(ray.get_runtime_context().gcs_address)) -> None:
        self._address = address

    @property
    def address(self) -> str:
        """Of the dashboard that was found. ClusterError where none answers."""
        with _clear_errors():
            return str(self._client.get_address())

    def submit(self, job: Submission, job_id: str | None = None) -> str:
        with _clear_errors():
            return str(self._client.submit_job(submission_id=job_id, **job._asdict()))

    def find(self, job_id: str) -> RayJob | None:
        try:
            with _clear_errors():
                info = self._client.get_job_info(job_id)
        except _NoSuchJob:
            return None
        return RayJob(info.status.value, info.message or "")

    def has_running_jobs(self) -> bool:
        with _clear_errors():
            return any(not job.status.is_terminal() for job in self._client.list_jobs())

    def stop(self, job_id: str) -> None:
        with _clear_errors():
            self._client.stop_job(job_id)

    def logs(self, job_id: str) -> str:
        with _clear_errors():
            return str(self._client.get_job_logs(job_id))

    async def follow(self, job_id: str) -> AsyncIterator[str]:
        async for lines in self._client.tail_job_logs(job_id):
            yield lines

    @cached_property
    def _client(self) -> Any:
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it announces closed sockets
        return JobSubmissionClient(self._address())


class _NoSuchJob(ClusterError):
    pass


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Ray's client raises RuntimeError with the status and the body of whatever the server answers."""
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
