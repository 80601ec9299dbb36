"""The driver's record in the catalog: that the job runs and how it ended, also if a signal stops it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from jobs.events import Emit, first_line
from loray.catalog import Catalog
from loray.errors import LorayError
from loray.spec import EndStatus, TrainSpec
from loray.telemetry import get_logger

log = get_logger(__name__)

_STOPPED = 143  # the exit code that a shell reports for a process ended by SIGTERM


class Interrupted(KeyboardInterrupt):
    """The driver must end now.

    It is a KeyboardInterrupt because Ray swallows any other exception that a signal handler raises during `ray.get`.
    `ray.get` raises a plain KeyboardInterrupt instead; `recorded` restores the reason.
    """


class Interrupts:
    """Raises Interrupted in the main thread on SIGTERM, which `ray job stop` sends, and on `raise_in_main_thread`."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def __enter__(self) -> Interrupts:
        self._before = signal.getsignal(signal.SIGTERM)
        self.arm()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def arm(self) -> None:
        """Installs the signal handler. Must be called again after `ray.init`, which replaces the handler."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def raise_in_main_thread(self, reason: str) -> None:
        """Can be called from any thread."""
        self._reason = reason
        interrupt_main(signal.SIGTERM)

    def interrupted(self) -> Interrupted:
        return Interrupted(self._reason or "interrupted; go on from the last checkpoint with --resume")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or "stopped by SIGTERM; go on from the last checkpoint with --resume"
        raise self.interrupted()


@contextmanager
def reported(emit: Emit) -> Iterator[None]:
    """Emits an error that leaves the `with` block as an event, and exits with 1, or with 143 after SIGTERM."""
    code = 1
    try:
        yield
    except LorayError as e:
        emit({"event": "error", "kind": type(e).__name__, "message": str(e)})
    except Interrupted as e:
        emit({"event": "error", "kind": "Interrupted", "message": str(e)})
        code = _STOPPED
    except Exception as e:
        log.debug("unexpected error", exc_info=True)
        message = f"{first_line(e)} (LORAY_LOG_LEVEL=DEBUG shows where)"
        emit({"event": "error", "kind": type(e).__name__, "message": message})
    else:
        return
    sys.exit(code)


class JobRecord:
    """One job in the catalog. A catalog that cannot be reached does not end the training."""

    def __init__(self, catalog: Catalog, job_id: str, interrupts: Interrupts) -> None:
        self._catalog = catalog
        self.job_id, self.interrupts = job_id, interrupts

    def end(self, status: EndStatus, *, message: str = "", version: int | None = None) -> None:
        """Records how the job ended. The catalog keeps the first end."""
        try:
            self._catalog.jobs.end(self.job_id, status, message=message, version=version)
        except LorayError as e:
            log.warning("the end of job %s (%s) is not recorded: %s", self.job_id, status, e)

    def stop(self) -> NoReturn:
        """Records that the job was interrupted, at once: `ray job stop` kills a driver that ends slowly. Raises
        Interrupted.
        """
        interrupted = self.interrupts.interrupted()
        self.end("stopped", message=str(interrupted))
        raise interrupted from None


@contextmanager
def recorded(catalog: Catalog, spec: TrainSpec) -> Iterator[JobRecord]:
    """Records the job as running for the `with` block, which SIGTERM interrupts, and as stopped or failed if the block
    raises. A KeyboardInterrupt leaves it as Interrupted.

    The block itself records success.
    """
    with Interrupts() as interrupts:
        record = JobRecord(catalog, submission_id() or f"run_{secrets.token_hex(8)}", interrupts)
        catalog.jobs.add(record.job_id, name=spec.name, recipe=spec)
        catalog.jobs.start(record.job_id)
        try:
            yield record
        except Interrupted as e:
            record.end("stopped", message=str(e))
            raise
        except KeyboardInterrupt:
            record.stop()
        except BaseException as e:
            record.end("failed", message=str(e) or type(e).__name__)
            raise


def submission_id() -> str | None:
    """Ray's id of this job; None if the driver does not run as a Ray job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submission: str | None = job.get("metadata", {}).get("job_submission_id")
    return submission
