"""Which job of several adapters goes on, and with which runs."""

from __future__ import annotations

import pytest

from jobs.many.resume import begun, read_shares, write_shares
from jobs.runs.folders import PART_OF, open_runs
from jobs.runs.history import PUBLISHED
from loray.errors import SpecError
from loray.settings import Settings


def test_the_last_job_of_the_adapters_goes_on(settings: Settings) -> None:
    runs = open_runs(settings)

    def begin(name: str, job: str) -> str:
        run = runs.new(name, f"{job}.1")
        run.write(PART_OF, job.encode())
        return run.path.removeprefix(f"{runs.root}/")

    for name in ("acme", "globex", "initech"):
        begin(name, "old/1")
    acme, globex = begin("acme", "tone/2"), begin("globex", "tone/2")
    assert begun(["acme", "globex", "fresh"], "default", runs) == ("tone/2", {"acme": acme, "globex": globex})
    with pytest.raises(SpecError, match=r"begun by different jobs \(acme in tone/2; initech in old/1\)"):
        begun(["acme", "initech"], "default", runs)
    with pytest.raises(SpecError, match="nothing to go on with"):
        begun(["fresh"], "default", runs)
    runs.new("globex", "alone").write(PUBLISHED, b"{}")  # trained alone since
    assert begun(["acme", "globex"], "default", runs) == ("tone/2", {"acme": acme})


def test_adapters_keep_their_share(settings: Settings) -> None:
    folder = open_runs(settings, "many").new("tone", "job")
    assert read_shares(folder) == {}
    write_shares(folder, {"share_1": ["acme", "globex"]})
    assert read_shares(folder) == {"share_1": ("acme", "globex")}
