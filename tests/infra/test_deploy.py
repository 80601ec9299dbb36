"""The manifests on a cluster of this machine: the RayJob's driver trains and publishes, the RayService's config serves.

The cluster's processes have the environment of the manifests' pods, with a real S3 server and PostgreSQL; the commands
are those of KubeRay. Only `LAPTOP` and the recipe's data differ from the manifests. No other module uses the cluster,
because `serve deploy` replaces everything that is deployed.
"""

from __future__ import annotations

import configparser
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import yaml

from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.local.cluster import LocalCluster, start_local_cluster, stop_local_cluster
from loray.locations import S3Location, parse_location
from loray.settings import Settings
from tests.cluster import free_port
from tests.infra.manifests import cluster_spec, data, development_key, environment, the
from tests.postgres import Postgres
from tests.s3 import S3Server
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.cluster

FOLDER = "overlays/cpu-dev"
LAPTOP = {"pool_bytes": "8MiB", "host_bytes": "8MiB", "num_threads": 1}
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Laptop:
    """A cluster on this machine. `env`: the pods' environment, for the cluster's processes and for commands."""

    cluster: LocalCluster
    settings: Settings
    store: S3Location
    env: dict[str, str]

    def ray(self, module: str, *words: str, cwd: Path) -> str:
        """Run one of Ray's commands, which must succeed; returns its output."""
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(
            command, cwd=cwd, env=os.environ | self.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def laptop(s3_server: S3Server, postgres: Postgres) -> Iterator[Laptop]:
    home = Path(tempfile.mkdtemp(prefix="loray-infra-"))
    location = parse_location(s3_server.url("infra"))
    assert isinstance(location, S3Location)
    keys = configparser.ConfigParser()
    keys.read(str(location.credentials_file))
    store = replace(location, credentials_file=None)  # as in a pod: keys come from the environment
    (container,) = cluster_spec(the("RayService", FOLDER))["headGroupSpec"]["template"]["spec"]["containers"]
    env = environment(container, FOLDER) | {
        "LORAY_HOME": str(home),
        "LORAY_STORE": store.url,
        "LORAY_CATALOG": postgres.new_database(),
        "AWS_ACCESS_KEY_ID": keys["default"]["aws_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": keys["default"]["aws_secret_access_key"],
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    # The name is that of the real base, so that neither recipe nor config has to change.
    (init,) = cluster_spec(the("RayService", FOLDER))["headGroupSpec"]["template"]["spec"]["initContainers"]
    add_base(str(write_checkpoint(home / "checkpoint")), home=home, name=init["args"][-1])
    try:
        cluster = start_local_cluster(home, num_cpus=2, env=env)
        yield Laptop(cluster, Settings.from_env(env), store, env | cluster.client_env)
    finally:
        stop_local_cluster(home)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def published(laptop: Laptop, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of the adapter that the RayJob's entrypoint trains, from data on S3."""
    rows = "".join(json.dumps({"text": "abcdefgh" * (i % 3 + 1)}) + "\n" for i in range(40))
    s3 = boto3.client(
        "s3",
        endpoint_url=laptop.store.endpoint_url,
        region_name=laptop.store.region,
        aws_access_key_id=laptop.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=laptop.env["AWS_SECRET_ACCESS_KEY"],
    )
    s3.put_object(Bucket=laptop.store.bucket, Key="data/train.jsonl", Body=rows.encode())

    entrypoint, mount = the("RayJob", "train")["spec"]["entrypoint"], "/etc/loray/"
    assert mount in entrypoint
    folder = tmp_path_factory.mktemp("mounted")  # holds what the ConfigMap mounts, and nothing else
    recipe = yaml.safe_load(data("ConfigMap", "loray-recipe", "train")["recipe.yaml"])
    recipe["data"]["train"] = replace(laptop.store, prefix="data/train.jsonl").url
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = shlex.split(entrypoint.replace(mount, ""))
    address = ("--address", laptop.cluster.address)
    output = laptop.ray(
        "ray.scripts.scripts", "job", "submit", *address, "--working-dir", ".", "--", *command, cwd=folder
    )
    assert f"published {recipe['name']}@1" in output
    return str(recipe["name"])


def test_the_job_publishes_into_s3_and_postgresql(laptop: Laptop, published: str) -> None:
    assert laptop.settings.store.startswith("s3://")
    assert laptop.settings.catalog.startswith("postgresql")
    (version,) = Catalog(laptop.settings.catalog).adapter(published).versions
    assert version.aliases == ("prod",)
    assert version.manifest.recipe is not None
    assert version.manifest.recipe.data.train.startswith(f"s3://{laptop.store.bucket}/data/")


def test_the_service_s_config_serves_what_the_job_published(laptop: Laptop, published: str, tmp_path: Path) -> None:
    config: dict[str, Any] = yaml.safe_load(the("RayService", FOLDER)["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    (serving,) = (a for a in config["applications"] if a["name"] == "loray")
    serving["args"] |= LAPTOP
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    laptop.ray("ray.serve.scripts", "deploy", "config.yaml", "--address", laptop.cluster.address, cwd=tmp_path)

    url, key = f"http://127.0.0.1:{config['http_options']['port']}", {"Authorization": f"Bearer {development_key()}"}
    with httpx.Client(base_url=url, headers=key, timeout=60) as client:
        deadline = time.monotonic() + DEADLINE_S
        while not answers(client):
            state = laptop.ray("ray.serve.scripts", "status", "--address", laptop.cluster.address, cwd=tmp_path)
            assert "DEPLOY_FAILED" not in state, state
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        assert {m["id"] for m in client.get("/v1/models").json()["data"]} == {serving["args"]["base"], published}
        body = {"prompt": "abcd", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        for model in (serving["args"]["base"], f"{published}@prod"):
            answer = client.post("/v1/completions", json=body | {"model": model})
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 4
        for path in ("/v1/models", "/api/v1/adapters", "/metrics"):
            assert httpx.get(url + path, timeout=60).status_code == 401
        known = client.get(f"/api/v1/adapters/{published}")
        assert known.status_code == 200, known.text


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/v1/models").status_code == 200
    except httpx.TransportError:
        return False
