"""Two bases in one application of a real cluster, deployed and changed by configuration, as `loray up` does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loray.bases.registry import BaseModel, add_base
from loray.publishing import Destination, publish
from loray.spec import FleetSpec
from serve_apps.deployment import IMPORT_PATH, ServeApi, serve_config
from tests.fixtures.cluster import SERVE, RayCluster, Served
from tests.fixtures.tiny import write_checkpoint
from tests.serve_apps.asking import answer, eventually, status

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NAME = "fleet"


class Fleet:
    """An application beside `served`, in the same configuration."""

    def __init__(self, cluster: RayCluster, served: Served) -> None:
        self.served = replace(served, url=f"{served.url}/{NAME}")
        self._api, self._config = ServeApi(cluster.address), serve_config(FleetSpec.of(served.spec), served.settings)

    def deploy(self, *bases: dict[str, Any]) -> None:
        shared = {"dtype": "float32", "port": self.served.spec.port} | SERVE
        args = FleetSpec.parse(shared | {"bases": list(bases)}, source="the test").to_args()
        own = {"name": NAME, "route_prefix": f"/{NAME}", "import_path": IMPORT_PATH, "args": args}
        own["runtime_env"] = self._config["applications"][0]["runtime_env"]
        self._api.deploy(self._config | {"applications": [*self._config["applications"], own]})

    def state(self) -> str:
        return str(self._api._details()["applications"].get(NAME, {}).get("status"))

    def remove(self) -> None:
        self._api.deploy(self._config)

    def replicas(self) -> dict[str, str]:
        """By base; empty while the gateways change."""
        try:
            return {r["base"]: r["replica"] for r in status(self.served)["replicas"]}
        except (httpx.HTTPError, ValueError, KeyError):
            return {}

    def spec(self, base: str) -> dict[str, Any]:
        (found,) = (b["spec"] for b in status(self.served)["bases"] if b["base"] == base)
        return dict(found)


@pytest.fixture
def second(served: Served, tmp_path: Path) -> BaseModel:
    folder = write_checkpoint(tmp_path / "checkpoint", seed=1, max_position_embeddings=2048)
    return add_base(str(folder), home=served.settings.home, name="second")


@pytest.fixture
def fleet(ray_cluster: RayCluster, served: Served) -> Iterator[Fleet]:
    made = Fleet(ray_cluster, served)
    yield made
    made.remove()


def test_each_base_answers_and_changes_by_itself(
    fleet: Fleet, served: Served, second: BaseModel, peft_folder: Any
) -> None:
    for name, base in (("of-first", served.base), ("of-second", second)):
        publish(peft_folder(base), base, Destination(name, served.store, served.catalog))
    fleet.deploy({"base": "tiny"}, {"base": "second"})
    assert eventually(lambda: fleet.state() == "RUNNING", 120)
    with openai.OpenAI(base_url=f"{fleet.served.url}/v1", api_key="none", max_retries=2, timeout=90) as client:
        models = ("tiny", "second", "of-first", "of-second")
        assert len({answer(client, model) for model in models}) == 4
        parents = {m.id: (m.model_extra or {})["parent"] for m in client.models.list()}
        assert (parents["of-first"], parents["of-second"]) == ("tiny", "second")
        finished = {r["base"]: (r["num_finished"], r["num_misses"]) for r in status(fleet.served)["replicas"]}
        assert finished == {"tiny": (2, 1), "second": (2, 1)}
        before = fleet.replicas()

        fleet.deploy({"base": "tiny"}, {"base": "second", "max_num_seqs": 3})
        changed = lambda: fleet.state() == "RUNNING" and fleet.replicas().get("second") not in (None, before["second"])  # noqa: E731
        assert eventually(changed, 120)
        assert fleet.replicas()["tiny"] == before["tiny"]
        assert (fleet.spec("tiny")["max_num_seqs"], fleet.spec("second")["max_num_seqs"]) == (4, 3)
        assert answer(client, "of-second")

        fleet.deploy({"base": "tiny"})
        assert eventually(lambda: fleet.state() == "RUNNING" and fleet.replicas() == {"tiny": before["tiny"]}, 120)
        with pytest.raises(openai.NotFoundError, match="another base"):
            answer(client, "of-second")
