"""What jobs of the session's cluster have trained on the base of `served`, once for all tests that look at it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest

from jobs.events import decode
from loray.bases.registry import BaseModel
from loray.client import CatalogClient
from loray.recipes.load import Recipe
from tests.cluster import RayCluster, Served


@dataclass(frozen=True)
class Trained:
    """A job that has ended. `log`: its lines; `output`: what the command printed that followed it."""

    recipe: Recipe
    job_id: str
    log: list[str]
    output: str = ""

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for line in self.log if (event := decode(line))]


@pytest.fixture(scope="session")
def command_job(ray_cluster: RayCluster, cluster_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """LoRA, submitted with `loray train`."""
    from click.testing import CliRunner
    from ray.job_submission import JobSubmissionClient

    from jobs.command import train
    from tests.jobs.test_train import follow
    from tests.test_recipe import write

    recipe = write(
        tmp_path_factory.mktemp("submitted"),
        name="submitted",
        base=cluster_base.name,
        adapter={"method": "lora", "rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        dtype="float32",
        optimizer={"learning_rate": 0.1, "schedule": "constant"},
        max_steps=6,
        evaluation={"interval_steps": 2},
        publish={"aliases": ["prod"], "licence": "CC0-1.0"},
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ray_cluster.settings.to_env().items():
            environment.setenv(name, value)
        done = CliRunner().invoke(train, [str(recipe.path), "--address", ray_cluster.address])
    assert done.exit_code == 0, done.output
    (job_id,) = re.findall(r"as job (\S+)", done.output)
    return Trained(recipe, job_id, follow(JobSubmissionClient(ray_cluster.address), job_id), done.output)


@pytest.fixture(scope="session")
def api_job(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """LongLoRA, posted to the API, and measured before it is published."""
    from jobs.submission.commands import for_server
    from tests.jobs.driver.test_evaluation import long_recipe

    folder, publish = tmp_path_factory.mktemp("posted"), {"aliases": ["measured"]}
    recipe = long_recipe(folder, name="posted", base=served.base.name, publish=publish)
    with CatalogClient(served.url) as client:
        job_id = client.submit(for_server(recipe, served.url)).id
        return Trained(recipe, job_id, list(client.follow(job_id)))
