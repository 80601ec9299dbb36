"""The manifests on a cluster of this machine: the RayJob's driver trains and publishes, the RayService's config serves,
and a job of its API trains on the nodes of the group for training.

The cluster's processes have the environment of the manifests' pods, with a real S3 server and PostgreSQL; the commands
are those of KubeRay. Only `LAPTOP` and the recipe's data differ from the manifests. The bucket does what the policy of
each role allows, and jobs are a database user with the rights of training. No other module uses the cluster, because
`serve deploy` replaces everything that is deployed.
"""

from __future__ import annotations

import configparser
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import httpx
import pytest
import yaml

from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.local.cluster import OBJECT_STORE_BYTES, LocalCluster, start_local_cluster, stop_local_cluster
from loray.locations import S3Location, parse_location
from loray.settings import Settings
from tests.fixtures.asking import eventually
from tests.fixtures.cluster import free_port
from tests.fixtures.postgres import Postgres
from tests.fixtures.s3 import S3Server
from tests.fixtures.tiny import write_checkpoint
from tests.infra.manifests import cluster_spec, data, development_key, environment, offered, the
from tests.infra.policy_server import POLICIES, Asked, PolicyServer

pytestmark = pytest.mark.cluster

FOLDER = "overlays/cpu-dev"
DATA = "data/default/train.jsonl"
LAPTOP = {"pool_bytes": "8MiB", "host_bytes": "8MiB", "num_threads": 1}
DEADLINE_S = 240.0


@dataclass(frozen=True)
class Laptop:
    """A cluster on this machine. `env`: the pods' environment, for the cluster's processes and for commands."""

    cluster: LocalCluster
    settings: Settings
    policies: PolicyServer
    env: dict[str, str]

    @property
    def store(self) -> S3Location:
        return self.policies.location

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
    location = parse_location(s3_server.url("infra", "adapters"))
    assert isinstance(location, S3Location)
    keys = configparser.ConfigParser()
    keys.read(str(location.credentials_file))
    policies = PolicyServer(replace(location, credentials_file=None))  # as in a pod: keys come from the environment
    (container,) = cluster_spec(the("RayService", FOLDER))["headGroupSpec"]["template"]["spec"]["containers"]
    env = environment(container, FOLDER) | {
        "LORAY_HOME": str(home),
        "LORAY_STORE": policies.location.url,
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
        with node_of("training", cluster, home, env | cluster.client_env):
            yield Laptop(cluster, Settings.from_env(env), policies, env | cluster.client_env)
    finally:
        stop_local_cluster(home)
        policies.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def front(laptop: Laptop) -> Iterator[None]:
    """The node of gateways, which training does not need."""
    with node_of("front", laptop.cluster, laptop.settings.home, laptop.env):
        yield


@contextmanager
def node_of(name: str, cluster: LocalCluster, home: Path, env: dict[str, str]) -> Iterator[None]:
    """A node of the worker group of this name, which Ray labels by this variable of KubeRay's."""
    (group,) = (g for g in cluster_spec(the("RayService", FOLDER))["workerGroupSpecs"] if g["groupName"] == name)
    options = {f"--{name}={value}" for name, value in group["rayStartParams"].items() if name != "resources"}
    options |= {f"--resources={json.dumps(offered(group))}", f"--object-store-memory={OBJECT_STORE_BYTES}"}
    options |= {f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "metrics-export-port")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster.gcs_address}"]
    with (home / f"{name}-node.log").open("wb") as log:
        node = subprocess.Popen(
            [*command, "--node-ip-address=127.0.0.1", *options],
            env=os.environ | env | {"RAY_NODE_TYPE_NAME": group["groupName"]},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert eventually(lambda: "Ray runtime started" in log_of(name, home, node), timeout_s=DEADLINE_S)
        yield
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(60)


def log_of(name: str, home: Path, node: subprocess.Popen[bytes]) -> str:
    text = (home / f"{name}-node.log").read_text()
    assert node.poll() is None, text
    return text


@pytest.fixture(scope="module")
def published(laptop: Laptop, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of the adapter that the RayJob's entrypoint trains, from data on S3."""
    Catalog(laptop.settings.catalog).close()  # makes the tables
    url = urlsplit(laptop.settings.catalog)
    postgres.execute(url.path[1:], (POLICIES / "training.sql").read_text())
    postgres.execute(url.path[1:], "CREATE USER trainer IN ROLE loray_training")
    trainer = url._replace(netloc=f"trainer@{url.hostname}:{url.port}").geturl()
    rows = "".join(json.dumps({"text": "abcdefgh" * (i % 3 + 1)}) + "\n" for i in range(40))
    s3 = boto3.client(
        "s3",
        endpoint_url=laptop.store.endpoint_url,
        region_name=laptop.store.region,
        aws_access_key_id=laptop.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=laptop.env["AWS_SECRET_ACCESS_KEY"],
    )
    s3.put_object(Bucket=laptop.store.bucket, Key=DATA, Body=rows.encode())

    entrypoint, mount = the("RayJob", "train")["spec"]["entrypoint"], "/etc/loray/"
    assert mount in entrypoint
    folder = tmp_path_factory.mktemp("mounted")  # holds what the ConfigMap mounts, and nothing else
    recipe = yaml.safe_load(data("ConfigMap", "loray-recipe", "train")["recipe.yaml"])
    recipe["data"]["train"] = replace(laptop.store, prefix=DATA).url
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = shlex.split(entrypoint.replace(mount, ""))
    address = ("--address", laptop.cluster.address)
    as_trainer = ("--runtime-env-json", json.dumps({"env_vars": {"LORAY_CATALOG": trainer}}))
    options = (*address, "--working-dir", ".", *as_trainer)
    with laptop.policies.role("training") as policy:
        output = laptop.ray("ray.scripts.scripts", "job", "submit", *options, "--", *command, cwd=folder)
    assert f"published {recipe['name']}@1" in output
    assert not laptop.policies.refused
    assert policy.actions == {one.action for one in laptop.policies.asked} | {"s3:AbortMultipartUpload"}
    return str(recipe["name"])


def test_the_job_publishes_into_s3_and_postgresql(laptop: Laptop, published: str) -> None:
    assert laptop.settings.store.startswith("s3://")
    assert laptop.settings.catalog.startswith("postgresql")
    assert list(Catalog(laptop.settings.catalog).adapters.get(published).versions) == [1]
    version = Catalog(laptop.settings.catalog).adapters.version(published, 1)
    assert version.aliases == ("prod",)
    assert version.manifest.recipe is not None
    assert version.manifest.recipe.data.train.startswith(f"s3://{laptop.store.bucket}/data/")


@pytest.mark.slow
@pytest.mark.usefixtures("front")
def test_the_service_s_config_serves_what_the_job_published(laptop: Laptop, published: str, tmp_path: Path) -> None:
    config: dict[str, Any] = yaml.safe_load(the("RayService", FOLDER)["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    (serving,) = (a for a in config["applications"] if a["name"] == "loray")
    serving["args"] |= LAPTOP
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    laptop.ray("ray.serve.scripts", "deploy", "config.yaml", "--address", laptop.cluster.address, cwd=tmp_path)

    url, key = f"http://127.0.0.1:{config['http_options']['port']}", {"Authorization": f"Bearer {development_key()}"}
    with httpx.Client(base_url=url, headers=key, timeout=60) as client, laptop.policies.role("serving", "gateway"):
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
        assert not laptop.policies.refused
    with httpx.Client(base_url=url, headers=key, timeout=60) as client, laptop.policies.role("training"):
        check_places(laptop, job_of_the_api(client, laptop.store), tmp_path)
        # The gateway, which goes on, looks for usage now and then.
        assert set(laptop.policies.refused) <= {Asked("s3:ListBucket", laptop.store.bucket, "adapters/usage/")}


def job_of_the_api(client: httpx.Client, store: S3Location) -> str:
    """The id of a job that has trained and published."""
    recipe = yaml.safe_load(data("ConfigMap", "loray-recipe", "train")["recipe.yaml"]) | {"name": "of-the-api"}
    recipe["data"]["train"] = replace(store, prefix=DATA).url
    submitted = client.post("/api/v1/jobs", json=recipe)
    assert submitted.status_code == 201, submitted.text
    at = submitted.headers["Location"]
    deadline = time.monotonic() + DEADLINE_S
    while (job := client.get(at).json())["status"] in ("pending", "running"):
        assert time.monotonic() < deadline, client.get(f"{at}/logs").text
        time.sleep(0.5)
    assert job["status"] == "succeeded", client.get(f"{at}/logs").text
    return str(job["id"])


def check_places(laptop: Laptop, job: str, cwd: Path) -> None:
    """What belongs to the job ran on the training group's node, and nothing that serves did."""

    def listed(what: str) -> list[dict[str, Any]]:
        options = ("--format", "json", "--detail", "--limit", "1000")
        found = laptop.ray("ray.scripts.scripts", "list", what, *options, cwd=cwd)
        return json.loads(found)  # type: ignore[no-any-return]

    (training,) = (n["node_id"] for n in listed("nodes") if n["labels"].get("ray.io/node-group") == "training")
    where: dict[str, set[bool]] = {}
    for actor in listed("actors"):
        kind = actor["class_name"].partition(":")[0]
        if kind != "JobSupervisor" or job in actor["name"]:
            where.setdefault(kind, set()).add(actor["node_id"] == training)
    assert where["JobSupervisor"] == where["RayTrainWorker"] == {True}
    for kind in ("ServeReplica", "ServeController"):
        assert where[kind] == {False}


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/v1/models").status_code == 200
    except httpx.TransportError:
        return False
