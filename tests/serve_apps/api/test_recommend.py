"""Recommendations over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loray.bases.registry import add_base
from serve_apps.api.routes.jobs import RecommendationResource
from tests.fixtures.tiny import write_checkpoint
from tests.serve_apps.api.fakes import Api
from tests.serve_apps.api.test_adapters import problem

PERSONAL = {
    "context_length": 2048,
    "num_tasks": 1000,
    "resource_constraint": "high",
    "deployment_scale": "distributed",
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("home")
    api = Api(home, f"sqlite:///{home}/catalog.db")
    add_base(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"))), home=home, name="tiny")
    yield api
    api.close()


def test_scores_and_estimates(api: Api) -> None:
    found = RecommendationResource.model_validate(api.http.get("/recommend", params=PERSONAL).json())
    assert [(s.method, s.score) for s in found.scores] == [("VeRA", 12.0), ("S-LoRA", 9.0), ("LoRA", 5.0)]
    assert [e.method for e in found.estimates] == ["lora", "dora", "vera", "longlora"]
    assert (found.base, found.device) == ("smollm2", "a100-80gb")


def test_a_base_of_this_node(api: Api) -> None:
    params = {"context_length": 64, "num_tasks": 1, "base": "tiny", "device": "h100-80gb"}
    found = RecommendationResource.model_validate(api.http.get("/recommend", params=params).json())
    assert found.estimates[0].trained_parameters < 100_000


def test_what_is_not_known(api: Api) -> None:
    assert "gpt-9" in problem(api.http.get("/recommend", params=PERSONAL | {"base": "gpt-9"}), 404)["detail"]
    problem(api.http.get("/recommend", params=PERSONAL | {"device": "abacus"}), 422)
    problem(api.http.get("/recommend", params={"num_tasks": 1}), 422)
