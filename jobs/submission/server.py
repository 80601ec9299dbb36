"""Ray's job server, at an address or this home's."""

from __future__ import annotations

import asyncio
import codecs
import io
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from itertools import chain
from typing import Any, Literal, NamedTuple

import httpx

from jobs.submission.commands import Submission
from loray.errors import ClusterError, ConflictError
from loray.local.cluster import current_cluster
from loray.locations import http_url
from loray.settings import Settings

AGENT_S = 120.0  # how long a submission waits for Ray's agent
TAIL_BYTES = 1 << 20  # of a log's end, whatever lines are asked for
PIECE_BYTES = 64 << 10
_ALL_LINES = -1  # as Ray says it
_MOST_BYTES = 32 << 20  # that are read for it: Ray counts lines, and a line may be long
_AGENT_RETRY_S = 1.0
_END_LOOK_S = 1.0  # between two looks whether a job that is followed has ended
_TAIL_TIMEOUT = httpx.Timeout(10.0, read=30.0)


RayStatus = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]


class RayJob(NamedTuple):
    """A job as Ray's job server reports it."""

    status: RayStatus
    message: str

    @property
    def has_ended(self) -> bool:
        return self.status not in ("PENDING", "RUNNING")


def _own_cluster() -> str:
    import ray  # takes longer than all else that commands import

    return str(ray.get_runtime_context().gcs_address)


class RayJobServer:
    """Every method raises ClusterError if Ray does not answer. Its client is imported by the first call that finds a
    cluster.

    `find_address` returns where the dashboard, or Ray, is, and is asked at each call: a cluster that starts again has
    another address. By default it is this process's cluster.
    """

    def __init__(self, find_address: Callable[[], str] = _own_cluster) -> None:
        self._find_address = find_address
        self._clients: dict[str, Any] = {}  # by address

    @property
    def address(self) -> str:
        """URL of the dashboard that answers. ClusterError if none does."""
        with _translate_errors():
            return str(self._client.get_address())

    def submit(self, job: Submission, job_id: str | None = None, is_wanted: Callable[[], bool] = lambda: True) -> str:
        """Submits a job, and returns its id, chosen by Ray if none is given. Waits for the head node's agent where it
        has not started yet: on a busy machine it comes a minute after the job server, which then has submitted nothing.

        `is_wanted` is asked before each try after a wait. ConflictError if Ray has a job with this id, or the job is
        not wanted any more.
        """
        deadline = time.monotonic() + AGENT_S
        while True:
            try:
                with _translate_errors():
                    return str(self._client.submit_job(submission_id=job_id, **job._asdict()))
            except _NoAgent:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_AGENT_RETRY_S)
            if not is_wanted():
                raise ConflictError("the job has ended before Ray's agent started: it was stopped, or given up")

    def cluster(self) -> str:
        """Names the cluster, by Ray's session: one that was started anew is another one."""
        with _translate_errors():
            client = self._client
            url, headers = f"{client.get_address()}/api/version", client._headers
            return str(httpx.get(url, headers=headers, timeout=_TAIL_TIMEOUT).raise_for_status().json()["session_name"])

    def find(self, job_id: str) -> RayJob | None:
        """Returns None if Ray does not know the job, not yet or no longer."""
        try:
            with _translate_errors():
                info = self._client.get_job_info(job_id)
        except _NoSuchJob:
            return None
        return _job(info)

    def find_all(self, job_ids: Collection[str]) -> dict[str, RayJob]:
        """Returns those of these jobs that Ray knows, by one request: Ray lists all jobs, or one."""
        if len(job_ids) == 1:
            (job_id,) = job_ids
            found = self.find(job_id)
            return {} if found is None else {job_id: found}
        wanted = set(job_ids)
        with _translate_errors():
            return {job.submission_id: _job(job) for job in self._client.list_jobs() if job.submission_id in wanted}

    def has_running_jobs(self) -> bool:
        with _translate_errors():
            return any(not job.status.is_terminal() for job in self._client.list_jobs())

    def stop(self, job_id: str) -> None:
        """Asks a job to stop, and returns before it has ended."""
        with _translate_errors():
            self._client.stop_job(job_id)

    def logs(self, job_id: str) -> Iterator[str]:
        """Returns the log in pieces of `PIECE_BYTES`, however long it is."""
        held = ExitStack()
        chunks = held.enter_context(self._log(job_id, _ALL_LINES))

        def pieces() -> Iterator[str]:
            with held:
                yield from codecs.iterdecode(chunks, "utf-8", errors="replace")

        return pieces()

    def tail(self, job_id: str, num_lines: int) -> str:
        """Returns the last lines of the log, and of many bytes the last."""
        with self._log(job_id, num_lines) as chunks:
            return _end_of(chunks).decode(errors="replace")

    async def follow(self, job_id: str) -> AsyncIterator[str]:
        """Yields the log in pieces, until the job ends. Ray's stream notices the end up to four seconds late, so that
        the job is looked at here, and the rest of its log read.
        """
        num_chars = 0
        async with aclosing(self._client.tail_job_logs(job_id)) as stream:
            piece = asyncio.ensure_future(anext(stream, None))
            try:
                while True:
                    await asyncio.wait([piece], timeout=_END_LOOK_S)
                    if piece.done():
                        if (lines := piece.result()) is None:
                            return
                        num_chars += len(lines)
                        yield lines
                        piece = asyncio.ensure_future(anext(stream, None))
                    elif await asyncio.to_thread(self._has_ended, job_id):
                        break
            finally:
                piece.cancel()
                await asyncio.gather(piece, return_exceptions=True)
        if rest := await asyncio.to_thread(self._log_after, job_id, num_chars):
            yield rest

    def _has_ended(self, job_id: str) -> bool:
        known = self.find(job_id)
        return known is not None and known.has_ended

    def _log_after(self, job_id: str, num_chars: int) -> str:
        """Returns the log but for its first characters, counted with line ends as Ray's stream has them."""
        line_ends, rest = io.IncrementalNewlineDecoder(None, translate=True), []
        for piece in chain(self.logs(job_id), [""]):
            text = line_ends.decode(piece, final=not piece)
            rest.append(text[num_chars:])
            num_chars = max(0, num_chars - len(text))
        return "".join(rest)

    @contextmanager
    def _log(self, job_id: str, num_lines: int) -> Iterator[Iterator[bytes]]:
        """Opens the last lines, by Ray's API of log files, which reads the file from its end. There are none until the
        driver has begun.
        """
        with _translate_errors():
            client = self._client
            node_id = client.get_job_info(job_id).driver_node_id
            if node_id is None:
                yield iter(())
                return
            asked = {"node_id": node_id, "submission_id": job_id, "lines": num_lines}
            url, headers = f"{client.get_address()}/api/v0/logs/file", client._headers
            with httpx.stream("GET", url, params=asked, headers=headers, timeout=_TAIL_TIMEOUT) as answer:
                if answer.status_code != 200:
                    raise RuntimeError(f"status code {answer.status_code}: {answer.read().decode(errors='replace')}")
                yield answer.iter_bytes(PIECE_BYTES)

    @property
    def _client(self) -> Any:
        address = self._find_address()
        if address not in self._clients:
            from ray.job_submission import JobSubmissionClient

            logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it logs every closed socket
            self._clients[address] = JobSubmissionClient(address)
        return self._clients[address]


class HomeJobServer(RayJobServer):
    """The job server of LORAY_ADDRESS, else of this home's cluster."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(lambda: http_url(self._address()))
        self._settings = settings

    def _address(self) -> str:
        if self._settings.address is not None:
            return self._settings.address
        cluster = current_cluster(self._settings.home)
        if cluster is None:
            raise ClusterError(
                "no Ray cluster runs on this machine, and this starts none; `loray train RECIPE` starts one and trains "
                "on it"
            )
        os.environ.update(cluster.client_env)  # Ray reads the cluster's token from there
        return cluster.address


def _job(info: Any) -> RayJob:
    return RayJob(info.status.value, info.message or "")


def _end_of(chunks: Iterable[bytes]) -> bytes:
    """Returns the last `TAIL_BYTES`, from the beginning of a line on. Raises ClusterError for too many in all."""
    kept, num_bytes = bytearray(), 0
    for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes > _MOST_BYTES:
            raise ClusterError(f"the last lines of the log have more than {_MOST_BYTES >> 20} MiB; `loray jobs logs`")
        kept += chunk
        del kept[: max(0, len(kept) - TAIL_BYTES)]
    return bytes(kept if num_bytes <= TAIL_BYTES else kept[kept.find(b"\n") + 1 :])


class _NoSuchJob(ClusterError):
    pass


class _NoAgent(ClusterError):
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
        if "No available agent" in reason:
            raise _NoAgent(
                f"Ray's job agent has not started in {AGENT_S:.0f} s: the machine is busy, or the agent has died (see "
                "`loray logs cluster`); try again"
            ) from e
        if "already exists" in reason:
            raise ConflictError("Ray has a job of this id already; choose another id, or leave it out") from e
        raise ClusterError(f"Ray's job server refused: {reason.strip().splitlines()[-1]}") from e
    except (OSError, httpx.HTTPError) as e:  # requests' errors are OSErrors
        raise ClusterError(f"Ray's job server cannot be reached: {e}") from e
