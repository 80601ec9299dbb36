"""A recipe of preference pairs from its file to the catalog: by the driver's parts, and as a job of two workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.driver.publication import publish_best
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.spec import REWARDS, DpoSpec
from loray.store import AdapterStore, open_store
from tests.fixtures.cluster import RayCluster
from tests.fixtures.recipes import write
from tests.fixtures.runs import run, trained
from tests.fixtures.tiny import write_checkpoint
from tests.fixtures.training import pair

BASE = "tiny-pairs"
FIELDS: dict[str, Any] = {
    "base": BASE,
    "objective": {"type": "dpo", "beta": 0.2},
    "dtype": "float32",
    "data": {"train": "pairs.jsonl", "eval_fraction": 0.25, "max_length": 48, "format": "raw"},
    "evaluation": {"interval_steps": 8},
    "optimizer": {"learning_rate": 0.02},
    "max_steps": 16,
}


def recipe_of(folder: Path, **fields: Any) -> Recipe:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair(i)) + "\n" for i in range(32)))
    return write(folder, **(FIELDS | fields))


def published(settings: Settings, name: str) -> dict[str, float]:
    """The figures of the published adapter, by metric."""
    manifest = Catalog(settings.catalog).adapters.version(name, 1).manifest
    assert manifest.recipe is not None
    assert manifest.recipe.objective == DpoSpec(beta=0.2)
    return {e.metric: e.value for e in manifest.evaluations if e.subject == "adapter"}


def test_what_is_published_has_the_rewards_of_held_out_pairs(tmp_path: Path) -> None:
    add_base(str(write_checkpoint(tmp_path / "checkpoint", std=0.05)), home=tmp_path / "home", name=BASE)
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    recipe = recipe_of(tmp_path, optimizer={"learning_rate": 0.01}, max_steps=32)
    folder, made = trained(recipe, settings, tmp_path)
    publish_best(made, folder, recipe, settings)
    figures = published(settings, "arithmetic")
    assert list(figures) == ["loss", *REWARDS]
    assert figures["rewards/accuracies"] > 0.8


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_of_two_workers(ray_cluster: RayCluster, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", std=0.05)
    base = add_base(str(checkpoint), home=ray_cluster.home, name=BASE)
    adapter = {"method": "vera", "rank": 16}
    events = run(recipe_of(tmp_path, name="preferred", adapter=adapter, num_workers=2), ray_cluster.settings)
    steps = [e for e in events if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, 17))
    assert all(name in e for e in steps for name in REWARDS)
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    last = [e for e in events if e["event"] == "eval"][-1]
    assert published(ray_cluster.settings, "preferred") == {"loss": last["eval_loss"]} | {n: last[n] for n in REWARDS}
    version = Catalog(ray_cluster.settings.catalog).adapters.version("preferred", 1)
    AdapterStore(open_store(ray_cluster.settings.store)).fetch(version.digest, tmp_path / "fetched")
    assert len(read_adapter(tmp_path / "fetched", base.config).modules) == 14
