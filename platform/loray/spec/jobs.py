"""The status of a training job, as the catalog records it."""

from __future__ import annotations

from typing import Literal

JobStatus = Literal["pending", "running", "succeeded", "failed", "stopped"]
EndStatus = Literal["succeeded", "failed", "stopped"]


def has_ended(status: JobStatus) -> bool:
    return status not in ("pending", "running")
