"""What Serve is given for a fleet, and what of it is replaced when a deployment changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.build_app import build_app
from ray.serve._private.config import DeploymentConfig

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.parallel import worker
from loray.errors import ConflictError
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.store import AdapterStore, open_store
from serve_apps.app import build
from serve_apps.deployment import DRAIN_S
from serve_apps.replica import ranks


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
    assert before["gateway"][0] == "the application's"
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


def deployments(args: dict[str, Any]) -> tuple[Any, Any]:
    """The gateway and its engine."""
    gateway = build(args)._bound_deployment
    (engine,) = (bound._bound_deployment for bound in gateway.init_args)
    return gateway, engine


@pytest.mark.usefixtures("bases")
@pytest.mark.parametrize("autoscaling", [None, {"max_replicas": 2}])
def test_gateway_and_engine_have_the_same_time_to_end_a_stream(autoscaling: dict[str, int] | None) -> None:
    times = [
        d._deployment_config.graceful_shutdown_timeout_s for d in deployments({"base": "a", "autoscaling": autoscaling})
    ]
    assert times == [DRAIN_S, DRAIN_S]


@pytest.mark.usefixtures("bases")
@pytest.mark.parametrize("tls", ["0", "1"])
def test_with_tls_the_ranks_of_an_engine_are_on_one_node(monkeypatch: pytest.MonkeyPatch, tls: str) -> None:
    """What they send each other has none."""
    monkeypatch.setenv("RAY_USE_TLS", tls)
    for size in (1, 2):
        _, engine = deployments({"base": "a", "tensor_parallel_size": size})
        strategy = engine._replica_config.placement_group_strategy
        assert strategy == ("STRICT_PACK" if size > 1 and tls == "1" else None)


@pytest.mark.parametrize(("nodes", "address"), [(["a", "a"], "127.0.0.1"), (["a", "b"], "192.0.2.7")])
def test_ranks_on_one_node_cannot_be_reached_from_another(
    monkeypatch: pytest.MonkeyPatch, nodes: list[str], address: str
) -> None:
    table = {"bundles_to_node_id": dict(enumerate(nodes))}
    monkeypatch.setattr(ranks, "get_current_placement_group", lambda: "group")
    monkeypatch.setattr(ranks, "placement_group_table", {"group": table}.__getitem__)
    monkeypatch.setattr(ranks, "get_node_ip_address", lambda: "192.0.2.7")
    assert ranks.RankActors.own_address() == address
    listening: list[str] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(ranks, "get_base", lambda home, name: None)
    monkeypatch.setattr(worker, "run_worker", lambda args, base, own_address: listening.append(own_address))
    args: Any = SimpleNamespace(host=address, spec=SimpleNamespace(base="a", num_threads=1))
    ranks.RankActor().run(args)
    assert listening == [address]


def test_a_base_that_is_called_as_an_adapter_is_refused_and_others_keep_their_names(
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, other = tiny_base(), tiny_base(seed=1)
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    monkeypatch.setenv("LORAY_HOME", str(tmp_path))
    (tmp_path / "bases").mkdir()
    for name, found in ((base.name, base), ("taken", other), ("free", other)):
        (tmp_path / "bases" / name).symlink_to(found.path)
    store, catalog = AdapterStore(open_store(settings.store)), Catalog(settings.catalog)
    publish(peft_folder(base), base, Destination("taken", store, catalog))
    with pytest.raises(ConflictError, match=r"answer in the adapter's place.*--name"):
        build({"bases": [{"base": base.name}, {"base": "taken"}]})
    build({"bases": [{"base": base.name}, {"base": "free"}]})
    with pytest.raises(ConflictError, match="'free' is a base model's name"):
        publish(peft_folder(base), base, Destination("free", store, catalog))
    catalog.close()
    monkeypatch.setenv("LORAY_CATALOG", "postgresql://nobody@127.0.0.1:1/away?connect_timeout=1")
    build({"base": base.name})
    assert "are not reserved" in caplog.text
