"""The manifests: names refer to things that exist, repeated values agree, and loray accepts what it will read."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from jobs.submission.commands import Place, Submission, Work
from jobs.train import main as train_command
from jobs.workers.placement import worker_resources
from loray.bases import smollm2
from loray.bases.config import ModelConfig
from loray.catalog import Catalog
from loray.cli.base import add as add_base_command
from loray.errors import CatalogError, SettingsError
from loray.machine import Gpu
from loray.planning.devices import PRESETS, device_on
from loray.planning.plan import make_plan
from loray.planning.run import shape_of
from loray.recipes.load import Recipe, load_recipe
from loray.recipes.resolve import on_hardware
from loray.settings import Settings
from loray.spec import ServeSpec, TrainingGroup, TrainSpec
from serve_apps.deployment import front_nodes
from tests.conftest import REPOSITORY
from tests.fixtures.calls import refused
from tests.fixtures.machines import AVX2
from tests.fixtures.postgres import Postgres
from tests.infra.crd import check, load_schemas
from tests.infra.manifests import (
    CRDS,
    JOBS,
    KUBERAY,
    QWEN3_8B,
    SERVICES,
    Document,
    by_name,
    bytes_of,
    cluster_spec,
    data,
    development_key,
    environment,
    groups,
    is_our_image,
    offered,
    pods,
    ray_object,
    render,
    the,
)

FOLDERS = [*SERVICES, *JOBS]
CONFIGS = {"base": "cluster.yaml", "overlays/cpu-dev": "cluster.yaml", "overlays/gpu": "gpu.yaml"}
# KubeRay puts this label on the pods of heads and workers.
KUBERAY_LABELS = {"ray.io/is-ray-node": "yes"}
MAX_NAME = 47  # KubeRay appends to it, and the name of a Service has at most 63 characters


# -- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_ray_runs_with_settings_that_loray_accepts(folder: str) -> None:
    for group in groups(folder):
        (container,) = group["template"]["spec"]["containers"]
        settings = Settings.from_env(environment(container, folder))
        assert not settings.is_local
        is_training = group["template"]["spec"]["serviceAccountName"] == "loray-training"
        assert settings.key_hashes or is_training  # without a key nobody could ask a server that others reach
        assert re.fullmatch(r"postgresql\+psycopg://[\w.]+:5432/loray", settings.catalog)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_stopped_driver_has_time_to_say_so(folder: str) -> None:
    driving = groups(folder)[2 if folder in SERVICES else 0]
    (container,) = driving["template"]["spec"]["containers"]
    assert int(environment(container, folder)["RAY_JOB_STOP_WAIT_TIME_S"]) == 30


@pytest.mark.parametrize("folder", FOLDERS)
def test_mounts_have_volumes_and_volumes_have_sources(folder: str) -> None:
    for pod in pods(folder):
        claims = pod.document["spec"].get("volumeClaimTemplates", ())
        volumes = {v["name"] for v in pod.spec.get("volumes", ())} | {c["metadata"]["name"] for c in claims}
        assert {m["name"] for c in pod.containers for m in c.get("volumeMounts", ())} == volumes
        for volume in pod.spec.get("volumes", ()):
            if "configMap" in volume:
                assert data("ConfigMap", volume["configMap"]["name"], folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_service_accounts_exist(folder: str) -> None:
    names = {d["metadata"]["name"] for d in render("base") if d["kind"] == "ServiceAccount"}
    used = {p.spec["serviceAccountName"] for p in pods(folder) if p.is_ours and "serviceAccountName" in p.spec}
    assert used == (names if folder in SERVICES else {"loray-training"}) <= names


@pytest.mark.parametrize("folder", SERVICES)
def test_selectors_find_pods(folder: str) -> None:
    labels = [pod.labels | (KUBERAY_LABELS if pod.is_ours else {}) for pod in pods(folder)]
    found = {}
    for document in render(folder):
        spec = document.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector") or {}
        wanted = selector.get("matchLabels", selector)
        if wanted:
            found[document["kind"], document["metadata"]["name"]] = sum(wanted.items() <= pod.items() for pod in labels)
    assert found.pop(("NetworkPolicy", "loray")) == 4  # head, workers, training and front, and no other
    assert found.pop(("PodDisruptionBudget", "loray-workers")) == 1
    budget = the("PodDisruptionBudget", folder)["spec"]
    assert budget.keys() == {"minAvailable", "selector"}  # Kubernetes supports no more for pods of a RayCluster
    assert budget["minAvailable"] == 1
    assert set(found.values()) <= {1}


def test_the_network_policy_speaks_of_ports_that_are_there() -> None:
    spec = the("NetworkPolicy", "base")["spec"]
    head, *_ = groups("base")
    (container,) = head["template"]["spec"]["containers"]
    metrics = 8080  # KubeRay's own
    assert {p["port"] for rule in spec["ingress"] for p in rule.get("ports", ())} <= {
        metrics,
        *(p["containerPort"] for p in container["ports"]),
    }
    outward = {p["port"] for rule in spec["egress"] for p in rule.get("ports", ())}
    assert {443, 53, int(environment(container, "base")["POSTGRES_PORT"])} <= outward


@pytest.mark.parametrize("folder", JOBS)
def test_the_service_s_network_policy_covers_training(folder: str) -> None:
    wanted = the("NetworkPolicy", "base")["spec"]["podSelector"]["matchLabels"]
    assert all(wanted.items() <= pod.labels.items() for pod in pods(folder))
    assert len(pods(folder)) == 3  # submitter, head, workers


# -- what must agree --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_one_image_of_this_version_with_a_ray_that_it_takes(folder: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (image,) = {c["image"] for pod in pods(folder) for c in pod.containers if is_our_image(c["image"])}
    assert image == f"loray:{project['version']}" + ("-cuda" if "gpu" in folder else "")
    (ray,) = (r for d in project["dependencies"] if (r := Requirement(d)).name == "ray")
    assert cluster_spec(ray_object(folder))["rayVersion"] in ray.specifier
    assert "2.61.0" not in ray.specifier  # private names of Serve are used, which any version may change


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_run_without_rights(folder: str) -> None:
    for pod in pods(folder):
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["runAsUser"] > 0
        assert pod.spec["enableServiceLinks"] is False  # a Service's variables must not be taken for settings
        for container in pod.containers:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            requests, limits = (container["resources"][part] for part in ("requests", "limits"))
            assert requests.keys() == limits.keys() >= {"cpu", "memory"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_the_operator_refuses_beyond_its_definitions(folder: str) -> None:
    document = ray_object(folder)
    spec = cluster_spec(document)
    assert re.fullmatch(rf"[a-z][a-z0-9-]{{0,{MAX_NAME - 2}}}[a-z0-9]", document["metadata"]["name"])
    for group in groups(folder):
        assert not group.get("resources")  # beside rayStartParams
        assert "restartPolicy" not in group["template"]["spec"]  # with the autoscaler v2
        assert "labels" not in group["rayStartParams"]
    assert spec["authOptions"] == {"mode": "token"}
    if "ttlSecondsAfterFinished" in document["spec"]:
        assert document["spec"]["shutdownAfterJobFinishes"] is True


@pytest.mark.parametrize("folder", SERVICES)
def test_the_service_s_config_is_the_file(folder: str) -> None:
    text = (REPOSITORY / "serve_apps" / "configs" / CONFIGS[folder]).read_text()
    assert the("RayService", folder)["spec"]["serveConfigV2"] == text


@pytest.mark.parametrize("folder", SERVICES)
def test_pods_have_what_their_engine_takes(folder: str) -> None:
    config = yaml.safe_load(the("RayService", folder)["spec"]["serveConfigV2"])
    spec = ServeSpec.parse(by_name(config["applications"], "loray")["args"], source=folder)
    head, workers, _, _ = groups(folder)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert workers["rayStartParams"]["num-cpus"] == "1"  # an engine requests one, so each pod runs one
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert spec.num_threads == int(limits["cpu"])
    host = spec.host_bytes + (0 if spec.device.startswith("cuda") else spec.fixed_pool_bytes or 0)
    assert host < 0.75 * bytes_of(limits["memory"])
    assert ("nvidia.com/gpu" in limits) == spec.device.startswith("cuda")
    assert spec.autoscaling is not None
    assert workers["minReplicas"] == spec.autoscaling.min_replicas
    assert workers["maxReplicas"] >= spec.autoscaling.max_replicas + 1  # while they are replaced
    assert environment(container, folder)["OMP_NUM_THREADS"] == limits["cpu"]
    # The port of KubeRay's probes and Services.
    for group in (head, workers):
        assert by_name(group["template"]["spec"]["containers"][0]["ports"], "serve")["containerPort"] == spec.port
    assert config["proxy_location"] == "EveryNode"
    assert added_bases(folder) == {spec.base}


def added_bases(folder: str) -> set[str]:
    """Names of the base models that the pods add before Ray starts, parsed by the command line's own parser."""
    names = set()
    for group in groups(folder):
        (container,) = group["template"]["spec"]["initContainers"]
        assert container["command"] == ["loray", "base", "add"]
        context = add_base_command.make_context("add", list(container["args"]))
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", context.params["source"])
        names.add(context.params["name"])
        assert container["image"] == group["template"]["spec"]["containers"][0]["image"]
        assert "LORAY_STORE" in environment(container, folder)  # a wrong one is refused here, before Ray starts
    return names


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", JOBS)
def test_the_job_s_entrypoint_is_a_driver_with_a_recipe_that_is_mounted(folder: str, tmp_path: Path) -> None:
    job = the("RayJob", folder)
    python, isolated, m, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, isolated, m) == ("python", "-P", "-m")
    assert importlib.util.find_spec(module) is not None
    assert module == train_command.callback.__module__
    recipe = Path(train_command.make_context("train", arguments).params["recipe"])

    head, workers = groups(folder)
    (container,) = head["template"]["spec"]["containers"]
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volume = by_name(head["template"]["spec"]["volumes"], mounts[str(recipe.parent)])
    text = data("ConfigMap", volume["configMap"]["name"], folder)[recipe.name]
    (tmp_path / recipe.name).write_text(text)
    spec = TrainSpec.from_yaml(tmp_path / recipe.name)
    assert spec.data.train.startswith("s3://")
    assert added_bases(folder) == {spec.base}
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == (spec.use_gpu is True)
    assert [g["rayStartParams"]["num-cpus"] for g in (head, workers)] == ["0", "0"]
    group = Settings.from_env(environment(container, folder)).training_group
    assert group is not None
    assert offered(workers) == group.worker
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == spec.num_workers
    assert environment(container, folder)["OMP_NUM_THREADS"] == limits["cpu"]


# -- the overlays' own servers ----------------------------------------------------------------------------------------


def test_the_development_store_is_where_loray_looks() -> None:
    folder = "overlays/cpu-dev"
    services = {d["metadata"]["name"]: d["spec"] for d in render(folder) if d["kind"] == "Service"}
    config = data("ConfigMap", "loray", folder)
    host, port = re.search(r"endpoint_url=http://(\w+):(\d+)", config["LORAY_STORE"]).groups()  # type: ignore[union-attr]
    for name, number in ((host, port), (config["POSTGRES_HOST"], config["POSTGRES_PORT"])):
        assert [p["port"] for p in services[name]["ports"]] == [int(number)]
        (pod,) = (p for p in pods(folder) if services[name]["selector"].items() <= p.labels.items())
        assert pod.containers[0]["ports"][0]["containerPort"] == int(number)


def test_the_development_key_is_what_its_secret_takes() -> None:
    sha256 = data("Secret", "loray", "overlays/cpu-dev")["LORAY_API_KEYS_SHA256"]
    assert hashlib.sha256(development_key().encode()).hexdigest() == sha256


def test_prometheus_sends_a_key() -> None:
    documents = yaml.safe_load_all((REPOSITORY / "infra/observability/scrape.yaml").read_text())
    (scraping,) = (document for document in documents if document["kind"] == "ScrapeConfig")
    assert scraping["spec"]["authorization"]["credentials"]["name"] == "loray-metrics"


SHAPES = {"qwen3-8b": ModelConfig.from_hf(QWEN3_8B), "smollm2-135m-instruct": ModelConfig.from_hf(smollm2.CONFIG)}


@pytest.mark.parametrize("folder", JOBS)
def test_the_job_s_recipe_fits_its_pods_and_the_gpu_that_it_names(folder: str, tmp_path: Path) -> None:
    (text,) = data("ConfigMap", "loray-recipe", folder).values()
    (tmp_path / "recipe.yaml").write_text(text)
    spec = load_recipe(str(tmp_path / "recipe.yaml")).spec
    (container,) = groups(folder)[1]["template"]["spec"]["containers"]
    limits, gpus = container["resources"]["limits"], ()
    if spec.use_gpu is True:
        (gigabytes,) = re.findall(r"GPU of (\d+) GB", text)
        gpus = (Gpu("A100", PRESETS[f"a100-{gigabytes}gb"].memory_bytes, (8, 0)),)
        assert limits["nvidia.com/gpu"] == str(len(gpus))
    pod = replace(AVX2, memory_bytes=bytes_of(limits["memory"]), gpus=gpus)
    device = device_on(pod, 1, use_gpu=bool(gpus))
    assert device is not None
    plan = make_plan(shape_of(on_hardware(spec, pod).spec, SHAPES[spec.base]), device)
    assert plan.problems == ()
    assert plan.host is None or plan.host.usable_bytes is not None


TAINT = {"key": "loray", "operator": "Equal", "value": "training", "effect": "NoSchedule"}


def submitted(settings: Settings, stage: Path) -> Submission:
    return Submission.of(Work.training(Recipe(recipe(), None, Path("/"))), Place.of_server(settings, stage))


@pytest.mark.parametrize("folder", SERVICES)
def test_driver_and_workers_of_a_job_fit_on_the_training_group_alone(folder: str, tmp_path: Path) -> None:
    spec = cluster_spec(the("RayService", folder))
    serving, training, front = spec["workerGroupSpecs"]
    (container,) = training["template"]["spec"]["containers"]
    settings = Settings.from_env(environment(container, folder))
    assert settings.training_group == TrainingGroup(training["groupName"])  # Ray's label of its nodes
    job = submitted(settings, tmp_path)
    assert job.entrypoint_resources is not None
    assert offered(training) == job.entrypoint_resources | worker_resources(recipe(), settings.training_group)
    assert training["rayStartParams"]["num-cpus"] == "0"  # an engine, and a rank of one, takes a CPU
    for group in (spec["headGroupSpec"], serving, front):
        assert offered(group) == {}
    assert (training["minReplicas"], training["replicas"]) == (0, 0)  # a pod begins with a job
    assert training["maxReplicas"] >= recipe().num_workers
    assert "LORAY_TRAINING_GROUP" in job.runtime_env["env_vars"]  # the driver reads it


@pytest.mark.parametrize("folder", FOLDERS)
def test_nodes_with_the_taint_take_training_alone(folder: str) -> None:
    for group in groups(folder):
        pod = group["template"]["spec"]
        is_training = pod["serviceAccountName"] == "loray-training"
        assert (TAINT in pod.get("tolerations", ())) == is_training
        assert is_training == (group["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == "training")


SECRETS = {  # an engine, which opens no catalog, has no password of the database
    "head": {"loray", "loray-database"},
    "front": {"loray", "loray-database"},
    "worker": {"loray"},
    "training": {"loray-training"},
}


@pytest.mark.parametrize("folder", FOLDERS)
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
    assert submitted(settings, tmp_path).entrypoint_resources is None
    assert worker_resources(recipe(), None) == {"CPU": 1.0}
    gpu = recipe().model_copy(update={"use_gpu": True})
    assert worker_resources(gpu, TrainingGroup("gpus")) == {"gpus_worker": 1.0, "GPU": 1.0}


@pytest.mark.parametrize("name", ["Training", "a b", "!training", "-"])
def test_a_group_has_the_name_of_a_worker_group(name: str) -> None:
    refused(SettingsError, "must be the name of a worker group", Settings.from_env, {"LORAY_TRAINING_GROUP": name})


KUBERAY_S_OWN = ("RAY_USE_TLS", "RAY_TLS_")


def with_component(name: str, folder: str, place: Path) -> tuple[Document, ...]:
    """An overlay in `place`, of a folder and a component."""
    place = place.resolve()
    kustomization: Document = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    kustomization |= {"namespace": "loray", "resources": [os.path.relpath(KUBERAY / folder, place)]}
    kustomization |= {"components": [os.path.relpath(KUBERAY / name, place)]}
    (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(str(place))


def recipe() -> TrainSpec:
    return TrainSpec.parse(yaml.safe_load(data("ConfigMap", "loray-recipe", "train")["recipe.yaml"]), source="recipe")


def by_kind(documents: tuple[Document, ...], kind: str) -> list[Document]:
    return [d for d in documents if d["kind"] == kind]


@pytest.mark.parametrize("folder", FOLDERS)
def test_tls_between_nodes_is_ray_s(folder: str, tmp_path: Path) -> None:
    documents = with_component("tls", folder, tmp_path)
    (ours,) = by_kind(documents, ray_object(folder)["kind"])
    assert check(ours, load_schemas(CRDS.glob("*.yaml"))) == []
    assert cluster_spec(ours)["tlsOptions"] == {"enabled": True}
    assert "tlsOptions" not in cluster_spec(ray_object(folder))
    for pod in pods(folder):  # KubeRay refuses a cluster that sets its own beside tlsOptions
        for container in pod.containers:
            assert not [name for name in environment(container, folder) if name.startswith(KUBERAY_S_OWN)]


def test_the_edge_ends_tls_and_refuses_nothing_but_plain_text(tmp_path: Path) -> None:
    documents = with_component("gateway-api", "base", tmp_path)
    (gateway,) = by_kind(documents, "Gateway")
    (certificate,) = by_kind(documents, "Certificate")
    routes = {route["spec"]["parentRefs"][0]["sectionName"]: route["spec"] for route in by_kind(documents, "HTTPRoute")}
    listeners = {listener["name"]: listener for listener in gateway["spec"]["listeners"]}
    assert {d["metadata"]["namespace"] for d in documents} == {"loray"}
    assert routes.keys() == listeners.keys() == {"https", "http"}
    assert all(r["parentRefs"] == [{"name": "loray", "sectionName": name}] for name, r in routes.items())
    assert all(r["hostnames"] == certificate["spec"]["dnsNames"] for r in routes.values())
    assert {name: listener["protocol"] for name, listener in listeners.items()} == {"https": "HTTPS", "http": "HTTP"}
    tls = listeners["https"]["tls"]
    assert tls == {"mode": "Terminate", "certificateRefs": [{"name": certificate["spec"]["secretName"]}]}
    (rule,) = routes["https"]["rules"]
    (service,) = by_kind(documents, "RayService")
    assert rule["backendRefs"] == [{"name": f"{service['metadata']['name']}-serve-svc", "port": 8000}]
    assert set(rule["timeouts"].values()) == {"0s"}  # an answer takes as long as it takes
    assert "matches" not in rule  # keys decide, and not the edge
    (rule,) = routes["http"]["rules"]
    assert "backendRefs" not in rule
    (policy,) = by_kind(documents, "NetworkPolicy")
    admitted = [rule for rule in policy["spec"]["ingress"] if rule.get("ports") == [{"port": 8000}]]
    assert {"namespaceSelector": {"matchLabels": {"loray-access": "true"}}} in admitted[0]["from"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_database_proves_who_it_is(folder: str) -> None:
    for pod in pods(folder):
        for container in pod.containers:
            values = environment(container, folder)
            if is_our_image(container["image"]) and "LORAY_CATALOG" in values:
                assert "sslmode" not in values["LORAY_CATALOG"]  # it would count before the variable
                assert values["PGSSLMODE"] == ("disable" if folder == "overlays/cpu-dev" else "verify-full")
                assert values["PGSSLROOTCERT"] == "/etc/ssl/certs/ca-certificates.crt"
    assert " ca-certificates " in (REPOSITORY / "infra/docker/Dockerfile").read_text()  # which has that file


def test_a_database_that_proves_nothing_is_not_used(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.new_database()
    Catalog(url).close()
    (head, *_) = pods("base")
    (container,) = head.spec["containers"]
    monkeypatch.setenv("PGSSLMODE", environment(container, "base")["PGSSLMODE"])
    refused(CatalogError, "SSL", Catalog, url)
