"""Publication in bulk: of several adapters that have ended, each by itself published, refused, or without a result."""

from __future__ import annotations

from pathlib import Path

from jobs.many.publication import Outcome, Publisher, Ready
from jobs.runs.folders import RunFolder, name_of
from jobs.workers.many import ENDED, EndedRun
from loray.bases.registry import get_base
from loray.catalog import Catalog
from loray.errors import LorayError
from loray.settings import Settings
from loray.train.checkpoint import read_state
from tests.fixtures.recipes import write
from tests.fixtures.runs import trained


def ended(run: RunFolder) -> None:
    """Writes what a worker does."""
    (checkpoint,) = run.names("step_")
    state = read_state(Path(run.path, checkpoint))
    run.write_model(ENDED, EndedRun(recipe=state.recipe, status="succeeded", checkpoint=name_of(state.step)))


def test_each_adapter_is_published_by_itself(tmp_path: Path, settings: Settings) -> None:
    long = {"rope_scaling": {"type": "linear", "factor": 2, "original_context": 64}}
    ready = {}
    for name, fields in {"acme": {}, "long": long, "base": {}, "gone": {}}.items():
        run, _ = trained(write(tmp_path / name, name=name, **fields), settings, tmp_path)
        ready[name] = Ready(name, run, write(tmp_path / name, name=name, publish={"aliases": ["prod"]}, **fields))
        if name != "gone":
            ended(run)
    Catalog(settings.catalog).bases.add("base", "0" * 64)  # a name that no adapter can have any more
    outcomes: dict[str, Outcome] = {}
    base = get_base(settings.home, "tiny")
    with Publisher(settings, "default", base, base, lambda each, outcome: outcomes.update({each.name: outcome})) as p:
        for each in ready.values():
            p.add(each)
        p.finish()
    acme, scaled = outcomes["acme"], outcomes["long"]
    assert not isinstance(acme, LorayError)
    assert not isinstance(scaled, LorayError)
    assert (acme["label"], acme["aliases"], acme["refusal"]) == ("acme@1", ["prod"], None)
    assert (scaled["label"], scaled["aliases"]) == ("long@1", [])
    assert "alias 'prod' is refused to long@1" in str(scaled["refusal"])
    assert "is a base model" in str(outcomes["base"])
    assert "ended without a checkpoint" in str(outcomes["gone"])
    version = Catalog(settings.catalog).adapters.version("acme", 1)
    assert (version.digest, version.manifest.job_id) == (acme["digest"], "first")
