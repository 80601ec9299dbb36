"""Serve's two applications as one state, and as one config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import ConflictError, SpecError
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from loray.store import AdapterStore, open_store
from serve_apps.deployment import DRAIN_S, combined, serve_config


def application(status: str, deployment: str, *states: str, message: str = "", at: float = 1.0) -> dict[str, Any]:
    replicas = [{"state": state} for state in states]
    deployments = {deployment: {"replicas": replicas, "message": ""}}
    return {"status": status, "message": message, "last_deployed_time_s": at, "deployments": deployments}


@pytest.mark.parametrize(
    ("engine", "catalog", "together"),
    [
        ("RUNNING", "RUNNING", "RUNNING"),
        ("RUNNING", "DEPLOYING", "DEPLOYING"),
        ("DEPLOYING", "RUNNING", "DEPLOYING"),
        ("DEPLOYING", "DEPLOY_FAILED", "DEPLOY_FAILED"),
        ("UNHEALTHY", "RUNNING", "UNHEALTHY"),
    ],
)
def test_the_application_that_is_worst_off_counts(engine: str, catalog: str, together: str) -> None:
    state = combined(
        [
            application(engine, "engine", "RUNNING", "STARTING", message="one", at=2.0),
            application(catalog, "api", "RUNNING", message="two"),
        ]
    )
    assert (state.status, state.message, state.deployed_at) == (together, "one\ntwo", 2.0)
    assert state.replicas == {"engine": {"RUNNING": 1, "STARTING": 1}, "api": {"RUNNING": 1}}


def test_both_are_deployed_with_the_same_settings(tmp_path: Path) -> None:
    from serve_apps.api.app import build

    settings = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    serving, catalog = serve_config(FleetSpec.of(ServeSpec()), settings)["applications"]
    assert (serving["route_prefix"], catalog["route_prefix"]) == ("/", "/api/v1")
    assert catalog["import_path"] == f"{build.__module__}:{build.__name__}"
    assert serving["runtime_env"] == catalog["runtime_env"] == {"env_vars": settings.to_env()}
    with pytest.raises(SpecError, match="base: Extra inputs are not permitted; known fields: host"):
        build({"base": "x"})


def test_no_secret_is_shown_on_another_clusters_dashboard() -> None:
    catalog = "postgresql://loray:hush@db.example/loray"
    elsewhere = {"LORAY_ADDRESS": "http://head.example:8265", "LORAY_STORE": "s3://bucket/loray?credentials_file=/k"}
    shown = serve_config(FleetSpec.of(ServeSpec()), Settings.from_env(elsewhere | {"LORAY_CATALOG": catalog}))
    assert "hush" not in str(shown)
    for application in shown["applications"]:
        assert application["runtime_env"]["env_vars"] == {"LORAY_STORE": "s3://bucket/loray", "LORAY_LOG_LEVEL": "INFO"}


@pytest.mark.parametrize("autoscaling", [None, {"max_replicas": 2}])
def test_gateway_and_engine_have_the_same_time_to_end_a_stream(
    tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch, autoscaling: dict[str, int] | None
) -> None:
    from serve_apps.app import build

    base = tiny_base()
    monkeypatch.setenv("LORAY_HOME", str(base.path.parents[1]))
    gateway = build({"base": base.name, "autoscaling": autoscaling})._bound_deployment
    (engine,) = (bound._bound_deployment for bound in gateway.init_args)
    times = [d._deployment_config.graceful_shutdown_timeout_s for d in (gateway, engine)]
    assert times == [DRAIN_S, DRAIN_S]


@pytest.mark.parametrize("tls", ["0", "1"])
def test_with_tls_the_ranks_of_an_engine_are_on_one_node(
    tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch, tls: str
) -> None:
    """What they send each other has none."""
    from serve_apps.app import build

    base = tiny_base()
    monkeypatch.setenv("LORAY_HOME", str(base.path.parents[1]))
    monkeypatch.setenv("RAY_USE_TLS", tls)
    for size in (1, 2):
        gateway = build({"base": base.name, "tensor_parallel_size": size})._bound_deployment
        (engine,) = (bound._bound_deployment for bound in gateway.init_args)
        strategy = engine._replica_config.placement_group_strategy
        assert strategy == ("STRICT_PACK" if size > 1 and tls == "1" else None)


@pytest.mark.parametrize(("nodes", "address"), [(["a", "a"], "127.0.0.1"), (["a", "b"], "192.0.2.7")])
def test_ranks_on_one_node_cannot_be_reached_from_another(
    monkeypatch: pytest.MonkeyPatch, nodes: list[str], address: str
) -> None:
    from serve_apps.replica import ranks

    table = {"bundles_to_node_id": dict(enumerate(nodes))}
    monkeypatch.setattr(ranks, "get_current_placement_group", lambda: "group")
    monkeypatch.setattr(ranks, "placement_group_table", {"group": table}.__getitem__)
    monkeypatch.setattr(ranks, "get_node_ip_address", lambda: "192.0.2.7")
    assert ranks.RankActors.own_address() == address


def test_a_base_that_is_called_as_an_adapter_is_refused_and_others_keep_their_names(
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from serve_apps.app import build

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
