"""TLS in the manifests: between nodes and at the edge as components, and to the database by default."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from loray.catalog import Catalog
from loray.errors import CatalogError
from tests.conftest import REPOSITORY
from tests.fixtures.postgres import Postgres
from tests.infra.crd import check, load_schemas
from tests.infra.manifests import (
    CRDS,
    JOBS,
    KUBERAY,
    SERVICES,
    Document,
    cluster_spec,
    environment,
    is_our_image,
    pods,
    render,
)

RAY = {"base": "RayService", "overlays/gpu": "RayService", "overlays/cpu-dev": "RayService"} | dict.fromkeys(
    JOBS, "RayJob"
)
KUBERAY_S_OWN = ("RAY_USE_TLS", "RAY_TLS_")


def with_component(name: str, folder: str, place: Path) -> tuple[Document, ...]:
    """An overlay in `place`, of a folder and a component."""
    place = place.resolve()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "loray",
        "resources": [os.path.relpath(KUBERAY / folder, place)],
        "components": [os.path.relpath(KUBERAY / name, place)],
    }
    (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(str(place))


def by_kind(documents: tuple[Document, ...], kind: str) -> list[Document]:
    return [d for d in documents if d["kind"] == kind]


@pytest.mark.parametrize("folder", RAY)
def test_tls_between_nodes_is_ray_s(folder: str, tmp_path: Path) -> None:
    documents = with_component("tls", folder, tmp_path)
    (ours,) = by_kind(documents, RAY[folder])
    assert check(ours, load_schemas(CRDS.glob("*.yaml"))) == []
    assert cluster_spec(ours)["tlsOptions"] == {"enabled": True}
    (plain,) = by_kind(render(folder), RAY[folder])
    assert "tlsOptions" not in cluster_spec(plain)
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


@pytest.mark.parametrize("folder", [*SERVICES, *JOBS])
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
    with pytest.raises(CatalogError, match="SSL"):
        Catalog(url)
