"""What Serve replaces when a deployment changes: the replicas of the base that has changed, and the gateways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.build_app import build_app
from ray.serve._private.config import DeploymentConfig

from loray.bases.registry import BaseModel
from serve_apps.app import build


def versions(args: dict[str, Any]) -> dict[str, tuple[object, ...]]:
    """By deployment: what Serve's controller compares of it."""
    found = {}
    for deployment in build_app(build(args), name="app").deployments:
        config = deployment._deployment_config
        config.version = "the application's"  # as Serve does for each deployment
        sent = DeploymentConfig.from_proto_bytes(config.to_proto_bytes())
        found[deployment.name] = (sent.version, sent.max_ongoing_requests, deployment.ray_actor_options)
    return found


@pytest.fixture
def bases(tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAY_HOME", str(tmp_path))
    (tmp_path / "bases").mkdir()
    for name, base in (("a", tiny_base()), ("b", tiny_base(max_position_embeddings=256))):
        (tmp_path / "bases" / name).symlink_to(base.path)


@pytest.mark.usefixtures("bases")
def test_a_change_of_one_base_leaves_the_other_alone() -> None:
    a, b = {"base": "a"}, {"base": "b"}
    before = versions({"bases": [a, b]})
    assert before.keys() == {"engine-a", "engine-b", "gateway"}
    assert before == versions({"bases": [a, b]})
    changed = versions({"bases": [a, b | {"max_num_seqs": 5}], "num_gateways": 2, "port": 9000})
    assert changed["engine-a"] == before["engine-a"]
    assert changed["engine-b"][0] != before["engine-b"][0]
    alone = versions(a)
    assert alone.keys() == {"engine-a", "gateway"}
    assert alone["engine-a"] == before["engine-a"]  # a base is added to it, or removed


@pytest.mark.usefixtures("bases")
def test_another_model_under_the_same_name_replaces_its_replicas(
    tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    fleet = {"bases": [{"base": "a"}, {"base": "b"}]}
    before = versions(fleet)
    (tmp_path / "bases" / "b").unlink()
    (tmp_path / "bases" / "b").symlink_to(tiny_base(max_position_embeddings=128).path)
    changed = versions(fleet)
    assert changed["engine-a"] == before["engine-a"]
    assert changed["engine-b"][0] != before["engine-b"][0]


@pytest.mark.usefixtures("bases")
def test_the_gateway_has_the_application_s_version() -> None:
    assert versions({"base": "a"})["gateway"][0] == "the application's"
