"""What a training job's events tell, in the words of OpenAI's fine-tuning: events, figures, the published version."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from datetime import datetime
from threading import Lock
from typing import Any, Literal, NamedTuple

from jobs.events import Event, decode, in_words
from jobs.runs.history import RunEvents
from loray.catalog import Job
from loray.errors import StoreError
from loray.schemas.openai.fine_tuning import CheckpointMetrics, FineTuningCheckpoint, FineTuningEvent
from loray.telemetry import get_logger

_MOST_EVENTS = 5000  # of a job that are kept, the last ones
_UNTOLD = frozenset({"samples", "published"})  # long texts; and what the job's own end says
_WARNINGS = frozenset({"warning", "worker_lost"})

_log = get_logger(__name__)


class Progress(NamedTuple):
    """`step`: the event of the last step, None before the first. `events`: oldest first. `checkpoint`: the version that
    was published.
    """

    has_begun: bool
    step: dict[str, Any] | None
    events: list[FineTuningEvent]
    checkpoint: FineTuningCheckpoint | None


class JobProgress:
    """Reads one job's events, each once. Thread-safe."""

    def __init__(self, run: RunEvents) -> None:
        self._run, self._lock = run, Lock()
        self._published: dict[str, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        self._events = deque[FineTuningEvent](maxlen=_MOST_EVENTS)
        self._num_events = 0
        self._has_begun = False
        self._step: dict[str, Any] | None = None

    def look(self, job: Job, model: str | None) -> Progress:
        """`model`: by which name the caller can ask for what the job has published. What cannot be read is left out."""
        with self._lock:
            try:
                self._read(job)
                if self._published is None and job.version is not None:
                    self._published = self._run.published()
            except StoreError as e:
                _log.warning("the events of job %s are not shown: %s", job.id, e)
            events = [*_first(job), *self._events, *_last(job, model)]
            checkpoint = None if model is None else self._checkpoint(job, model)
            return Progress(self._has_begun, self._step, events, checkpoint)

    def _read(self, job: Job) -> None:
        found = self._run.read()
        if found.is_anew:
            self._begin()
        began_at = job.started_at or job.created_at
        for line in found.lines:
            event = decode(line)
            if event is not None:
                self._take(job.id, event, dict(event), began_at)

    def _take(self, job_id: str, event: Event, fields: dict[str, Any], began_at: datetime) -> None:
        kind, step = fields.get("event"), fields.get("step")
        self._has_begun |= kind in ("start", "step")
        data: dict[str, Any] = {}
        if kind == "step" and isinstance(step, int):
            self._step = fields
            data = {"step": step, "train_loss": fields.get("loss"), "total_steps": fields.get("num_steps")}
            data["learning_rate"] = fields.get("lr")
        elif kind == "rollout" and isinstance(metrics := fields.get("metrics"), dict):
            data = {
                "step": step,
                "train_reward_mean": metrics.get("reward_mean"),
                "total_steps": fields.get("num_steps"),
            }
        elif kind == "eval" and "reward" in fields:
            data = {"step": step, "valid_reward_mean": fields["reward"]}
        elif kind == "eval" and fields.get("subject") == "adapter" and isinstance(step, int):
            data = {"step": step, "valid_loss": fields.get("eval_loss")}
        elif kind in _UNTOLD or kind == "eval" or (kind == "progress" and fields.get("done")):
            return
        at = fields.get("time")
        self._num_events += 1
        self._events.append(
            FineTuningEvent(
                id=f"ftevent-{self._num_events}-{job_id}",
                created_at=int(at if isinstance(at, int | float) else began_at.timestamp()),
                level="warn" if kind in _WARNINGS else "error" if kind == "error" else "info",
                message=in_words(event),
                type="metrics" if data else "message",
                data=data,
            )
        )

    def _checkpoint(self, job: Job, model: str) -> FineTuningCheckpoint | None:
        event = self._published
        if event is None or event.get("version") != job.version or job.ended_at is None:
            return None
        step = int(event.get("step", 0))
        told = {e.data["step"]: e.data for e in self._events if "train_loss" in e.data}
        losses = [e for e in event.get("evaluations", ()) if (e["metric"], e["subject"]) == ("loss", "adapter")]
        metrics = CheckpointMetrics(
            step=step,
            train_loss=told.get(step, {}).get("train_loss"),
            valid_loss=losses[-1]["value"] if losses else None,
        )
        return FineTuningCheckpoint(
            id=f"ftckpt-{job.version}-{job.id}",
            created_at=int(job.ended_at.timestamp()),
            fine_tuned_model_checkpoint=model,
            fine_tuning_job_id=job.id,
            step_number=step,
            metrics=metrics,
        )


def _first(job: Job) -> Iterator[FineTuningEvent]:
    yield _of_job(job, "created", job.created_at, f"Created fine-tuning job: {job.id}")
    if job.started_at is not None:
        yield _of_job(job, "started", job.started_at, "Fine-tuning job started; its files are read")


def _last(job: Job, model: str | None) -> Iterator[FineTuningEvent]:
    if job.ended_at is None:
        return
    if job.status == "succeeded":
        if model is not None:
            yield _of_job(job, "published", job.ended_at, f"New fine-tuned model created: {model}")
        yield _of_job(job, "ended", job.ended_at, "The job has successfully completed")
    elif job.status == "failed":
        yield _of_job(job, "ended", job.ended_at, job.message or "The job has failed", "error")
    else:
        yield _of_job(job, "ended", job.ended_at, "The job was cancelled", "warn")


def _of_job(
    job: Job, what: str, at: datetime, message: str, level: Literal["info", "warn", "error"] = "info"
) -> FineTuningEvent:
    return FineTuningEvent(
        id=f"ftevent-{what}-{job.id}",
        created_at=int(at.timestamp()),
        level=level,
        message=message,
        type="message",
        data={},
    )
