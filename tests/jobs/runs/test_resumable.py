"""Which run `--resume` goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.runs.folders import PUBLISHED, SNAPSHOT, open_runs
from loray.errors import SpecError
from loray.settings import Settings


def test_a_run_that_ended_before_its_first_checkpoint_does_not_hide_the_one_before(tmp_path: Path) -> None:
    runs = open_runs(Settings.from_env({"LORAY_HOME": str(tmp_path)}))
    with pytest.raises(SpecError, match=r"no run of 'arithmetic'"):
        runs.resumable("arithmetic")
    begun, saved = runs.new("arithmetic", "job-1"), runs.new("arithmetic", "job-2")
    assert runs.resumable("arithmetic") == saved  # neither has a checkpoint
    begun.write(SNAPSHOT, b"{}")
    assert runs.resumable("arithmetic") == begun
    begun.write(PUBLISHED, b"{}")
    assert runs.resumable("arithmetic") == saved  # the other one has ended
    assert runs.latest("arithmetic") == saved
