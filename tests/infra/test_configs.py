"""Serve's configuration files are valid for Serve and for loray, and `loray up` deploys local.yaml."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from serve_apps.deployment import serve_config
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "serve_apps" / "configs").glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "serve_apps" / "configs" / name).read_text())
    return config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_configs_are_serves_and_ours(file: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = load(file.name)
    schema = ServeDeploySchema.model_validate(config)
    for application in schema.applications:
        module, _, function = application.import_path.partition(":")
        build = getattr(importlib.import_module(module), function)
        assert len(inspect.signature(build).parameters) == 1  # Serve calls a builder with `args`
    (ours,) = (a for a in config["applications"] if a["name"] == "loray")
    spec = ServeSpec.parse(ours["args"], source="loray")
    assert (schema.http_options.host, schema.http_options.port) == (spec.host, spec.port)


def test_local_is_what_up_deploys(tmp_path: Path) -> None:
    assert comparable(load("local.yaml")) == comparable(
        serve_config(FleetSpec.of(ServeSpec()), Settings.from_env({"LORAY_HOME": str(tmp_path)}))
    )


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_all_deploy_the_same_applications(file: Path) -> None:
    def applications(name: str) -> list[tuple[str, str, str]]:
        return [(a["name"], a["route_prefix"], a["import_path"]) for a in load(name)["applications"]]

    assert applications(file.name) == applications("local.yaml")


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the machine's environment and with all fields of ServeSpec."""
    applications = []
    for application in config["applications"]:
        kept = {"args": {}} | {name: value for name, value in application.items() if name != "runtime_env"}
        if application["name"] == "loray":
            kept["args"] = ServeSpec.parse(application["args"], source="args").model_dump(mode="json")
        applications.append(kept)
    return config | {"applications": applications}
