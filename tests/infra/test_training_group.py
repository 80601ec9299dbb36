"""Serving and training never share a pod: what each group offers, and what engines, drivers and workers ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.submission.commands import from_spec
from jobs.workers.placement import worker_resources
from loray.errors import SettingsError
from loray.settings import Settings
from loray.spec import TrainingGroup, TrainSpec
from serve_apps.deployment import front_nodes
from tests.infra.manifests import JOBS, SERVICES, cluster_spec, data, environment, offered, pods, the

TAINT = {"key": "loray", "operator": "Equal", "value": "training", "effect": "NoSchedule"}


def recipe() -> TrainSpec:
    return TrainSpec.parse(yaml.safe_load(data("ConfigMap", "loray-recipe", "train")["recipe.yaml"]), source="recipe")


@pytest.mark.parametrize("folder", SERVICES)
def test_driver_and_workers_of_a_job_fit_on_the_training_group_alone(folder: str, tmp_path: Path) -> None:
    spec = cluster_spec(the("RayService", folder))
    serving, training, front = spec["workerGroupSpecs"]
    (container,) = training["template"]["spec"]["containers"]
    settings = Settings.from_env(environment(container, folder))
    assert settings.training_group == TrainingGroup(training["groupName"])  # Ray's label of its nodes
    job = from_spec(recipe(), settings, stage=tmp_path)
    assert job.entrypoint_resources is not None
    assert offered(training) == job.entrypoint_resources | worker_resources(recipe(), settings.training_group)
    assert training["rayStartParams"]["num-cpus"] == "0"  # an engine, and a rank of one, takes a CPU
    for group in (spec["headGroupSpec"], serving, front):
        assert offered(group) == {}
    assert (training["minReplicas"], training["replicas"]) == (0, 0)  # a pod begins with a job
    assert training["maxReplicas"] >= recipe().num_workers
    assert "LORAY_TRAINING_GROUP" in job.runtime_env["env_vars"]  # the driver reads it


@pytest.mark.parametrize("folder", [*SERVICES, *JOBS])
def test_nodes_with_the_taint_take_training_alone(folder: str) -> None:
    document = the("RayService" if folder in SERVICES else "RayJob", folder)
    spec = cluster_spec(document)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        is_training = pod["serviceAccountName"] == "loray-training"
        assert (TAINT in pod.get("tolerations", ())) == is_training
        assert is_training == (group["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == "training")


SECRETS = {
    "head": {"loray", "loray-database"},
    "front": {"loray", "loray-database"},
    "worker": {"loray"},  # an engine opens no catalog
    "training": {"loray-training"},
}


@pytest.mark.parametrize("folder", [*SERVICES, *JOBS])
def test_no_pod_has_the_secret_of_another_role(folder: str) -> None:
    for pod in pods(folder):
        if not pod.is_ours:
            continue
        role = pod.labels["app.kubernetes.io/component"]
        found = {
            part["secretRef"]["name"]
            for container in pod.containers
            for part in container.get("envFrom", ())
            if "secretRef" in part
        }
        assert found <= SECRETS[role], role
        for container in pod.containers:
            values = environment(container, folder)
            assert ("PGPASSWORD" in values) <= (role != "worker"), container["name"]
            assert "@" not in values.get("LORAY_CATALOG", "")  # no password where others read it
        (main,) = pod.spec["containers"]
        if main["name"] != "ray-job-submitter":
            assert found == SECRETS[role]


@pytest.mark.parametrize("folder", SERVICES)
def test_gateways_have_nodes_of_their_own(folder: str) -> None:
    spec = cluster_spec(the("RayService", folder))
    *_, front = spec["workerGroupSpecs"]
    (container,) = front["template"]["spec"]["containers"]
    settings = Settings.from_env(environment(container, folder))
    assert front_nodes(settings) == {"ray.io/node-group": front["groupName"]}
    assert front["rayStartParams"]["num-cpus"] == "0"
    assert Settings.from_env(settings.to_env(secrets=False)).front_group == settings.front_group
    assert front_nodes(Settings.from_env({})) == {}


def test_without_a_group_nothing_of_it_is_asked_for(tmp_path: Path) -> None:
    settings = Settings.from_env({})
    assert settings.training_group is None
    assert from_spec(recipe(), settings, stage=tmp_path).entrypoint_resources is None
    assert worker_resources(recipe(), None) == {"CPU": 1.0}
    gpu = recipe().model_copy(update={"use_gpu": True})
    assert worker_resources(gpu, TrainingGroup("gpus")) == {"gpus_worker": 1.0, "GPU": 1.0}


@pytest.mark.parametrize("name", ["Training", "a b", "!training", "-"])
def test_a_group_has_the_name_of_a_worker_group(name: str) -> None:
    with pytest.raises(SettingsError, match="must be the name of a worker group"):
        Settings.from_env({"LORAY_TRAINING_GROUP": name})
