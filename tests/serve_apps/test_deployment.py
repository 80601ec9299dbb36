"""Serve's two applications as one state, and as one config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loray.errors import SpecError
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from serve_apps.deployment import combined, serve_config


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


def test_all_are_deployed_with_the_same_settings(tmp_path: Path) -> None:
    from serve_apps.api.app import build

    settings = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    serving, catalog, tinker = serve_config(FleetSpec.of(ServeSpec()), settings)["applications"]
    prefixes = (serving["route_prefix"], catalog["route_prefix"], tinker["route_prefix"])
    assert prefixes == ("/", "/api/v1", "/tinker")
    assert catalog["import_path"] == f"{build.__module__}:{build.__name__}"
    same = {"env_vars": settings.to_env()}
    assert serving["runtime_env"] == catalog["runtime_env"] == tinker["runtime_env"] == same
    with pytest.raises(SpecError, match="base: Extra inputs are not permitted; known fields: host"):
        build({"base": "x"})


def test_no_secret_is_shown_on_another_clusters_dashboard() -> None:
    catalog = "postgresql://loray:hush@db.example/loray"
    elsewhere = {"LORAY_ADDRESS": "http://head.example:8265", "LORAY_STORE": "s3://bucket/loray?credentials_file=/k"}
    shown = serve_config(FleetSpec.of(ServeSpec()), Settings.from_env(elsewhere | {"LORAY_CATALOG": catalog}))
    assert "hush" not in str(shown)
    for application in shown["applications"]:
        assert application["runtime_env"]["env_vars"] == {"LORAY_STORE": "s3://bucket/loray", "LORAY_LOG_LEVEL": "INFO"}
